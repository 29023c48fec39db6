"""Does what a paper says hold here? Differences between variants with few seeds, and samples to the same accuracy.

With two or three seeds a variant's own spread says little. All variants of a study are the same student trained on as
many samples, so their seeds' variance is taken to be one and pooled: V variants with n_v seeds give sum(n_v - 1)
degrees of freedom, and a difference's interval is Student's t with them. Each interval stands for itself: they are not
widened for being several.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from .compare import HELD_OUT

HOLDS, REVERSED, OPEN = "holds", "does not hold", "can't be told"


class Claim(NamedTuple):
    """`better` is above `worse`, says the paper."""

    text: str
    better: str
    worse: str


def pooled(main: pd.DataFrame) -> pd.DataFrame:
    """Standard deviation over the seeds and its degrees of freedom, by set, over all variants together.

    main : of compare.main_metric. NaN with 0 degrees of freedom, where no variant has two seeds.
    """
    def spread(values: pd.DataFrame) -> pd.Series:
        own = values.groupby("recipe")["value"]
        df = int((own.size() - 1).sum())
        squares = float(((values["value"] - own.transform("mean")) ** 2).sum())
        return pd.Series({"std": math.sqrt(squares / df) if df else math.nan, "df": df})

    return main.groupby("set", sort=False)[["recipe", "value"]].apply(spread)


def half_width(std: float, df: int, n: int, m: int | None = None, level: float = 0.95) -> float:
    """Of the interval of a mean of n values, or of the difference of the means of n and m; infinite for df 0."""
    if not df:
        return math.inf
    from scipy import stats  # slow to import

    return float(stats.t.ppf((1 + level) / 2, df) * std * math.sqrt(1 / n + (1 / m if m else 0)))


def differences(main: pd.DataFrame, claims: Sequence[Claim], level: float = 0.95) -> pd.DataFrame:
    """Each claim on each set: columns claim, set, kind, difference, low, high, df, verdict; fractions.

    Claims about variants that were not run are left out.
    """
    spread, rows = pooled(main), []
    values = {key: group["value"] for key, group in main.groupby(["set", "recipe"])}
    for claim in claims:
        for name, kind in main[["set", "kind"]].drop_duplicates().itertuples(index=False):
            a, b = (values.get((name, v)) for v in (claim.better, claim.worse))
            if a is None or b is None:
                continue
            gap = a.mean() - b.mean()
            half = half_width(spread.loc[name, "std"], int(spread.loc[name, "df"]), len(a), len(b), level)
            said = HOLDS if gap > half else REVERSED if gap < -half else OPEN
            rows.append((claim.text, name, kind, gap, gap - half, gap + half, int(spread.loc[name, "df"]), said))
    columns = ["claim", "set", "kind", "difference", "low", "high", "df", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def intervals(main: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Mean of each variant on each set and its interval by the pooled spread: recipe, set, kind, mean, low, high."""
    spread, rows = pooled(main), []
    for (name, kind, variant), group in main.groupby(["set", "kind", "recipe"], sort=False):
        half = half_width(spread.loc[name, "std"], int(spread.loc[name, "df"]), len(group), level=level)
        mean = group["value"].mean()
        rows.append((variant, name, kind, mean, mean - half, mean + half))
    return pd.DataFrame(rows, columns=["recipe", "set", "kind", "mean", "low", "high"])


def verdict(found: pd.DataFrame, name: str = HELD_OUT) -> str:
    """All claims on one set in a sentence; found: of `differences`."""
    own = found[found["set"] == name]
    if not len(own):
        return "The variants that the paper compares were not run."
    count = own["verdict"].value_counts()
    said = [f"{r.claim}: {r.verdict} ({_points(r)})" for r in own.itertuples()]
    parts = [f"{text} {count[v]}" for v, text in ((HOLDS, "holds in"), (REVERSED, "is reversed in"),
                                                  (OPEN, "can't be told at this size in")) if v in count]
    return (f"On the {name} the paper's direction {', '.join(parts)} of {len(own)} comparisons "
            f"(95 % intervals, {own['df'].iloc[0]} degrees of freedom): {'; '.join(said)}.")


def _points(row) -> str:
    if not math.isfinite(row.low):
        return f"{100 * row.difference:+.1f} points, one seed"
    return f"{100 * row.difference:+.1f} points, {100 * row.low:+.1f} to {100 * row.high:+.1f}"


