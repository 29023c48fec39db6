"""Zero-shot classification, linear probe and retrieval on sets in CLIP_benchmark's webdataset layout.

    SET/{test,train}/{0,1,...}.tar + nshards.txt     KEY.{png,webp,jpg} + KEY.cls or .txt (a caption a line)
    SET/classnames.txt                               one class a line; KEY.cls is its line number, from 0
    SET/zeroshot_classification_templates.txt        one prompt a line, {c} is the class name

    from mclip import evaluate, models, params
    model, _, preprocess, tokenizer = models.create("local-dir:models/teachers/large")
    evaluate.evaluate(model, preprocess, tokenizer, params.load().evaluate.sets)
    # {"cifar10": {"top1": 0.83, "top5": ..., "mean_per_class": ..., "probe_top1": ...}, ...}

Metrics are fractions, 0 to 1 (see mclip.metrics):

- `top1`, `top5`, `mean_per_class`: zero-shot; a class's embedding is the mean of the unit-norm embeddings of
  its prompts, normalised again (CLIP's prompt ensemble).
- `probe_top1`: logistic regression on frozen features.
- `i2t_r1`, `t2i_r1` (and 5, 10), `mean_r1` of both: retrieval over *distinct* captions. Image to text asks
  whether a right caption is among the k nearest, text to image whether any right picture is.

Every picture is decoded once for all models of a call (`evaluate_many`) and encoded once for all tasks;
nothing is written to disk. A missing set or a picture that can't be decoded is named in `Result.problems`.
"""

import io
import json
import re
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mclip.compare import COLUMNS, IN_DOMAIN, MAIN
from mclip.files import write_whole
from mclip.metrics import (
    caption_pairs,
    classification,
    classification_chance,
    probes,
    retrieval,
    retrieval_chance,
)
from mclip.models import create, encode_texts, for_inference, image_encoder, side_by_side
from mclip.params import EvalSet
from mclip.progress import bar

IMAGES = ("png", "jpg", "jpeg", "webp")
ANSWER = {"classification": "cls", "retrieval": "txt"}


class Split(NamedTuple):
    """One split of a set: where its pictures lie in the tars, and what is right for each."""

    keys: list[str]
    places: list[tuple[str, int, int]]  # tar, byte offset, bytes
    labels: list[int]  # classification, else empty
    captions: list[list[str]]  # retrieval, else empty
    classes: list[str]
    templates: list[str]
    problems: list[str]


class Result(NamedTuple):
    """What `evaluate_many` returns; lists are in the order of the models."""

    metrics: list[dict[str, dict[str, float]]]  # a model -> set -> metric; a missing set has no metrics
    chance: dict[str, dict[str, float]]
    problems: list[str]  # missing sets, broken samples: one line each
    splits: dict[str, Split]  # the test split of each set that is there, broken pictures left out
    images: dict[str, list[Tensor]]  # (n, d) unit-norm embeddings of the test pictures
    texts: dict[str, list[Tensor]]  # (classes, d) or (distinct captions, d)
    probe_c: dict[str, list[float]]  # the C that each model's probe chose


class EvalError(ValueError):
    """A set that is there but can't be read; the message names the file."""


# ---------------------------------------------------------------- reading


def read_split(folder: str | Path, task: str, split: str = "test") -> Split:
    """Index one split: labels or captions now, pictures by their place in the tar (see `read_image`).

    task: "classification" reads KEY.cls, "retrieval" KEY.txt. A set may hold both.
    """
    folder, answer = Path(folder), ANSWER[task]
    count = folder / split / "nshards.txt"
    if not count.exists():
        raise EvalError(f"{count} is missing: {folder} is not in CLIP_benchmark's webdataset layout")
    classes, templates = (
        _lines(folder / "classnames.txt"),
        _lines(folder / "zeroshot_classification_templates.txt"),
    )
    keys, places, labels, captions, problems = [], [], [], [], []
    for number in range(int(count.read_text())):
        path = folder / split / f"{number}.tar"
        if not path.exists():
            problems.append(f"{path}: missing, nshards.txt counts {count.read_text().strip()}")
            continue
        samples: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.isfile():
                        key, _, ext = member.name.rpartition("/")[2].partition(".")
                        sample = samples.setdefault(key, {})
                        if ext.lower() in IMAGES:
                            sample["place"] = (str(path), member.offset_data, member.size)
                        elif ext == answer:
                            sample["answer"] = tar.extractfile(member).read().decode().strip()
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("truncated, no end-of-archive mark")  # tarfile passes over it
        except (tarfile.TarError, OSError) as err:
            problems.append(f"{path}: {err or type(err).__name__}, read {len(samples)} samples of it")
        for key, sample in samples.items():
            if "place" not in sample:
                problems.append(f"{path}: {key}: no picture ({', '.join(IMAGES)})")
            elif not sample.get("answer"):
                problems.append(f"{path}: {key}: no .{answer}, or an empty one")
            elif task == "classification" and not sample["answer"].isdigit():
                problems.append(f"{path}: {key}: .cls holds {sample['answer']!r}, not a class number")
            else:
                keys.append(key)
                places.append(sample["place"])
                if task == "classification":
                    labels.append(int(sample["answer"]))
                else:
                    captions.append([line.strip() for line in sample["answer"].splitlines() if line.strip()])
    return Split(keys, places, labels, captions, classes, templates, problems)


