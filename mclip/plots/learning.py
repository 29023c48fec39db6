"""Learning curves: accuracy over samples seen, a panel a set."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from mclip.plots.charts import curves
from mclip.plots.theme import COLOURS, WIDTH


def learning(main: pd.DataFrame, levels: Mapping[str, tuple[str, float]], *, title: str,
             labels: Mapping[str, str]) -> Figure:
    """Mean and one standard deviation over the seeds of each recipe; samples on a logarithmic axis.

    Parameters
    ----------
    main : columns recipe, samples, set, value (a fraction).
    levels : set -> (recipe whose colour it has, fraction), a dotted line across the panel.
    labels : recipe -> what to call it.
    """
    names = list(dict.fromkeys(main["set"]))
    rows = -(-len(names) // 2)
    fig, axes = plt.subplots(rows, 2, figsize=(WIDTH, 3.1 * rows), squeeze=False)
    handles, shown = [], []
    for ax, name in zip(axes.flat, names, strict=False):
        own = main[main["set"] == name].assign(percent=lambda f: 100 * f["value"])
        curves(own, x="samples", y="percent", hue="recipe", title=name, xlabel="samples seen", ylabel="%", ax=ax,
               marker="o")
        if name in levels:
            recipe, value = levels[name]
            ax.axhline(100 * value, color=COLOURS.get(recipe, COLOURS["clip"]), linestyle=":", linewidth=1.2)
        ax.set_xscale("log")
        ticks = sorted(own["samples"].unique())
        ax.set_xticks(ticks, [f"{tick / 1000:.3g}k" for tick in ticks])
        ax.minorticks_off()
        handles, shown = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    for ax in list(axes.flat)[len(names):]:
        ax.axis("off")
    fig.legend(handles, [labels.get(name, name) for name in shown], loc="outside lower center", ncols=len(shown))
    fig.suptitle(title, x=0.01, ha="left")
    return fig
