"""Read the metrics of reports/metrics, which `mclip.evaluate.scores` writes.

RECIPE.json has the mean and the deviation over the seeds, for `dvc metrics`; RECIPE.csv has every
seed, in COLUMNS; items/RECIPE.parquet has every test picture, in ITEMS.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mclip.system.files import write_whole

# main: the metric that stands for the set
COLUMNS = ["recipe", "set", "kind", "task", "metric", "seed", "value", "chance", "main"]
# picture: its key; value: its share of the set's main metric, which is the mean of the values
ITEMS = ["recipe", "set", "seed", "picture", "value"]


def read_metrics(folder: str | Path = "reports/metrics") -> dict[str, dict[str, Any]]:
    """{"recipe" | "teacher": {name: {set: {metric: number or {"mean", "std"}}}}} of every JSON file
    in a folder.
    """
    out: dict[str, dict[str, Any]] = {"recipe": {}, "teacher": {}}
    for path in sorted(Path(folder).glob("*.json")):
        tree = json.loads(path.read_text())
        if path.stem == "teachers":
            out["teacher"] |= tree.get("teachers", tree)
        else:
            out["recipe"] |= {name: sets for name, sets in tree.items() if isinstance(sets, dict)}
    return out


def read_seeds(
    recipes: Iterable[str], folder: str | Path = "reports/metrics"
) -> tuple[pd.DataFrame, list[str]]:
    """Every seed's metrics (columns COLUMNS) of reports/metrics/RECIPE.csv, and what is missing, a
    line each.
    """
    frames, missing = [], []
    for recipe in recipes:
        path = Path(folder) / f"{recipe}.csv"
        if path.exists():
            frames.append(pd.read_csv(path))
        else:
            missing.append(f"{path} is missing: run `dvc repro evaluate@{recipe}` first")
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(
        columns=COLUMNS
    ), missing


def write_items(
    name: str,
    items: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]],
    seeds: Mapping[str, Sequence[int]],
    folder: str | Path = "reports/metrics",
) -> None:
    """Write FOLDER/items/NAME.parquet, each test picture's share of the main metrics.

    Parameters
    ----------
    name : str
        Of a recipe or a study.
    items : mapping
        Recipe, or variant of one -> for each of its seeds: set -> picture -> share.
    seeds : mapping
        Recipe, or variant of one -> its seeds.
    folder : path, default "reports/metrics"
        Of the metrics.

    Examples
    --------
    >>> import tempfile
    >>> from mclip.data.stores import metrics
    >>> folder = tempfile.mkdtemp()
    >>> metrics.write_items("clip", {"clip": [{"pets": {"a": 1.0}}]}, {"clip": [0]}, folder)
    >>> metrics.read_items(["clip"], folder).values.tolist()
    [['clip', 'pets', 0, 'a', 1.0]]
    """
    rows = [
        (recipe, key, seed, picture, value)
        for recipe, each in items.items()
        for seed, sets in zip(seeds[recipe], each, strict=bool(each))
        for key, pictures in sets.items()
        for picture, value in pictures.items()
    ]
    table = pd.DataFrame(rows, columns=ITEMS).astype(
        {"recipe": "category", "set": "category", "picture": "category", "value": "float32"}
    )
    table.to_parquet(buffer := io.BytesIO(), index=False, compression="zstd")
    write_whole(Path(folder) / "items" / f"{name}.parquet", buffer.getvalue())


def read_items(names: Iterable[str], folder: str | Path = "reports/metrics") -> pd.DataFrame:
    """Read FOLDER/items/NAME.parquet of recipes or studies, in columns ITEMS; without the files
    that are missing.
    """
    paths = [Path(folder) / "items" / f"{name}.parquet" for name in names]
    frames = [
        pd.read_parquet(path).astype({"recipe": str, "set": str, "picture": str, "value": float})
        for path in paths
        if path.exists()
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=ITEMS)