def read_image(place: tuple[str, int, int]) -> Image.Image:
    """One picture as RGB, transparent parts on white."""
    path, offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        image = Image.open(io.BytesIO(file.read(size)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, places: list[tuple[str, int, int]], preprocess):
        self.places, self.preprocess = places, preprocess

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[int, Tensor | str]:
        try:
            return i, self.preprocess(read_image(self.places[i]))
        except Exception as err:  # any decoder error: the picture is named, the rest goes on
            return i, re.sub(r" ?<.*?>", "", f"{type(err).__name__}: {err}")  # no memory address


def _collate(items: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | None, dict[int, str]]:
    good = [(i, x) for i, x in items if isinstance(x, Tensor)]
    bad = {i: x for i, x in items if not isinstance(x, Tensor)}
    return [i for i, _ in good], torch.stack([x for _, x in good]) if good else None, bad


def batches(
    split: Split, preprocess, batch_size: int = 256, workers: int = 2
) -> Iterator[tuple[list[int], Tensor | None, dict[int, str]]]:
    """(indices, (b, 3, h, w) pictures, {index: why} of the broken ones) in the split's order."""
    workers = workers if len(split.places) > batch_size else 0  # starting two processes costs more than 256 pictures
    yield from torch.utils.data.DataLoader(
        _Pictures(split.places, preprocess), batch_size, num_workers=workers, collate_fn=_collate
    )


def load_set(
    folder: str | Path,
    task: str,
    preprocess,
    split: str = "test",
    *,
    batch_size: int = 256,
    workers: int = 2,
) -> tuple[Split, Tensor]:
    """A split with all its pictures preprocessed, (n, 3, h, w) float32, broken ones left out and named."""
    index = read_split(folder, task, split)
    kept, parts, broken = [], [], {}
    for indices, pictures, bad in batches(index, preprocess, batch_size, workers):
        kept += indices
        broken |= bad
        parts += [pictures] if pictures is not None else []
    return _keep(index, kept, broken), torch.cat(parts) if parts else torch.empty(0)


def _keep(split: Split, kept: list[int], broken: dict[int, str]) -> Split:
    pick = lambda values: [values[i] for i in kept] if len(values) == len(split.keys) else values  # noqa: E731
    lines = [f"{split.places[i][0]}: {split.keys[i]}: picture can't be read ({why})" for i, why in broken.items()]
    return split._replace(
        keys=pick(split.keys),
        places=pick(split.places),
        labels=pick(split.labels),
        captions=pick(split.captions),
        problems=split.problems + lines,
    )


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


# ---------------------------------------------------------------- encoding

def image_features(
    models: Sequence[torch.nn.Module],
    split: Split,
    preprocess,
    *,
    batch_size: int = 256,
    workers: int = 2,
    precision: str = "fp32",
) -> tuple[Split, list[Tensor]]:
    """Unit-norm (n, d) float32 embeddings of every readable picture by each model, decoded once for all."""
    kept, broken = [], {}
    encoders = [image_encoder(model, precision) for model in models]

    def pictures() -> Iterator[Tensor]:
        for indices, readable, bad in batches(split, preprocess, batch_size, workers):
            kept.extend(indices)
            broken.update(bad)
            if readable is not None:
                yield readable

    device = next(models[0].parameters()).device
    parts = list(side_by_side(lambda batch: [encode(batch) for encode in encoders], pictures(), device))
    features = [torch.cat(own) for own in zip(*parts, strict=True)] or [torch.empty(0, 0) for _ in models]
    return _keep(split, kept, broken), features


def prompts(split: Split, task: str) -> list[str]:
    """The texts a split is scored against: the distinct captions, or every class in every template, class by class."""
    if task == "retrieval":
        return caption_pairs(split.captions)[0]
    return [t.replace("{c}", name) for name in split.classes for t in split.templates or ["{c}"]]


def class_features(features: Tensor, classes: int) -> Tensor:
    """(classes * templates, d) unit-norm embeddings of `prompts` -> (classes, d): their mean, normalised again."""
    return F.normalize(features.view(classes, -1, features.shape[-1]).mean(1), dim=-1)


# ---------------------------------------------------------------- all of it


def evaluate_many(
    models: Sequence[torch.nn.Module],
    preprocess,
    tokenizer,
    sets: Mapping[str, EvalSet],
    *,
    batch_size: int = 256,
    probe_c: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0),
    seed: int = 0,
    workers: int = 2,
    device: str | None = None,
    precision: str = "fp32",
) -> Result:
    """Evaluate models that share preprocessing and tokenizer (seeds of one recipe) on every set.

    sets: name -> params.EvalSet(path, task, probe, kind). device: None is cuda where there is one.
    precision: of the encoders, see models.resolve_precision.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    models = [model.to(device).eval() for model in models]
    result = Result([{} for _ in models], {}, [], {}, {}, {}, {})
    loading = {"batch_size": batch_size, "workers": workers, "precision": precision}
    texting = {"batch_size": batch_size, "precision": precision}
    tests, shared = {}, set()
    for name, spec in sets.items():
        if Path(spec.path).is_dir():
            with _named(name):
                tests[name] = read_split(spec.path, spec.task)
            shared.update(prompts(tests[name], spec.task))
    # sets have prompts in common: each text is encoded once a model
    row = {text: i for i, text in enumerate(sorted(shared))}
    known = [encode_texts(model, tokenizer, list(row), **texting) for model in models]
    for name, spec in bar(list(sets.items()), desc="evaluate", unit="set"):
        if name not in tests:
            result.problems.append(f"{name}: {spec.path} is missing, not evaluated")
            for metrics in result.metrics:
                metrics[name] = {}
            continue
        with _named(name):
            split, images = image_features(models, tests[name], preprocess, **loading)
            _check(split, spec)
            train, train_images = None, []
            if spec.task == "classification" and spec.probe:
                train = read_split(spec.path, spec.task, "train")
                train, train_images = image_features(models, train, preprocess, **loading)
        result.problems.extend(f"{name}: {line}" for line in split.problems + (train.problems if train else []))
        result.splits[name], result.images[name], result.texts[name] = split, images, []
        pairs = caption_pairs(split.captions)[1]
        result.chance[name] = (
            retrieval_chance(pairs)
            if spec.task == "retrieval"
            else classification_chance(len(split.classes), spec.probe)
        )
        rows = [row[text] for text in prompts(split, spec.task)]
        for i in range(len(models)):
            texts = known[i][rows]
            if spec.task == "classification":
                texts = class_features(texts, len(split.classes))
                metrics = classification(images[i], texts, split.labels)
            else:
                metrics = retrieval(images[i], texts, pairs)
            result.texts[name].append(texts)
            result.metrics[i][name] = metrics
        if train:
            fits = probes(train_images, train.labels, images, split.labels, c=probe_c, seed=seed)
            for metrics, (score, _) in zip(result.metrics, fits, strict=True):
                metrics[name]["probe_top1"] = score
            result.probe_c[name] = [best for _, best in fits]
    return result


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What is wrong with a set, under the set's name in params.yaml."""
    try:
        yield
    except EvalError as err:
        raise EvalError(f"evaluate.sets.{name}: {err}") from None


