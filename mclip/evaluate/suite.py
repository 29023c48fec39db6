"""Zero-shot classification, linear probe and retrieval on sets in the layout of
`mclip.data.evalsets`.

    from mclip import evaluate, models, params
    model, _, preprocess, tokenizer = models.create("local-dir:models/teachers/large")
    evaluate.evaluate(model, preprocess, tokenizer, params.load().evaluate.sets)
    # {"cifar10": {"top1": 0.83, "top5": ..., "mean_per_class": ..., "probe_top1": ...}, ...}

    mclip evaluate ViT-B-32/laion2b_s34b_b79k --sets imagenet1k robustness my/folder

Metrics are fractions, 0 to 1 (see mclip.evaluate.metrics):

- `top1`, `top5`, `mean_per_class`: zero-shot; a class's embedding is the mean of the unit-norm
  embeddings of its prompts, normalised again (CLIP's prompt ensemble).
- `probe_top1`: logistic regression on frozen features (mclip.evaluate.probe).
- `i2t_r1`, `t2i_r1` (and 5, 10), `mean_r1` of both: retrieval. Image to text asks whether a right
  caption is among the k nearest, text to image whether a right picture is. `captions: each`
  (CLIP_benchmark's way) makes every caption an entry of its own; `distinct` makes one of equal
  ones, right for all their pictures.

Zero-shot and retrieval give CLIP_benchmark's numbers on the same model and set
(tests/evaluation/test_parity.py).

`worst_group_top1` and others where a set has them: mclip.evaluate.metrics. Few-shot:
mclip.evaluate.fewshot, on `Result.train`.

Every picture is decoded once for all models of a call (`evaluate_many`) and encoded once for all
tasks, also where two sets hold the same pictures; nothing is written to disk. A missing set or a
picture that can't be decoded is named in `Result.problems`.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import open_clip
import torch

from mclip.data.evalsets import EvalError, Split, read_split
from mclip.evaluate import probe
from mclip.evaluate.features import class_features, image_features, once, prompts
from mclip.evaluate.metrics import (
    caption_pairs,
    classification,
    classification_chance,
    retrieval,
    retrieval_chance,
)
from mclip.evaluate.scores import Result
from mclip.models import create, decoders, encode_texts, for_inference, logit_scale
from mclip.params import EvalSet, registry
from mclip.system.progress import bar


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

    sets: name -> params.EvalSet(path, task, probe, kind). device: None is cuda where there is one.
    probe_c, probe_halvings: the linear probe's search, see probe.search.
    precision: of the encoders, see models.resolve_precision.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    models = [model.to(device).eval() for model in models]
    scale = [logit_scale(model) if hasattr(model, "logit_scale") else 100.0 for model in models]
    result = Result([{} for _ in models], {}, [], {}, {}, {}, {}, {}, scale, {})
    loading = {
        "batch_size": batch_size,
        "workers": decoders(device, workers),
        "precision": precision,
        "known": [],
    }
    tests, shared = {}, set()
    for name, spec in sets.items():
        if missing := _missing(name, spec):
            result.problems.append(f"{name}: {missing}")
            continue
        with _named(name):
            tests[name] = _named_classes(name, read_split(spec.path, spec.task, groups=spec.groups))
        shared.update(
            prompts(tests[name]) if spec.task == "classification" else chain(*tests[name].captions)
        )
    # sets have prompts in common: each text is encoded once a model
    row = {text: i for i, text in enumerate(sorted(shared))}
    tokens = once(tokenizer)
    known = [
        encode_texts(m, tokens, list(row), batch_size=batch_size, precision=precision)
        for m in models
    ]
    for name, spec in bar(list(sets.items()), desc="evaluate", unit="set"):
        for metrics in result.metrics:
            metrics[name] = {}
        if name not in tests:
            continue
        with _named(name):
            split, images = image_features(models, tests[name], preprocess, **loading)
            _check(split, spec)
            train = _train(spec, result.problems, name)
            if train:
                train, train_images = image_features(models, train, preprocess, **loading)
                result.train[name] = train.labels, train_images
        result.problems.extend(
            f"{name}: {line}" for line in split.problems + (train.problems if train else [])
        )
        result.splits[name], result.images[name] = split, images
        if spec.task == "classification":
            rows, result.gallery[name] = [row[text] for text in prompts(split)], split.classes
            result.texts[name] = [class_features(own[rows], len(split.classes)) for own in known]
            options = {"groups": split.groups, "f1": spec.metric == "f1_macro"}
            found = [
                classification(x, texts, split.labels, **options)
                for x, texts in zip(images, result.texts[name], strict=True)
            ]
            guess = classification_chance(len(split.classes))
        else:
            result.gallery[name], pairs = caption_pairs(
                split.captions, distinct=spec.captions == "distinct"
            )
            rows = [row[text] for text in result.gallery[name]]
            result.texts[name] = [own[rows] for own in known]
            found = [
                retrieval(x, texts, pairs)
                for x, texts in zip(images, result.texts[name], strict=True)
            ]
            guess = retrieval_chance(pairs)
        if train:
            fits = probe.probes(
                train_images,
                train.labels,
                images,
                split.labels,
                c=probe_c,
                halvings=probe_halvings,
                seed=seed,
            )
            result.probe_c[name] = [best for _, best in fits]
            found = [
                metrics | {"probe_top1": score}
                for metrics, (score, _) in zip(found, fits, strict=True)
            ]
        for metrics, own in zip(result.metrics, found, strict=True):
            metrics[name] = own
        result.chance[name] = {metric: guess[metric] for metric in found[0]}
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


def _train(spec: EvalSet, problems: list[str], name: str) -> Split | None:
    """The split that the linear probe and few-shot take, if they are wanted and it is there."""
    if spec.task != "classification" or not spec.probe:
        return None
    if not (Path(spec.path) / "train").is_dir():
        problems.append(f"{name}: {spec.path}/train is missing: no linear probe")
        return None
    return read_split(spec.path, spec.task, "train")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What is wrong with a set, under the set's name in params.yaml."""
    try:
        yield
    except EvalError as err:
        raise EvalError(f"evaluate.sets.{name}: {err}") from None


def evaluate(
    model, preprocess, tokenizer, sets: Mapping[str, EvalSet], **options
) -> dict[str, dict[str, float]]:
    """{set: {metric: 0..1}} of one model; a missing set has no metrics and is named in a warning."""
    result = evaluate_many([model], preprocess, tokenizer, sets, **options)
    for line in result.problems:
        warnings.warn(line, stacklevel=2)
    return result.metrics[0]


def load_students(
    recipe: str, seeds: Sequence[int], folder: str | Path = "models/students"
) -> tuple[list[torch.nn.Module], Any, Any]:
    """A recipe's trained students, ready for inference, with the preprocessing and tokenizer that
    they share.
    """
    students = []
    for seed in seeds:
        path = Path(folder) / recipe / f"seed{seed}"
        if not (path / "open_clip_config.json").exists():
            raise FileNotFoundError(f"{path} is missing: run `dvc repro distill@{recipe}` first")
        model, _, preprocess, tokenizer = create(f"local-dir:{path}")
        students.append(for_inference(model))
    return students, preprocess, tokenizer


def _check(split: Split, spec: EvalSet) -> None:
    if not split.keys:
        raise EvalError(
            f"{spec.path}: no readable sample in test ({(split.problems or ['it is empty'])[0]})"
        )
    top = max(split.labels, default=-1)
    if spec.task == "classification" and top >= len(split.classes):
        raise EvalError(
            f"{spec.path}/classnames.txt: {len(split.classes)} classes, but labels go up to {top}"
        )
