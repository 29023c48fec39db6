"""Zero-shot classification, linear probe and retrieval on sets in the layout of `mclip.data.evalsets`.

    from mclip import evaluate, models, params
    model, _, preprocess, tokenizer = models.create("local-dir:models/teachers/large")
    evaluate.evaluate(model, preprocess, tokenizer, params.load().evaluate.sets)
    # {"cifar10": {"top1": 0.83, "top5": ..., "mean_per_class": ..., "probe_top1": ...}, ...}

Metrics are fractions, 0 to 1 (see mclip.metrics):

- `top1`, `top5`, `mean_per_class`: zero-shot; a class's embedding is the mean of the unit-norm embeddings of
  its prompts, normalised again (CLIP's prompt ensemble).
- `probe_top1`: logistic regression on frozen features (mclip.probe).
- `i2t_r1`, `t2i_r1` (and 5, 10), `mean_r1` of both: retrieval. Image to text asks whether a right caption is among
  the k nearest, text to image whether a right picture is. `captions: each` (CLIP_benchmark's way) makes every
  caption an entry of its own; `distinct` makes one of equal ones, right for all their pictures.

Zero-shot and retrieval give CLIP_benchmark's numbers on the same model and set (tests/evaluation/test_parity.py).

Every picture is decoded once for all models of a call (`evaluate_many`) and encoded once for all tasks;
nothing is written to disk. A missing set or a picture that can't be decoded is named in `Result.problems`.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mclip.compare import COLUMNS, IN_DOMAIN
from mclip.data.evalsets import EvalError, Split, batches, read_split, without
from mclip.files import write_whole
from mclip.metrics import (
    caption_pairs,
    classification,
    classification_chance,
    nearest,
    retrieval,
    retrieval_chance,
)
from mclip.models import create, decoders, encode_texts, for_inference, image_encoder, side_by_side
from mclip.params import EvalSet
from mclip.probe import probes
from mclip.progress import bar


class Result(NamedTuple):
    """What `evaluate_many` returns; lists are in the order of the models."""

    metrics: list[dict[str, dict[str, float]]]  # a model -> set -> metric; a missing set has no metrics
    chance: dict[str, dict[str, float]]
    problems: list[str]  # missing sets, broken samples: one line each
    splits: dict[str, Split]  # the test split of each set that is there, broken pictures left out
    images: dict[str, list[Tensor]]  # (n, d) unit-norm embeddings of the test pictures
    texts: dict[str, list[Tensor]]  # (classes, d) or (captions, d)
    gallery: dict[str, list[str]]  # what the rows of `texts` are: class names or captions
    probe_c: dict[str, list[float]]  # the C that each model's probe chose


# ---------------------------------------------------------------- encoding

def image_features(
    models: Sequence[torch.nn.Module],
    split: Split,
    preprocess,
    *,
    batch_size: int = 256,
    workers: int | None = None,
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
    return without(split, kept, broken), features


def prompts(split: Split) -> list[str]:
    """Every class in every template, class by class."""
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
    workers: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
) -> Result:
    """Evaluate models that share preprocessing and tokenizer (seeds of one recipe) on every set.

    sets: name -> params.EvalSet(path, task, probe, kind). device: None is cuda where there is one.
    precision: of the encoders, see models.resolve_precision.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    models = [model.to(device).eval() for model in models]
    result = Result([{} for _ in models], {}, [], {}, {}, {}, {}, {})
    loading = {"batch_size": batch_size, "workers": decoders(device, workers), "precision": precision}
    texting = {"batch_size": batch_size, "precision": precision}
    tests, shared = {}, set()
    for name, spec in sets.items():
        if Path(spec.path).is_dir():
            with _named(name):
                tests[name] = read_split(spec.path, spec.task, groups=spec.groups)
            shared.update(prompts(tests[name]) if spec.task == "classification" else chain(*tests[name].captions))
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
        if spec.task == "classification":
            texts, result.gallery[name] = prompts(split), split.classes
        else:
            texts, pairs = caption_pairs(split.captions, distinct=spec.captions == "distinct")
            result.gallery[name] = texts
        rows = [row[text] for text in texts]
        for i in range(len(models)):
            if spec.task == "classification":
                texts = class_features(known[i][rows], len(split.classes))
                f1 = spec.main == "f1_macro"
                metrics = classification(images[i], texts, split.labels, groups=split.groups, f1=f1)
            else:
                texts = known[i][rows]
                metrics = retrieval(images[i], texts, pairs)
            result.texts[name].append(texts)
            result.metrics[i][name] = metrics
        if train:
            fits = probes(train_images, train.labels, images, split.labels, c=probe_c, seed=seed)
            for metrics, (score, _) in zip(result.metrics, fits, strict=True):
                metrics[name]["probe_top1"] = score
            result.probe_c[name] = [best for _, best in fits]
        guess = retrieval_chance(pairs) if spec.task == "retrieval" else classification_chance(len(split.classes))
        result.chance[name] = {metric: guess[metric] for metric in result.metrics[0][name]}
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
    values = [metrics[name][spec.main] for name, spec in held_out.items()]
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
    """(n, m) gallery rows (classes or captions) of each test picture, the nearest first."""
    similarity = result.images[name][model] @ result.texts[name][model].T
    return similarity.argsort(dim=1, descending=True, stable=True).numpy()


def confusion(result: Result, name: str) -> pd.DataFrame:
    """Share of each true class (row) that is taken for each class (column), the mean over the models."""
    split = result.splits[name]
    labels, n = np.asarray(split.labels), len(split.classes)
    counts = sum(
        np.bincount(labels * n + nearest(result.images[name][i], result.texts[name][i]), minlength=n * n)
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
