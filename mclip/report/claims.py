"""Does what a paper says hold here? Differences between variants with few seeds, and samples to the
same accuracy.

With two or three seeds a variant's own spread says little. But the runs of a seed start from the
same weights and, where they train on the same pairs, see them in the same order: a lucky seed is
lucky in all variants. So a value is taken to be the sum of what the variant does, what the seed
does, and a rest whose variance is the same for all variants (a randomised block design; least
squares, also where a variant lacks a seed). V variants with S seeds leave (V - 1)(S - 1) degrees of
freedom to the rest, and an interval is Student's t with them. Each interval stands for itself: they
are not widened for being several.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from mclip.report.compare import HELD_OUT

HOLDS, REVERSED, OPEN = "holds", "does not hold", "can't be told"
SIGNS = {"=": "", ">=": "≥\N{NO-BREAK SPACE}", "<": "<\N{NO-BREAK SPACE}"}  # of a factor in a table


class Claim(NamedTuple):
    """`better` is above `worse`, says the paper."""

    text: str
    better: str
    worse: str


class Fit(NamedTuple):
    """value = variant + seed + rest, of one set."""

    variants: list[str]
    effect: np.ndarray  # (V,)
    inverse: (
        np.ndarray
    )  # (V, V), of the normal equations: the variance of a contrast c is std^2 c' inverse c
    std: float  # of the rest; NaN where df is 0
    df: int

    def difference(self, a: str, b: str, level: float = 0.95) -> tuple[float, float]:
        """Variant a less variant b, and half the width of its interval (infinite where df is 0)."""
        return self.contrast({a: 1.0, b: -1.0} if a != b else {a: 0.0}, level)

    def contrast(self, weights: Mapping[str, float], level: float = 0.95) -> tuple[float, float]:
        """The weighted sum of variants (weights that sum to 0, so that the seeds cancel), and half
        its interval.
        """
        c = np.array([float(weights.get(v, 0.0)) for v in self.variants])
        if not c.any():
            return 0.0, 0.0
        if not self.df:
            return float(c @ self.effect), math.inf
        from scipy import stats  # slow to import

        width = stats.t.ppf((1 + level) / 2, self.df) * self.std * math.sqrt(c @ self.inverse @ c)
        return float(c @ self.effect), float(width)


def fit(values: pd.DataFrame) -> Fit:
    """values: columns recipe, seed, value, of one set."""
    variants, seeds = (list(dict.fromkeys(values[column])) for column in ("recipe", "seed"))
    design = np.array(
        [
            [row.recipe == v for v in variants] + [row.seed == s for s in seeds[1:]]
            for row in values.itertuples()
        ],
        float,
    )
    y = values["value"].to_numpy(float)
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    df = len(y) - int(rank)
    std = math.sqrt(float(((y - design @ solution) ** 2).sum()) / df) if df else math.nan
    n = len(variants)
    return Fit(variants, solution[:n], np.linalg.pinv(design.T @ design)[:n, :n], std, df)


def fits(main: pd.DataFrame) -> dict[str, Fit]:
    """The fit of each set; main: of compare.main_metric."""
    return {name: fit(values) for name, values in main.groupby("set", sort=False)}


def differences(main: pd.DataFrame, claims: Sequence[Claim], level: float = 0.95) -> pd.DataFrame:
    """Each claim on each set: columns claim, set, difference, half (of its interval), df, verdict;
    fractions.

    Claims about variants that were not run are left out.
    """
    rows, found = [], fits(main)
    for claim in claims:
        for name, own in found.items():
            if {claim.better, claim.worse} <= set(own.variants):
                gap, half = own.difference(claim.better, claim.worse, level)
                said = HOLDS if gap > half else REVERSED if gap < -half else OPEN
                rows.append((claim.text, name, gap, half, own.df, said))
    return pd.DataFrame(rows, columns=["claim", "set", "difference", "half", "df", "verdict"])


def interactions(
    main: pd.DataFrame, both: str, one: str, other: str, neither: str, level: float = 0.95
) -> pd.DataFrame:
    """Do two changes add up? A row a set, in points: what each does alone, their sum, what both do
    together, and the difference of the last two with half its interval; nothing where one of the
    four variants was not run.
    """
    rows = []
    for name, own in fits(main).items():
        if {both, one, other, neither} <= set(own.variants):
            alone = [100 * own.difference(each, neither)[0] for each in (one, other)]
            more, half = own.contrast({both: 1.0, one: -1.0, other: -1.0, neither: 1.0}, level)
            rows.append(
                (
                    name,
                    *alone,
                    sum(alone),
                    100 * own.difference(both, neither)[0],
                    100 * more,
                    100 * half,
                )
            )
    return pd.DataFrame(
        rows, columns=["set", one, other, "their sum", both, "more than the sum", "±"]
    ).set_index("set")


def percent(found: pd.DataFrame) -> pd.DataFrame:
    """`differences`, or some of their rows, to read: in points, with what was found."""
    return pd.DataFrame(
        {
            "claim": found["claim"],
            "set": found["set"],
            "difference, points": 100 * found["difference"],
            "±": 100 * found["half"],
            "verdict": found["verdict"],
        }
    ).reset_index(drop=True)


def against(
    main: pd.DataFrame, name: str, first: str, level: float = 0.95
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every variant less `first` on a set, in points: (recipe, mean, low, high), and each seed's:
    (recipe, value).
    """
    own, rows = main[main["set"] == name], []
    found = fit(own)
    for variant in found.variants:
        gap, half = found.difference(variant, first, level)
        rows.append((variant, 100 * gap, 100 * (gap - half), 100 * (gap + half)))
    base = own[own["recipe"] == first].set_index("seed")["value"]
    seeds = own.assign(value=100 * (own["value"] - own["seed"].map(base)))[
        ["recipe", "value"]
    ].dropna()
    return pd.DataFrame(rows, columns=["recipe", "mean", "low", "high"]), seeds


