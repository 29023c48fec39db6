"""Does what a paper says hold here? Differences between variants with few seeds.

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
