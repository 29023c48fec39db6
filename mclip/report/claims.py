"""Do a paper's claims hold here? Paired differences, with the noise of seeds and of test pictures.

    frame, _ = metrics.read_seeds(recipes)              # mclip.data.stores.metrics
    settled = claims.settle("recipes", frame, metrics.read_items(recipes), p.distill.claims)
    claims.answer(settled)

A claim says that `better` is above `worse` on an outcome. The difference is the mean over the seeds
of each seed's own difference. It is uncertain for two reasons, which are stated apart:

- seeds: another draw of seeds would give another mean. Student's standard error of the paired
  differences, sd / sqrt(S), with S - 1 degrees of freedom.
- items: the test pictures are a sample. Each concept adds its influence on the difference, summed
  over its pictures and over the sets that show it; the spread of these sums is the standard error.

The variances add up, with the degrees of freedom of Welch and Satterthwaite. Intervals cover 95 %,
each for itself; `adjusted` are p values after Holm's correction for the claims of a study, and the
verdict follows them. So an interval may leave out 0 where the verdict is "within noise".
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mclip.data.stores.metrics import read_items
from mclip.params.registry import IN_DOMAIN
from mclip.report.compare import HELD_OUT, main_metric
from mclip.system.files import write_json

HOLDS, REVERSED, OPEN = "holds", "reversed", "within noise"
COLUMNS = [
    "study",
    "claim",
    "outcome",
    "difference",
    "low",
    "high",
    "adjusted",
    "seeds",
    "paper",
    "verdict",
    "se_seeds",
    "se_items",
]
SIGNIFICANT = 0.05
POWER = 0.8


def settle(study: str, frame: pd.DataFrame, items: pd.DataFrame, claims: Sequence) -> pd.DataFrame:
    """Settle the claims of a study.

    Parameters
    ----------
    study : str
        Its name.
    frame : DataFrame
        Every seed's metrics, of `mclip.data.stores.metrics.read_seeds`; the column recipe holds
        the recipe or the variant.
    items : DataFrame
        Every picture's share of the metrics, of `mclip.data.stores.metrics.read_items`. Without
        those of a set, such as a linear probe's, only the seeds count.
    claims : sequence of mclip.params.sections.Claim
        Those about recipes that were not run are left out.

    Returns
    -------
    DataFrame
        A row a claim, COLUMNS: differences, intervals and standard errors in percentage points;
        `adjusted`, the two-sided p value after Holm; `seeds`, how many both recipes share. NaN
        where a single seed leaves the interval open.

    Examples
    --------
    >>> import pandas as pd
    >>> from mclip.data.stores.metrics import COLUMNS, ITEMS
    >>> from mclip.params.sections import Claim
    >>> from mclip.report import claims
    >>> rows = [
    ...     (name, "pets", "", "classification", "top1", seed, value, 0.1, "top1")
    ...     for name, values in {"a": [0.50, 0.52, 0.53], "b": [0.40, 0.41, 0.43]}.items()
    ...     for seed, value in enumerate(values)
    ... ]
    >>> frame, items = pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame(columns=ITEMS)
    >>> claim = Claim(claim="A is better than B", better="a", worse="b")
    >>> claims.settle("study", frame, items, [claim])["verdict"].tolist()
    ['holds']
    """
    rows = []
    for claim in claims:
        outcome, values = _outcome(frame, claim.outcome)
        paired = _paired(values, claim)
        if not len(paired):
            continue
        se_seeds = paired.std() / math.sqrt(len(paired))
        probe = not isinstance(claim.outcome, str)
        sets = [] if probe else list(dict.fromkeys(values.attrs["sets"]))
        se_items, clusters = _se_items(items, claim.better, claim.worse, sets, paired.index)
        low, high, p = _test(paired.mean(), se_seeds, len(paired), se_items, clusters)
        rows.append(
            (
                study,
                claim.claim,
                outcome,
                paired.mean(),
                low,
                high,
                p,
                len(paired),
                claim.paper,
                "",
                se_seeds,
                se_items,
            )
        )
    settled = pd.DataFrame(rows, columns=COLUMNS)
    settled["adjusted"] = holm(settled["adjusted"].to_numpy(float))
    settled["verdict"] = [
        OPEN if not row.adjusted < SIGNIFICANT else HOLDS if row.difference > 0 else REVERSED
        for row in settled.itertuples()
    ]
    return settled


def _paired(values: pd.DataFrame, claim: Any) -> pd.Series:
    """Each shared seed's difference, points; empty where a recipe was not run."""
    wide = values.pivot_table(index="seed", columns="recipe", values="value")
    if not {claim.better, claim.worse} <= set(wide.columns):
        return pd.Series(dtype=float)
    return 100 * (wide[claim.better] - wide[claim.worse]).dropna()


def settle_study(
    study: str, claims: Sequence, folder: str | Path = "reports/metrics/ablations"
) -> pd.DataFrame:
    """`settle` the claims of an ablation from its metrics in `folder`, and `write` them."""
    frame, items = pd.read_csv(Path(folder) / f"{study}.csv"), read_items([study], folder)
    settled = settle(study, frame, items, claims)
    write(study, settled)
    return settled


