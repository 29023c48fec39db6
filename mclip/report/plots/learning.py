"""Accuracy over a quantity: samples seen (a panel a set), or what is stored (a panel a kind)."""

import itertools
import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from mclip.report.plots.charts import curves
from mclip.report.plots.theme import COLOURS, MUTED, SPARE, WIDTH


def learning(
    main: pd.DataFrame, level: pd.DataFrame, *, title: str, labels: Mapping[str, str]
) -> Figure:
    """Mean and one standard deviation over the seeds of each recipe; samples on a logarithmic axis.

    Parameters
    ----------
    main : columns recipe, samples, set, value (a fraction).
    level : rows of the same columns, of one recipe: their mean over the seeds is a dotted line
        across the panel.
    labels : recipe -> what to call it.
    """
    names = list(dict.fromkeys(main["set"]))
    across = level.groupby("set")["value"].mean()
    colour = COLOURS.get(
        next(iter(level["recipe"]), "").partition(" ")[0], MUTED
    )  # "clip on all pairs" is CLIP's
    rows = -(-len(names) // 2)
    fig, axes = plt.subplots(rows, 2, figsize=(WIDTH, 3.1 * rows), squeeze=False)
    handles, shown = [], []
    for ax, name in zip(axes.flat, names, strict=False):
        own = main[main["set"] == name].assign(percent=lambda f: 100 * f["value"])
        curves(
            own,
            x="samples",
            y="percent",
            hue="recipe",
            title=name,
            xlabel="samples seen",
            ylabel="%",
            ax=ax,
            marker="o",
        )
        if name in across:
            ax.axhline(100 * across[name], color=colour, linestyle=":", linewidth=1.2)
        ax.set_xscale("log")
        ticks = sorted(own["samples"].unique())
        ax.set_xticks(ticks, [f"{tick / 1000:.3g}k" for tick in ticks])
        ax.minorticks_off()
        handles, shown = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    for ax in list(axes.flat)[len(names) :]:
        ax.axis("off")
    fig.legend(
        handles,
        [labels.get(name, name) for name in shown],
        loc="outside lower center",
        ncols=len(shown),
    )
    fig.suptitle(title, x=0.01, ha="left")
    return fig


def amounts(frame: pd.DataFrame, *, title: str, ylabel: str) -> Figure:
    """Differences to the largest number of each kind, with their intervals; the numbers are evenly
    spread.

    frame : columns what (a panel each), number, set (a line each), mean, low, high; an infinite
        interval is not drawn.
    """
    kinds, sets = (list(dict.fromkeys(frame[column])) for column in ("what", "set"))
    looks = zip(
        sets, itertools.cycle([*SPARE[:2], *SPARE[5:]]), itertools.cycle("osD^")
    )  # easily told apart
    styles = {name: {"color": colour, "marker": marker} for name, colour, marker in looks}
    fig, axes = plt.subplots(1, len(kinds), figsize=(WIDTH, 3.8), sharey=True, squeeze=False)
    for ax, what in zip(axes[0], kinds, strict=True):
        ticks = sorted(frame.loc[frame["what"] == what, "number"].unique())
        for i, name in enumerate(sets):
            own = frame[(frame["what"] == what) & (frame["set"] == name)].sort_values("number")
            half = (own["high"] - own["mean"]).replace(math.inf, math.nan)
            at = [
                ticks.index(n) + 0.06 * (i - (len(sets) - 1) / 2) for n in own["number"]
            ]  # side by side, not over
            ax.errorbar(
                at, own["mean"], yerr=half, markersize=6, capsize=3, label=name, **styles[name]
            )
        ax.axhline(0, color=MUTED, linestyle=":", linewidth=1.2)
        ax.set_xticks(range(len(ticks)), ticks)
        ax.set_xlim(-0.3, len(ticks) - 0.7)
        ax.set_xlabel(f"{what} stored")
        ax.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel(ylabel)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sets))
    fig.suptitle(title, x=0.01, ha="left")
    return fig