def verdict(
    found: pd.DataFrame, sets: Sequence[str] = (HELD_OUT,), what: str = "The paper's direction"
) -> str:
    """How many claims hold on some sets, and which of them can be told, in a sentence; found: of
    `differences`.
    """
    parts = []
    for name in sets:
        own = found[found["set"] == name]
        told = {
            said: [
                f"{r.claim}, {100 * r.difference:+.1f} ± {100 * r.half:.1f} points"
                for r in own.itertuples()
                if r.verdict == said
            ]
            for said in (HOLDS, REVERSED)
        }
        said = [
            f"{word} for {len(each)} ({'; '.join(each)})" for word, each in told.items() if each
        ]
        left = len(own) - sum(map(len, told.values()))
        if left:
            said.append(f"{OPEN} at this size for {left}")
        if len(own):
            parts.append(f"on {name} it {', '.join(said)}")
    if not parts:
        return "The variants that the paper compares were not run."
    count = found["claim"].nunique()
    return (
        f"{what}, in {count} comparison{'s' * (count > 1)} with 95 % intervals "
        f"({found['df'].iloc[0]} degrees of freedom): {'; '.join(parts)}."
    )


def table(
    main: pd.DataFrame,
    titles: Mapping[str, str],
    sets: Sequence[str],
    paper: Mapping[str, Mapping[str, float]] | None = None,
) -> pd.DataFrame:
    """A row a variant: its means, in percent, and the paper's numbers of it by column name, where
    there are any.
    """
    means = (100 * main.groupby(["recipe", "set"])["value"].mean()).unstack()
    out = pd.DataFrame({f"{name}, %": means[name].reindex(list(titles)) for name in sets})
    for column, numbers in (paper or {}).items():
        out[f"the paper's: {column}"] = [numbers.get(name, math.nan) for name in titles]
    return out.rename(index=titles).rename_axis("variant")


# --- learning efficiency ----------------------------------------------------------------------------------------


def samples_to(samples: Sequence[float], accuracy: Sequence[float], target: float) -> float:
    """Samples at which a learning curve first reaches an accuracy, between its points linear in
    log(samples).

    The number of its first point where that is above the target already, infinity where it never
    is.
    """
    x, y = np.log(np.asarray(samples, float)), np.asarray(accuracy, float)
    if y[0] >= target:
        return float(np.asarray(samples)[0])
    for i in range(1, len(x)):
        if y[i] >= target:
            return float(
                np.exp(x[i - 1] + (x[i] - x[i - 1]) * (target - y[i - 1]) / (y[i] - y[i - 1]))
            )
    return math.inf