def evaluate(model, preprocess, tokenizer, sets: Mapping[str, EvalSet], **options) -> dict[str, dict[str, float]]:
    """{set: {metric: 0..1}} of one model; a missing set has no metrics and is named in a warning."""
    result = evaluate_many([model], preprocess, tokenizer, sets, **options)
    for line in result.problems:
        warnings.warn(line, stacklevel=2)
    return result.metrics[0]


def headline(metrics: Mapping[str, Mapping[str, float]], sets: Mapping[str, EvalSet]) -> float:
    """One number a model: the mean of the main metric over the held-out sets (kind other than "in domain").

    The main metric is zero-shot top-1, for retrieval the mean of both R@1. Sets without metrics do not count; with
    no held-out set at all, every set counts.
    """
    there = {name: spec for name, spec in sets.items() if metrics.get(name)}
    held_out = {name: spec for name, spec in there.items() if spec.kind != IN_DOMAIN} or there
    values = [metrics[name][MAIN[spec.task]] for name, spec in held_out.items()]
    return float(np.mean(values)) if values else float("nan")


def summary(
    results: Sequence[Mapping[str, Mapping[str, float]]], sets: Mapping[str, EvalSet], *, digits: int = 5
) -> dict[str, Any]:
    """{set: {metric: {"mean", "std"}}, "mean": {"mean", "std", "sets"}} over the seeds.

    For `dvc metrics show`: a nested dict of numbers. std is the sample standard deviation (n - 1), 0 for one
    seed. "mean" holds the headline number.
    """

    def spread(values: list[float]) -> dict[str, float]:
        std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return {"mean": round(float(np.mean(values)), digits), "std": round(std, digits)}

    out: dict[str, Any] = {
        name: {metric: spread([r[name][metric] for r in results]) for metric in results[0][name]}
        for name in sets
        if results[0].get(name)
    }
    counted = [n for n in out if sets[n].kind != IN_DOMAIN] or list(out)
    if counted:
        out["mean"] = spread([headline(r, sets) for r in results]) | {"sets": len(counted)}
    return out


