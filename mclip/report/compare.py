"""Compare recipes: the metrics of all stages as one table, and which differences exceed the noise.

frame, _ = metrics.read_seeds(["clip", "combined"])     # mclip.data.stores.metrics
compare.verdicts(compare.main_metric(frame), baseline="clip")
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from mclip.params import EvalSet
from mclip.params.registry import IN_DOMAIN
from mclip.system.files import write_json

HELD_OUT = "held-out mean"


class Row(NamedTuple):
    """The main metric of one recipe, teacher or of chance on one set, as a fraction."""

    group: str  # "recipe", "teacher", "chance"
    name: str
    set: str
    kind: str
    mean: float
    std: float | None


def main_metric(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a recipe, set and seed with its main metric (params.EvalSet.metric).

    The held-out mean comes first: over the sets of a kind other than "in domain" (over all sets if
    there is none).
    """
    main = frame[frame["metric"] == frame["main"]].astype({"kind": object}).fillna({"kind": ""})
    held_out = main[main["kind"] != IN_DOMAIN]
    held_out = held_out if len(held_out) else main
    mean = held_out.groupby(["recipe", "seed"], sort=False, as_index=False)[
        ["value", "chance"]
    ].mean()
    return pd.concat([mean.assign(set=HELD_OUT, kind=""), main], ignore_index=True)[
        ["recipe", "set", "kind", "seed", "value", "chance"]
    ]


def representative(sets: Mapping[str, EvalSet]) -> dict[str, str]:
    """The two sets that stand for all, and what to call them: the first in domain, the first
    held-out one of another task.

    Where there is none of a kind, the first set of any. Of sets that are here; of all where none
    is.
    """
    names = [name for name in sets if Path(sets[name].path).is_dir()] or list(sets)
    seen = next((n for n in names if sets[n].kind == IN_DOMAIN), names[0])
    held_out = [n for n in names if sets[n].kind != IN_DOMAIN and n != seen]
    other = (n for n in held_out if sets[n].task != sets[seen].task)
    unseen = next(other, (held_out or [seen])[0])
    return {
        name: f"{name} ({sets[name].kind})" if sets[name].kind else name for name in (seen, unseen)
    }


def spreads(main: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """A row a recipe, a column a set: "mean ± standard deviation" over the seeds, %; "–" where it
    was not run.
    """
    found = (
        main.assign(value=100 * main["value"])
        .groupby(["recipe", "set"])["value"]
        .agg(["mean", "std"])
    )
    kinds = main.drop_duplicates("set").set_index("set")["kind"].fillna("").to_dict()

    def show(recipe: str, name: str) -> str:
        if (recipe, name) not in found.index:
            return "–"
        mean, std = found.loc[(recipe, name)]
        return f"{mean:.1f}" if math.isnan(std) else f"{mean:.1f} ± {std:.1f}"

    return pd.DataFrame(
        [[show(recipe, name) for name in kinds] for recipe in titles],
        index=pd.Index(titles.values(), name="recipe"),
        columns=[f"{name} ({kind})" if kind else name for name, kind in kinds.items()],
    )


def verdicts(main: pd.DataFrame, baseline: str, level: float = 0.95) -> pd.DataFrame:
    """Each recipe's difference to the baseline on each set, its Welch interval, and what that
    allows to say.

    Welch's t interval of the difference of two means with unequal variances over the seeds:
    "better" and "worse" where the interval leaves out 0, else "within noise". Columns: recipe,
    set, kind, difference, low, high, verdict.
    """
    rows = []
    for (name, kind), group in main.groupby(["set", "kind"], sort=False, dropna=False):
        base = group.loc[group["recipe"] == baseline, "value"]
        for recipe in [r for r in dict.fromkeys(group["recipe"]) if r != baseline]:
            values = group.loc[group["recipe"] == recipe, "value"]
            difference = values.mean() - base.mean()
            low, high = welch(values, base, level)
            verdict = "better" if low > 0 else "worse" if high < 0 else "within noise"
            rows.append((recipe, name, kind, difference, low, high, verdict))
    return pd.DataFrame(
        rows, columns=["recipe", "set", "kind", "difference", "low", "high", "verdict"]
    )


def welch(a: pd.Series, b: pd.Series, level: float = 0.95) -> tuple[float, float]:
    """Welch's interval of mean(a) - mean(b); unbounded with fewer than two values a side."""
    if len(a) < 2 or len(b) < 2:
        return -math.inf, math.inf
    if a.var() == b.var() == 0:
        return (float(a.mean() - b.mean()),) * 2
    from scipy import stats  # slow to import

    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    return float(interval.low), float(interval.high)


def main_rows(metrics: Mapping[str, Mapping[str, Any]], sets: Mapping[str, EvalSet]) -> list[Row]:
    """What `read_metrics` found, cut to each set's main metric and the held-out mean."""
    rows = []
    for group, named in metrics.items():
        for name, tree in named.items():
            own: list[Row] = []
            for set_name, spec in sets.items():
                if leaf := _leaf(tree.get(set_name, {}).get(spec.metric)):
                    own.append(Row(group, name, set_name, spec.kind, *leaf))
            held_out = [r for r in own if r.kind != IN_DOMAIN] or own
            if held_out:
                std = (_leaf(tree.get("mean")) or (0, None))[1]
                rows.append(
                    Row(
                        group,
                        name,
                        HELD_OUT,
                        "",
                        sum(r.mean for r in held_out) / len(held_out),
                        std,
                    )
                )
            rows += own
    return rows


def write_headlines(rows: Iterable[Row], folder: str | Path = "reports/headline") -> None:
    """FOLDER/NAME.json of each recipe or teacher: what `dvc metrics` and `dvc exp` show.

    Every file has the same few keys, so that DVC's tables have a row a recipe or teacher: "held-out
    mean" and its standard deviation over the seeds, then the main metric of each set, percent.
    """
    trees: dict[str, dict[str, float]] = {}
    for row in rows:
        tree = trees.setdefault(row.name, {})
        tree[row.set] = round(100 * row.mean, 2)
        if row.set == HELD_OUT and row.std is not None:
            tree["held-out std"] = round(100 * row.std, 2)
    for name, tree in trees.items():
        write_json(Path(folder) / f"{name}.json", tree)


def chance_rows(frame: pd.DataFrame) -> list[Row]:
    """What guessing scores on each set, from `read_seeds`' table."""
    if not len(frame):
        return []
    first = main_metric(frame).drop_duplicates("set")
    return [Row("chance", "chance", r.set, r.kind, r.chance, None) for r in first.itertuples()]


def _leaf(value: Any) -> tuple[float, float | None] | None:
    if isinstance(value, Mapping):
        return (float(value["mean"]), value.get("std")) if "mean" in value else None
    return (float(value), None) if isinstance(value, int | float) else None
