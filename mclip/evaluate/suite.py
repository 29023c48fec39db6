"""Evaluate models that share their preprocessing on sets, each by its task.

Every picture is decoded once for all models of a call (`evaluate_many`) and encoded once for all
tasks, also where two sets hold the same pictures; every text is encoded once for all sets. Nothing
is written to disk. A missing set or a picture that can't be decoded is named in `Result.problems`.

`mclip.evaluate.tasks` defines what is measured; a linear probe (`mclip.evaluate.probe`) is added
here, as `probe_top1`, where a set asks for one. Metrics are fractions, 0 to 1.

Zero-shot and retrieval give CLIP_benchmark's numbers on the same model and set
(tests/evaluate/test_parity.py).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch

from mclip.data.evalsets import EvalError, Split, read_split
from mclip.evaluate import probe, tasks
from mclip.evaluate.features import image_features, once
from mclip.evaluate.scores import Result
from mclip.models import create, encode_texts, for_inference, logit_scale
from mclip.params import EvalSet, registry
from mclip.system.progress import bar
from mclip.system.workers import decoding_processes


def evaluate_many(
    models: Sequence[torch.nn.Module],
    preprocess,
    tokenizer,
    sets: Mapping[str, EvalSet],
    *,
    batch_size: int = 256,
    probe_c: Sequence[float] = probe.GRID,
    probe_halvings: int = probe.HALVINGS,
    seed: int = 0,
    workers: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
) -> Result:
    """Evaluate models that share preprocessing and tokenizer (seeds of one recipe) on every set.

    Parameters
    ----------
    models : sequence of torch.nn.Module
        Of `mclip.models.create`, or whatever has `encode_image` and `encode_text`.
    preprocess : callable
        PIL image -> (3, h, w) Tensor.
    tokenizer : callable
        List of str -> (n, context) Tensor of int.
    sets : mapping of str to EvalSet
        By name, such as `params.load().evaluate.sets`.
    batch_size : int
        Pictures, or texts, at a time.
    probe_c : sequence of float
        The grid of C for linear probes, see `mclip.evaluate.probe.search`.
    probe_halvings : int
        How often that grid's steps around the peak are halved.
    seed : int
        Draws the linear probe's validation split.
    workers : int, optional
        Processes that decode; by default what the machine has to spare.
    device : str, optional
        "cpu" or "cuda"; by default cuda where there is one.
    precision : str
        Of the encoders: "fp32", "bf16" or "auto", see `mclip.models.resolve_precision`.

    Returns
    -------
    Result
        Metrics of each model, chance, problems, and the features. A missing set has no metrics.

    Raises
    ------
    EvalError
        A set is there but can't be read, or its task or metric can't be had. The message begins
        with its key in params.yaml.

    See Also
    --------
    evaluate : the metrics of one model.
    mclip.evaluate.tasks : what is measured.
    mclip.evaluate.fewshot.curves : few-shot classification on the Result.

    References
    ----------
    LAION-AI/CLIP_benchmark, https://github.com/LAION-AI/CLIP_benchmark: the layout and the numbers.

    Examples
    --------
    >>> from mclip import evaluate, models
    >>> from mclip.params import EvalSet
    >>> model, _, preprocess, tokenizer = models.create("demo-student")
    >>> sets = {"mine": EvalSet(path="no/such/folder")}
    >>> result = evaluate.evaluate_many([model, model], preprocess, tokenizer, sets)
    >>> result.metrics
    [{'mine': {}}, {'mine': {}}]
    >>> result.problems
    ['mine: no/such/folder is missing, not evaluated']
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    models = [model.to(device).eval() for model in models]
    scale = [logit_scale(model) if hasattr(model, "logit_scale") else 100.0 for model in models]
    result = Result(
        metrics=[{} for _ in models],
        chance={},
        problems=[],
        splits={},
        images={},
        texts={},
        gallery={},
        probe_c={},
        scale=scale,
        train={},
        items=[{} for _ in models],
    )
    loading: dict[str, Any] = {
        "batch_size": batch_size,
        "workers": decoding_processes(device, workers),
        "precision": precision,
        "known": [],
    }
    tests, shared = {}, set()
    for name, spec in sets.items():
        if missing := _missing(name, spec):
            result.problems.append(f"{name}: {missing}")
            continue
        task = tasks.get(spec.task)
        with _named(name):
            test = read_split(spec.path, task.ANSWER, groups=spec.groups)
            tests[name] = _named_classes(name, test)
            _check(task, tests[name], spec)
        for text in task.gallery(tests[name]):
            shared.update(task.prompts(tests[name], text))
    # sets have prompts in common: each text is encoded once a model
    row = {text: i for i, text in enumerate(sorted(shared))}
    tokens = once(tokenizer)
    encoded = [
        encode_texts(m, tokens, list(row), batch_size=batch_size, precision=precision)
        for m in models
    ]

    def encode(texts: Sequence[str]) -> list[torch.Tensor]:
        rows = [row[text] for text in texts]
        return [own[rows] for own in encoded]

    for name, spec in bar(list(sets.items()), desc="evaluate", unit="set"):
        for metrics in result.metrics:
            metrics[name] = {}
        if name not in tests:
            continue
        task = tasks.get(spec.task)
        with _named(name):
            split, images = image_features(models, tests[name], preprocess, **loading)
            if not split.keys:
                why = (split.problems or ["it is empty"])[0]
                raise EvalError(f"{spec.path}: no readable sample in test ({why})")
            train = _train(task, spec, result.problems, name)
            if train:
                train, train_images = image_features(models, train, preprocess, **loading)
                result.train[name] = train.answers, train_images
        result.problems.extend(
            f"{name}: {line}" for line in split.problems + (train.problems if train else [])
        )
        result.splits[name], result.images[name] = split, images
        scores = task.score(split, spec, images, encode)
        result.gallery[name], result.texts[name] = scores.gallery, scores.texts
        for of_model, shares in zip(result.items, scores.items, strict=False):
            values = [round(float(share), 6) for share in shares]
            of_model[name] = dict(zip(split.keys, values, strict=True))
        scored = scores.metrics
        if train:
            fits = probe.probes(
                train_images,
                train.answers,
                images,
                split.answers,
                c=probe_c,
                halvings=probe_halvings,
                seed=seed,
            )
            result.probe_c[name] = [best for _, best in fits]
            scored = [
                own | {"probe_top1": score} for own, (score, _) in zip(scored, fits, strict=True)
            ]
        for sets_of_model, own in zip(result.metrics, scored, strict=True):
            sets_of_model[name] = own
        result.chance[name] = {metric: scores.chance[metric] for metric in scored[0]}
    return result


