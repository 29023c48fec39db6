"""Results of an evaluation: the headline number, the files of `reports/metrics`, predictions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from mclip.data.evalsets import Split
from mclip.data.stores.metrics import COLUMNS, write_items
from mclip.params import EvalSet
from mclip.params.registry import IN_DOMAIN
from mclip.system.files import write_whole


class Result(NamedTuple):
    """What `evaluate_many` returns; lists are in the order of the models.

    Parameters
    ----------
    metrics : list of dict
        For each model: set -> metric -> 0 to 1. A missing set has no metrics.
    chance : dict of str to dict of str to float
        What guessing scores: set -> metric -> 0 to 1.
    problems : list of str
        Missing sets and broken samples, one line each.
    splits : dict of str to Split
        The test split of each set that is there, without broken pictures.
    images : dict of str to list of Tensor
        Unit-norm embeddings of the test pictures, (n, d).
    texts : dict of str to list of Tensor
        Unit-norm embeddings of the gallery, (classes, d) or (captions, d).
    gallery : dict of str to list of str
        What the rows of `texts` are: class names or captions.
    probe_c : dict of str to list of float
        The C that each model's linear probe chose.
    scale : list of float
        The models' logit scales; 100, CLIP's, where one has none.
    items : list of dict
        For each model: set -> picture's key -> its share of the set's main metric, whose mean is
        the metric. Sets whose main metric is no mean over pictures have none.
    train : dict of str to tuple
        Of sets with a probe: the train split's labels, and its pictures' embeddings.

    Examples
    --------
    >>> import torch
    >>> from mclip import evaluate
    >>> empty = dict.fromkeys(evaluate.Result._fields, {})
    >>> result = evaluate.Result(**empty | {"metrics": [{"pets": {"top1": 0.5}}]})
    >>> result.metrics[0]["pets"]["top1"]
    0.5
    """

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
    items: list[dict[str, dict[str, float]]]  # a model -> set -> picture -> share of the metric
    train: dict[
        str, tuple[list[int], list[Tensor]]
    ]  # sets with a probe: the train split's labels, (n, d) pictures


def headline(metrics: Mapping[str, Mapping[str, float]], sets: Mapping[str, EvalSet]) -> float:
    """Reduce a model's metrics to one number: the mean over the held-out sets.

    Parameters
    ----------
    metrics : mapping of str to mapping of str to float
        Set -> metric -> 0 to 1, as `evaluate` returns them.
    sets : mapping of str to EvalSet
        By name. A set's `metric` is the one that counts: zero-shot top-1, for retrieval the mean of
        both R@1, or the set's own. Its `kind` is "in domain" where it is not held out.

    Returns
    -------
    float
        0 to 1. Sets without metrics do not count; without any held-out set every set counts; NaN
        without any set.

    Examples
    --------
    >>> from mclip import evaluate
    >>> from mclip.params import EvalSet
    >>> sets = {"cifar": EvalSet(path="a", kind="in domain"), "pets": EvalSet(path="b")}
    >>> evaluate.headline({"cifar": {"top1": 0.9}, "pets": {"top1": 0.5}}, sets)
    0.5
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
    """Average the metrics over the seeds, as a nested dict that `dvc metrics show` reads.

    Parameters
    ----------
    results : sequence of mapping
        For each seed: set -> metric -> 0 to 1.
    sets : mapping of str to EvalSet
        By name.
    digits : int, default 5
        Decimal places.

    Returns
    -------
    dict
        Set -> metric -> {"mean", "std"}, and "mean" -> the headline number's {"mean", "std",
        "sets"}. std is the sample standard deviation (n - 1), 0 for one seed.

    Examples
    --------
    >>> from mclip import evaluate
    >>> from mclip.params import EvalSet
    >>> seeds = [{"pets": {"top1": 0.5}}, {"pets": {"top1": 0.7}}]
    >>> evaluate.summary(seeds, {"pets": EvalSet(path="b")})["pets"]
    {'top1': {'mean': 0.6, 'std': 0.14142}}
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
    """Write the metrics of a recipe's seeds as files.

    FOLDER/RECIPE.json has {recipe: summary}, for DVC; FOLDER/RECIPE.csv has every seed's numbers
    and chance; FOLDER/items/RECIPE.parquet has each picture's share of the main metrics.

    Parameters
    ----------
    recipe : str
        Name of the files.
    result : Result
        Of `evaluate_many`, one model a seed.
    sets : mapping of str to EvalSet
        By name.
    seeds : sequence of int
        In the order of the models.
    folder : path, default "reports/metrics"
        Where the files go.

    See Also
    --------
    summary : What the JSON file holds.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from mclip import evaluate
    >>> from mclip.params import EvalSet
    >>> empty = dict.fromkeys(evaluate.Result._fields, {})
    >>> scores = {"metrics": [{"pets": {"top1": 0.5}}], "chance": {"pets": {"top1": 0.03}}}
    >>> folder = tempfile.mkdtemp()
    >>> result, sets = evaluate.Result(**empty | scores), {"pets": EvalSet(path="b")}
    >>> evaluate.write("clip", result, sets, [0], folder)
    >>> print(Path(folder, "clip.csv").read_text().strip())
    recipe,set,kind,task,metric,seed,value,chance,main
    clip,pets,,classification,top1,0,0.5,0.03,top1
    """
    write_all(recipe, {recipe: result.metrics}, {recipe: seeds}, result.chance, sets, folder)
    write_items(recipe, {recipe: result.items}, {recipe: seeds}, folder)


def write_all(
    name: str,
    found: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]],
    seeds: Mapping[str, Sequence[int]],
    chance: Mapping[str, Mapping[str, float]],
    sets: Mapping[str, EvalSet],
    folder: str | Path = "reports/metrics",
) -> pd.DataFrame:
    """Write FOLDER/NAME.json, {recipe: summary}, and FOLDER/NAME.csv with every seed and chance.

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
    """Sort the gallery by its similarity to each test picture.

    Parameters
    ----------
    result : Result
        Of `evaluate_many`.
    name : str
        One of its sets.
    model : int, default 0
        Which of its models.

    Returns
    -------
    ndarray of int64, shape (n, m)
        For each picture the rows of `result.gallery[name]`, the nearest first.

    Examples
    --------
    >>> import torch
    >>> from mclip import evaluate
    >>> empty = dict.fromkeys(evaluate.Result._fields, {})
    >>> features = {"images": {"pets": [torch.eye(2)]}, "texts": {"pets": [torch.eye(2)]}}
    >>> evaluate.predictions(evaluate.Result(**empty | features), "pets").tolist()
    [[0, 1], [1, 0]]
    """
    similarity = result.images[name][model] @ result.texts[name][model].T
    return similarity.argsort(dim=1, descending=True, stable=True).numpy()