def table(main: pd.DataFrame, titles: Mapping[str, str], sets: Sequence[str],
          paper: Mapping[str, Mapping[str, float]] | None = None) -> pd.DataFrame:
    """A row a variant: its means, in percent, and the paper's numbers of it by column name, where there are any."""
    means = (100 * main.groupby(["recipe", "set"])["value"].mean()).unstack()
    out = pd.DataFrame({f"{name}, %": means[name].reindex(list(titles)) for name in sets})
    for column, numbers in (paper or {}).items():
        out[f"the paper's: {column}"] = [numbers.get(name, math.nan) for name in titles]
    return out.rename(index=titles).rename_axis("variant")


# --- learning efficiency ----------------------------------------------------------------------------------------


def samples_to(samples: Sequence[float], accuracy: Sequence[float], target: float) -> float:
    """Samples at which a learning curve first reaches an accuracy, between its points linear in log(samples).

    The number of its first point where that is above the target already, infinity where it never is.
    """
    x, y = np.log(np.asarray(samples, float)), np.asarray(accuracy, float)
    if y[0] >= target:
        return float(samples[0])
    for i in range(1, len(x)):
        if y[i] >= target:
            return float(np.exp(x[i - 1] + (x[i] - x[i - 1]) * (target - y[i - 1]) / (y[i] - y[i - 1])))
    return math.inf


def savings(main: pd.DataFrame, baseline: str, at_least: int) -> pd.DataFrame:
    """How many times fewer samples each recipe takes to the baseline's accuracy at its longer runs.

    Parameters
    ----------
    main : columns recipe, samples, set, seed, value.
    at_least : samples from which on the baseline's runs are what others are held against.

    Returns
    -------
    columns recipe, set, reference (the baseline's samples), accuracy, needed, factor, bound: "=" between two points,
    ">=" where the shortest run is above it already, "<" where no run reaches it (then `needed` is the longest).
    """
    means = main.groupby(["set", "recipe", "samples"], sort=False)["value"].mean().reset_index()
    rows = []
    for name, own in means.groupby("set", sort=False):
        long = own[(own["recipe"] == baseline) & (own["samples"] >= at_least)]
        for recipe, curve in own[own["recipe"] != baseline].groupby("recipe", sort=False):
            curve = curve.sort_values("samples")
            for reference, accuracy in zip(long["samples"], long["value"], strict=True):
                needed, bound = samples_to(curve["samples"], curve["value"], accuracy), "="
                if math.isinf(needed):
                    needed, bound = float(curve["samples"].max()), "<"
                elif curve["value"].iloc[0] >= accuracy:
                    bound = ">="
                rows.append((recipe, name, int(reference), accuracy, needed, reference / needed, bound))
    return pd.DataFrame(rows, columns=["recipe", "set", "reference", "accuracy", "needed", "factor", "bound"])


def saving(saved: pd.DataFrame, titles: Mapping[str, str], baseline: str, claimed: float) -> str:
    """What `savings` found in a sentence: factors at the first reference, and the largest of all against the claim."""
    if not len(saved):
        return f"No recipe but {titles[baseline]} was run for long enough."
    reference = saved["reference"].min()
    said = []
    first = saved[(saved["reference"] == reference) & (saved["set"] == HELD_OUT)]
    for recipe, own in first.groupby("recipe", sort=False):
        said.append(f"{titles[recipe]} {_factor(own.iloc[0])}")
    there = saved[saved["bound"] != "<"]
    if not len(there):
        return f"No recipe reaches {titles[baseline]}'s accuracy at {reference:,} samples on any set."
    best = there.loc[there["factor"].idxmax()]
    holds = "holds" if best["factor"] >= claimed else "does not hold at this size"
    return (f"To {titles[baseline]}'s accuracy at {reference:,} samples on the {HELD_OUT}, of {titles[baseline]}'s samples "
            f"are saved by a factor of: {', '.join(said)}. The largest on one set: {titles[best['recipe']]} "
            f"{_factor(best)} on {best['set']}, to {titles[baseline]}'s accuracy at {best['reference']:,} samples: a "
            f"factor of {claimed:g} on one set {holds}.")


def _factor(row) -> str:
    return {"=": "", ">=": "at least ", "<": "less than "}[row["bound"]] + f"{row['factor']:.1f}"