def _missing(name: str, spec: EvalSet) -> str | None:
    """Why a set can't be evaluated, and what to do about it; None: it is there."""
    entry = registry.get(name)
    if Path(spec.path).is_dir():
        return f"not evaluated: {entry.lacks}" if entry and entry.metric == "jaccard" else None
    where = f" ({entry.where.replace('FOLDER', spec.path)})" if entry else ""
    return f"{spec.path} is missing, not evaluated{where}"


def _named_classes(name: str, split: Split) -> Split:
    """The split with open_clip's ImageNet names and templates where it is ImageNet's and has none
    of its own.
    """
    entry = registry.get(name)
    if entry and entry.imagenet:
        classes = split.classes or list(open_clip.IMAGENET_CLASSNAMES)
        templates = split.templates or [make("{c}") for make in open_clip.OPENAI_IMAGENET_TEMPLATES]
        return split._replace(classes=classes, templates=templates)
    if entry and entry.size and entry.classes and len(split.classes) != entry.classes:
        line = f"classnames.txt has {len(split.classes)} classes, the set {entry.classes}"
        return split._replace(problems=[*split.problems, line])
    return split


def _train(task: tasks.Task, spec: EvalSet, problems: list[str], name: str) -> Split | None:
    """The split that the linear probe and few-shot take, if they are wanted and it is there."""
    if not task.PROBE or not spec.probe:
        return None
    if not (Path(spec.path) / "train").is_dir():
        problems.append(f"{name}: {spec.path}/train is missing: no linear probe")
        return None
    return read_split(spec.path, task.ANSWER, "train")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Prefix a set's errors with its name in params.yaml."""
    try:
        yield
    except EvalError as err:
        raise EvalError(f"evaluate.sets.{name}: {err}") from None