def savings(main: pd.DataFrame, baseline: str, at_least: int) -> pd.DataFrame:
    """How many times fewer samples each recipe takes to the same accuracy: the baseline's at its
    longer runs, and the recipe's own at its longest.

    Parameters
    ----------
    main : columns recipe, samples, set, seed, value.
    at_least : samples from which on the baseline's runs are what others are held against.

    Returns
    -------
    columns recipe, set, whose (accuracy it is), reference (at how many samples), seeds (how
    many there are of it), accuracy, reached (samples at which the baseline first is there: fewer
    than its `reference` where its curve falls back), needed (the recipe's), factor (reached /
    needed), bound: "=" between two points; ">=" where the recipe's shortest run is above it already
    or no run of the baseline is (then `reached` is its longest); "<" the other way round.
    """
    groups = main.groupby(["set", "recipe", "samples"], sort=False)["value"]
    means = groups.agg(value="mean", seeds="size").reset_index()
    rows = []
    for name, own in means.groupby("set", sort=False):
        base = own[own["recipe"] == baseline].sort_values("samples")
        for recipe, curve in own[own["recipe"] != baseline].groupby("recipe", sort=False):
            curve = curve.sort_values("samples")
            for target in pd.concat(
                [base[base["samples"] >= at_least], curve.tail(1)]
            ).itertuples():
                reached, theirs = _first(base, target.value)
                needed, ours = _first(curve, target.value)
                of_base = (
                    target.recipe == baseline
                )  # whose shortest run is no bound to where it first is as good
                bound = "="
                if ours == "last" or (theirs == "first" and not of_base):
                    bound = "<"
                elif theirs == "last" or (ours == "first" and of_base):
                    bound = ">="
                rows.append(
                    (
                        recipe,
                        name,
                        target.recipe,
                        target.samples,
                        target.seeds,
                        target.value,
                        reached,
                        needed,
                        reached / needed,
                        bound,
                    )
                )
    return pd.DataFrame(
        rows,
        columns=[
            "recipe",
            "set",
            "whose",
            "reference",
            "seeds",
            "accuracy",
            "reached",
            "needed",
            "factor",
            "bound",
        ],
    )


def _first(curve: pd.DataFrame, target: float) -> tuple[float, str]:
    """`samples_to` of a learning curve, its longest run where it never is there; and which run that
    is a bound by: "first" where the shortest is there already, "last" where none is, "" between
    two.
    """
    at = samples_to(curve["samples"], curve["value"], target)
    if math.isinf(at):
        return float(curve["samples"].max()), "last"
    return at, "first" if curve["value"].iloc[0] >= target else ""


def saving(saved: pd.DataFrame, titles: Mapping[str, str], baseline: str, claimed: float) -> str:
    """What `savings` found in a sentence: factors at the first reference, and the largest of all
    against the claim.
    """
    of_base = saved[saved["whose"] == baseline]
    if not len(of_base):
        return f"No recipe but {titles[baseline]} was run for long enough."
    reference, base = of_base["reference"].min(), titles[baseline]
    said = []
    first = of_base[(of_base["reference"] == reference) & (of_base["set"] == HELD_OUT)]
    for recipe, own in first.groupby("recipe", sort=False):
        said.append(f"{titles[recipe]} {_factor(own.iloc[0])}")
    there = saved[saved["bound"] != "<"]
    if not len(there):
        return f"No recipe reaches {base}'s accuracy at {reference:,} samples on any set."
    best = there.loc[there["factor"].idxmax()]
    holds = "holds" if best["factor"] >= claimed else "does not hold at this size"
    seeds = f"{best['seeds']} seed{'s' if best['seeds'] > 1 else ''}"
    if best["whose"] == baseline:
        target = f"{base}'s accuracy at {best['reference']:,} samples ({seeds})"
    else:
        reaches = "does not reach" if best["bound"] == ">=" else "reaches"
        target = (
            f"its own accuracy at {best['reference']:,} samples ({seeds}), which {base} {reaches} with "
            f"{best['reached']:,.0f}"
        )
    return (
        f"To {base}'s {HELD_OUT} at {reference:,} samples, times fewer samples: {', '.join(said)}. The largest "
        f"on one set: {titles[best['recipe']]} {_factor(best)} on {best['set']}, to {target}; the paper's factor "
        f"of {claimed:g} {holds}."
    )


def savings_table(saved: pd.DataFrame, titles: Mapping[str, str], baseline: str) -> pd.DataFrame:
    """`savings` to read: accuracy in percent, whole samples."""
    return pd.DataFrame(
        {
            "set": saved["set"],
            "recipe": saved["recipe"].map(titles),
            "whose accuracy": saved["whose"].map(titles),
            "at samples": saved["reference"],
            "accuracy, %": 100 * saved["accuracy"],
            f"{titles[baseline]} reaches it at": saved["reached"].round().astype(int),
            "the recipe at": saved["needed"].round().astype(int),
            "factor": saved["bound"].map(SIGNS) + saved["factor"].map("{:.1f}".format),
        }
    )


def _factor(row) -> str:
    return {"=": "", ">=": "at least ", "<": "less than "}[row["bound"]] + f"{row['factor']:.1f}"