def write(
    recipe: str,
    result: Result,
    sets: Mapping[str, EvalSet],
    seeds: Sequence[int],
    folder: str | Path = "reports/metrics",
) -> None:
    """FOLDER/RECIPE.json, {recipe: summary}, for DVC, and FOLDER/RECIPE.csv with every seed's numbers and chance."""
    folder = Path(folder)
    rows = [
        (recipe, name, sets[name].kind, sets[name].task, metric, seed, round(value, 6), round(chance, 6))
        for name in result.chance
        for metric, chance in result.chance[name].items()
        for seed, metrics in zip(seeds, result.metrics, strict=True)
        for value in [metrics[name][metric]]
    ]
    tree = {recipe: summary(result.metrics, sets)}
    write_whole(folder / f"{recipe}.json", json.dumps(tree, indent=1, allow_nan=False) + "\n")
    table = pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False, lineterminator="\n")
    write_whole(folder / f"{recipe}.csv", table)


def load_students(
    recipe: str, seeds: Sequence[int], folder: str | Path = "models/students"
) -> tuple[list[torch.nn.Module], Any, Any]:
    """A recipe's trained students, ready for inference, with the preprocessing and tokenizer that they share."""
    students = []
    for seed in seeds:
        path = Path(folder) / recipe / f"seed{seed}"
        if not (path / "open_clip_config.json").exists():
            raise FileNotFoundError(f"{path} is missing: run `dvc repro distill@{recipe}` first")
        model, _, preprocess, tokenizer = create(f"local-dir:{path}")
        students.append(for_inference(model))
    return students, preprocess, tokenizer


def predictions(result: Result, name: str, model: int = 0) -> np.ndarray:
    """(n, m) gallery rows (classes or distinct captions) of each test picture, the nearest first."""
    similarity = result.images[name][model] @ result.texts[name][model].T
    return similarity.argsort(dim=1, descending=True, stable=True).numpy()


def confusion(result: Result, name: str) -> pd.DataFrame:
    """Share of each true class (row) that is taken for each class (column), the mean over the models."""
    split = result.splits[name]
    labels, n = np.asarray(split.labels), len(split.classes)
    counts = sum(
        np.bincount(labels * n + predictions(result, name, i)[:, 0], minlength=n * n)
        for i in range(len(result.metrics))
    ).reshape(n, n)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return pd.DataFrame(share, index=split.classes, columns=split.classes)


def _check(split: Split, spec: EvalSet) -> None:
    if not split.keys:
        raise EvalError(f"{spec.path}: no readable sample in test ({(split.problems or ['it is empty'])[0]})")
    top = max(split.labels, default=-1)
    if spec.task == "classification" and top >= len(split.classes):
        raise EvalError(f"{spec.path}/classnames.txt: {len(split.classes)} classes, but labels go up to {top}")
