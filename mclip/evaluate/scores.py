"""What an evaluation found, as tables: the headline number, the files of `reports/metrics`,
confusions.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from mclip.data.evalsets import Split
from mclip.data.stores.metrics import COLUMNS
from mclip.params import EvalSet
from mclip.params.registry import IN_DOMAIN
from mclip.system.files import write_whole


class Result(NamedTuple):
    """What `evaluate.evaluate_many` returns; lists are in the order of the models."""

    metrics: list[
        dict[str, dict[str, float]]
    ]  # a model -> set -> metric; a missing set has no metrics
    chance: dict[str, dict[str, float]]
    problems: list[str]  # missing sets, broken samples: one line each
    splits: dict[str, Split]  # the test split of each set that is there, broken pictures left out
    images: dict[str, list[Tensor]]  # (n, d) unit-norm embeddings of the test pictures
    texts: dict[str, list[Tensor]]  # (classes, d) or (captions, d)
    gallery: dict[str, list[str]]  # what the rows of `texts` are: class names or captions
    probe_c: dict[str, list[float]]  # the C that each model's probe chose
    scale: list[float]  # the models' logit scales; 100, CLIP's, where one has none
    train: dict[
        str, tuple[list[int], list[Tensor]]
    ]  # sets with a probe: the train split's labels, (n, d) pictures


def headline(metrics: Mapping[str, Mapping[str, float]], sets: Mapping[str, EvalSet]) -> float:
    """One number a model: the mean of the main metric over the held-out sets (kind other than "in
    domain").

    The main metric is `EvalSet.metric`: zero-shot top-1, for retrieval the mean of both R@1, or the
    set's own. Sets without metrics do not count; with no held-out set at all, every set counts.
    """
    there = {name: spec for name, spec in sets.items() if metrics.get(name)}
    held_out = {name: spec for name, spec in there.items() if spec.kind != IN_DOMAIN} or there
    values = [metrics[name][spec.metric] for name, spec in held_out.items()]
    return float(np.mean(values)) if values else float("nan")


def summary(
    results: Sequence[Mapping[str, Mapping[str, float]]],
    sets: Mapping[str, EvalSet],
    *,
    digits: int = 5,
) -> dict[str, Any]:
    """{set: {metric: {"mean", "std"}}, "mean": {"mean", "std", "sets"}} over the seeds.

    For `dvc metrics show`: a nested dict of numbers. std is the sample standard deviation (n - 1),
    0 for one seed. "mean" holds the headline number.
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
    """The files of `write_all` of one recipe's seeds."""
    write_all(recipe, {recipe: result.metrics}, {recipe: seeds}, result.chance, sets, folder)


def write_all(
    name: str,
    found: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]],
    seeds: Mapping[str, Sequence[int]],
    chance: Mapping[str, Mapping[str, float]],
    sets: Mapping[str, EvalSet],
    folder: str | Path = "reports/metrics",
) -> pd.DataFrame:
    """FOLDER/NAME.json, {recipe: summary}, for DVC, and FOLDER/NAME.csv with every seed's numbers
    and chance.

    found : recipe, or variant of one -> the metrics of each of its `seeds`.

    Returns
    -------
    what the CSV file holds: stores.metrics.COLUMNS.
    """
    rows = [
        (
            recipe,
            key,
            spec.kind,
            spec.task,
            metric,
            seed,
            round(values[key][metric], 6),
            round(guess, 6),
            spec.metric,
        )
        for recipe, metrics in found.items()
        for key, spec in sets.items()
        if key in chance
        for metric, guess in chance[key].items()
        for seed, values in zip(seeds[recipe], metrics, strict=True)
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    tree = {recipe: summary(metrics, sets) for recipe, metrics in found.items()}
    write_whole(Path(folder) / f"{name}.json", json.dumps(tree, indent=1, allow_nan=False) + "\n")
    write_whole(Path(folder) / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    return table


def predictions(result: Result, name: str, model: int = 0) -> np.ndarray:
    """(n, m) gallery rows (classes or captions) of each test picture, the nearest first."""
    similarity = result.images[name][model] @ result.texts[name][model].T
    return similarity.argsort(dim=1, descending=True, stable=True).numpy()