def _outcome(frame: pd.DataFrame, outcome: Any) -> tuple[str, pd.DataFrame]:
    """The name of an outcome and its values: recipe, seed, value; attrs: the sets it averages."""
    if not isinstance(outcome, str):
        values = frame[(frame["metric"] == "probe_top1") & (frame["set"] == outcome.probe)]
        return f"linear probe on {outcome.probe}", values
    main = main_metric(frame)
    values = main[main["set"] == outcome]
    sets = [outcome]
    if outcome == HELD_OUT:
        each = main[main["set"] != HELD_OUT]
        held_out = each[each["kind"] != IN_DOMAIN]
        sets = list((held_out if len(held_out) else each)["set"].unique())
    values.attrs["sets"] = sets
    return outcome, values


def concept(picture: str) -> str:
    """What a picture shows: the emoji's code points that end its key, else the key itself.

    Examples
    --------
    >>> from mclip.report import claims
    >>> claims.concept("openmoji-black-002a-20e3"), claims.concept("photo7")
    ('002a-20e3', 'photo7')
    """
    found = re.search(r"(?<=-)[0-9a-f]{4,6}(-[0-9a-f]{4,6})*$", picture)
    return found.group() if found else picture


def _se_items(
    items: pd.DataFrame, better: str, worse: str, sets: Sequence[str], seeds: Any
) -> tuple[float, int]:
    """The standard error from the pictures, points, and the number of concepts; 0 without items."""
    used = items[
        items["set"].isin(sets) & items["recipe"].isin([better, worse]) & items["seed"].isin(seeds)
    ]
    influence = []
    for _, own in used.groupby("set", sort=False):
        mean = own.groupby(["picture", "recipe"])["value"].mean().unstack()
        if {better, worse} <= set(mean.columns):
            gap = 100 * (mean[better] - mean[worse])
            influence.append((gap - gap.mean()) / len(gap) / len(sets))
    if not influence:
        return 0.0, 0
    each = pd.concat(influence)
    sums = each.groupby(each.index.map(concept)).sum()
    if len(sums) < 2:
        return 0.0, 0
    return math.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)), len(sums)


def _degrees(se_seeds: float, seeds: int, se_items: float, concepts: int) -> float:
    """Welch and Satterthwaite's degrees of freedom of the two standard errors together."""
    parts = se_seeds**4 / (seeds - 1) + (se_items**4 / (concepts - 1) if concepts > 1 else 0)
    return (se_seeds**2 + se_items**2) ** 2 / parts if parts else math.inf