def evaluate(
    model, preprocess, tokenizer, sets: Mapping[str, EvalSet], **options
) -> dict[str, dict[str, float]]:
    """Evaluate one model on every set.

    Parameters
    ----------
    model : torch.nn.Module
        Of `mclip.models.create`, or whatever has `encode_image` and `encode_text`.
    preprocess : callable
        PIL image -> (3, h, w) Tensor.
    tokenizer : callable
        List of str -> (n, context) Tensor of int.
    sets : mapping of str to EvalSet
        By name, such as `params.load().evaluate.sets`.
    **options
        Of `evaluate_many`.

    Returns
    -------
    dict of str to dict of str to float
        Set -> metric -> 0 to 1. A missing set has no metrics and is named in a warning.

    Raises
    ------
    EvalError
        See `evaluate_many`.

    Examples
    --------
    A set of two pictures in CLIP_benchmark's layout:

    >>> import io, tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from mclip import evaluate, models
    >>> from mclip.data import tars
    >>> from mclip.params import EvalSet
    >>> folder = Path(tempfile.mkdtemp())
    >>> def sample(colour, caption):
    ...     Image.new("RGB", (32, 32), colour).save(file := io.BytesIO(), "PNG")
    ...     return {"__key__": colour, "png": file.getvalue(), "txt": caption.encode()}
    >>> (folder / "test").mkdir()
    >>> (folder / "test" / "nshards.txt").write_text("1")
    1
    >>> written = tars.write_tar(
    ...     folder / "test" / "0.tar", [sample("red", "a red square"), sample("blue", "a blue one")]
    ... )
    >>> model, _, preprocess, tokenizer = models.create("demo-student")
    >>> sets = {"squares": EvalSet(path=str(folder), task="retrieval")}
    >>> scores = evaluate.evaluate(model, preprocess, tokenizer, sets)
    >>> scores["squares"]["t2i_r5"]
    1.0
    """
    result = evaluate_many([model], preprocess, tokenizer, sets, **options)
    for line in result.problems:
        warnings.warn(line, stacklevel=2)
    return result.metrics[0]


def load_students(
    recipe: str, seeds: Sequence[int], folder: str | Path = "models/students"
) -> tuple[list[torch.nn.Module], Any, Any]:
    """Load a recipe's trained students, folded for inference.

    Parameters
    ----------
    recipe : str
        A name of `distill.recipes`.
    seeds : sequence of int
        Which of its runs.
    folder : path, default "models/students"
        Holds RECIPE/seedN.

    Returns
    -------
    models : list of torch.nn.Module
        One a seed.
    preprocess : callable
        PIL image -> (3, h, w) Tensor; the students share it.
    tokenizer : callable
        List of str -> (n, context) Tensor of int64; the students share it.

    Raises
    ------
    FileNotFoundError
        If a student is missing; the message names the stage that trains it.

    Examples
    --------
    >>> import tempfile
    >>> from mclip import evaluate, models
    >>> folder = tempfile.mkdtemp()
    >>> path = models.export(models.create("demo-student")[0], f"{folder}/clip/seed0")
    >>> (student,), preprocess, tokenizer = evaluate.load_students("clip", [0], folder)
    >>> student.training
    False
    """
    students = []
    for seed in seeds:
        path = Path(folder) / recipe / f"seed{seed}"
        if not (path / "open_clip_config.json").exists():
            raise FileNotFoundError(f"{path} is missing: run `dvc repro distill@{recipe}` first")
        model, _, preprocess, tokenizer = create(f"local-dir:{path}")
        students.append(for_inference(model))
    return students, preprocess, tokenizer


def _check(task: tasks.Task, split: Split, spec: EvalSet) -> None:
    """Check, before any encoding, what would fail after it."""
    if spec.metric not in task.METRICS:
        raise EvalError(
            f"metric: {spec.metric} is none of {spec.task}, which has {', '.join(task.METRICS)}"
        )
    task.check(split, spec.path)
