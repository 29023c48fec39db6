"""Read the metrics of reports/metrics, which `mclip.evaluate.scores` writes.

RECIPE.json has the mean and the deviation over the seeds, for `dvc metrics`; RECIPE.csv has every
seed, in COLUMNS.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

# main: the metric that stands for the set
COLUMNS = ["recipe", "set", "kind", "task", "metric", "seed", "value", "chance", "main"]


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