def _test(
    difference: float, se_seeds: float, seeds: int, se_items: float, concepts: int
) -> tuple[float, float, float]:
    """The 95 % interval of a difference, and its two-sided p value; NaN with a single seed."""
    if seeds < 2:
        return math.nan, math.nan, math.nan
    from scipy import stats  # slow to import

    se = math.hypot(se_seeds, se_items)
    if not se:
        return difference, difference, float(difference == 0)
    df = _degrees(se_seeds, seeds, se_items, concepts)
    half = stats.t.ppf(0.975, df) * se
    return difference - half, difference + half, float(2 * stats.t.sf(abs(difference) / se, df))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values; NaN stays NaN and is counted.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.report import claims
    >>> claims.holm(np.array([0.03, 0.01, 0.04])).tolist()
    [0.06, 0.03, 0.06]
    """
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def power(
    sd_seeds: float, se_items: float, seeds: int, claims: int = 1, concepts: int = 500
) -> float:
    """The true difference that this design finds significant four times in five.

    Two-sided, at the first and strictest of Holm's steps.

    Parameters
    ----------
    sd_seeds : float
        Standard deviation of the paired differences over the seeds, points.
    se_items : float
        Standard error from the test pictures, points.
    seeds : int
        At least 2.
    claims : int, default 1
        How many are settled together.
    concepts : int, default 500
        How many the pictures show.

    Returns
    -------
    float
        Points.

    Examples
    --------
    >>> from mclip.report import claims
    >>> round(claims.power(0.5, 0.5, seeds=3, claims=5), 1)
    2.1
    """
    from scipy import stats  # slow to import

    se_seeds = sd_seeds / math.sqrt(seeds)
    df = _degrees(se_seeds, seeds, se_items, concepts)
    quantiles = stats.t.ppf([1 - SIGNIFICANT / claims / 2, POWER], df)
    return float(quantiles.sum() * math.hypot(se_seeds, se_items))


def seeds_needed(
    sd_seeds: float, se_items: float, difference: float = 1.5, claims: int = 1, most: int = 1000
) -> int | None:
    """The fewest seeds with which `power` reaches a difference; None where the pictures are too
    few, or more than `most` seeds are needed.

    Examples
    --------
    >>> from mclip.report import claims
    >>> claims.seeds_needed(0.8, 0.3), claims.seeds_needed(0.8, 0.6)
    (5, None)
    """
    needed = (n for n in range(2, most) if power(sd_seeds, se_items, n, claims) <= difference)
    return next(needed, None)


def answer(settled: pd.DataFrame) -> str:
    """Say in a sentence or two what `settle` found.

    Examples
    --------
    >>> import pandas as pd
    >>> from mclip.report import claims
    >>> values = ["s", "A is better than B", "pets", 2.1, 0.8, 3.4, 0.01, 3, "", "holds", 0.5, 0.2]
    >>> claims.answer(pd.DataFrame([values], columns=claims.COLUMNS))
    '1 of 1 claim holds: A is better than B (+2.1 points on pets, 95 % CI 0.8 to 3.4).'
    """
    if not len(settled):
        return "The variants that the paper compares were not run."
    parts: list[str] = []
    for verdict in (HOLDS, REVERSED, OPEN):
        each = [_sentence(row) for row in settled[settled["verdict"] == verdict].itertuples()]
        if not each:
            continue
        many = "s" if len(settled) > 1 else ""
        verb = {HOLDS: "holds" if len(each) == 1 else "hold", OPEN: OPEN, REVERSED: REVERSED}
        be = "" if verdict == HOLDS else "is " if len(each) == 1 else "are "
        count = f"{len(each)} of {len(settled)} claim{many}" if not parts else f"{len(each)}"
        parts.append(f"{count} {be}{verb[verdict]}: {'; '.join(each)}")
    return ". ".join(parts) + "."


def headline(settled: pd.DataFrame, seeds: int) -> str:
    """How many claims hold, and which true difference the design finds.

    Parameters
    ----------
    settled : DataFrame
        Of `settle`, of one study.
    seeds : int
        Of each recipe.

    Returns
    -------
    str
    """
    counts = settled["verdict"].value_counts()
    said = (
        f"{counts.get(HOLDS, 0)} of {len(settled)} claims hold here, "
        f"{counts.get(REVERSED, 0)} reversed, {counts.get(OPEN, 0)} within noise"
    )
    if seeds < 2 or not len(settled):
        return said + "."
    sd = math.sqrt((settled["se_seeds"] ** 2).mean() * seeds)
    items = math.sqrt((settled["se_items"] ** 2).mean())
    seen = power(sd, items, seeds, len(settled))
    needed = seeds_needed(sd, items, claims=len(settled))
    more = f"{needed} seeds" if needed else "more test pictures, not seeds alone,"
    return (
        f"{said}; at this size a true difference of {seen:.1f} points is seen four times in five "
        f"(for 1.5 points: {more} would be needed)."
    )


def _sentence(row: Any) -> str:
    if math.isnan(row.low):
        return f"{row.claim} ({row.difference:+.1f} points on {row.outcome}, a single seed)"
    interval = f"95 % CI {row.low:.1f} to {row.high:.1f}"
    return f"{row.claim} ({row.difference:+.1f} points on {row.outcome}, {interval})"


def write(study: str, settled: pd.DataFrame, folder: str | Path = "reports/claims") -> None:
    """Write FOLDER/STUDY.json: a list of `settle`'s rows, NaN as null."""
    write_json(Path(folder) / f"{study}.json", json.loads(settled.to_json(orient="records")))


def join(folder: str | Path = "reports/claims", out: str | Path = "reports/claims.json") -> list:
    """Join the claims of all studies in one file, and return them."""
    rows = [row for path in sorted(Path(folder).glob("*.json")) for row in read_json(path)]
    write_json(out, rows)
    return rows


def read_joined(
    studies: Collection[str], path: str | Path = "reports/claims.json"
) -> list[dict[str, Any]]:
    """What `join` wrote of some studies; an earlier run may have had others."""
    path = Path(path)
    return [row for row in (read_json(path) if path.exists() else []) if row["study"] in studies]


def read_json(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


# ---------------------------------------------------------------- pooled over the variants


class Claim(NamedTuple):
    """`better` is above `worse`, says the paper."""

    text: str
    better: str
    worse: str


class Fit(NamedTuple):
    """value = variant + seed + rest, of one set: a randomised block design, whose rest has the same
    variance for all variants. Least squares, also where a variant lacks a seed.
    """

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
    """How many claims hold on some sets, and which of them are significant, in a sentence.

    found: of `differences`.
    """
    parts = []
    for name in sets:
        own = found[found["set"] == name]
        significant = {
            said: [
                f"{r.claim}, {100 * r.difference:+.1f} ± {100 * r.half:.1f} points"
                for r in own.itertuples()
                if r.verdict == said
            ]
            for said in (HOLDS, REVERSED)
        }
        said = [
            f"{'is ' * (word == REVERSED)}{word} for {len(each)} ({'; '.join(each)})"
            for word, each in significant.items()
            if each
        ]
        left = len(own) - sum(map(len, significant.values()))
        if left:
            said.append(f"is {OPEN} for {left}")
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
