"""Learning efficiency: how many times fewer samples a recipe needs for the same accuracy."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from mclip.report.compare import HELD_OUT

SIGNS = {"=": "", ">=": "≥\N{NO-BREAK SPACE}", "<": "<\N{NO-BREAK SPACE}"}  # of a factor in a table


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
            f"its own accuracy at {best['reference']:,} samples ({seeds}), which {base} "
            f"{reaches} with {best['reached']:,.0f}"
        )
    return (
        f"To {base}'s {HELD_OUT} at {reference:,} samples, times fewer samples: "
        f"{', '.join(said)}. The largest on one set: {titles[best['recipe']]} {_factor(best)} "
        f"on {best['set']}, to {target}; the paper's factor of {claimed:g} {holds}."
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
