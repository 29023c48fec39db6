"""Numbers as figures: lines, bars, points, cells, histograms, radars."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mclip.report.plots.theme import COLOURS, INK, MUTED, WIDTH, palette


def curves(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    hue: str | None = None,
    title: str,
    xlabel: str,
    ylabel: str,
    ax: Axes | None = None,
    labels: dict[str, str] | None = None,
    **options: Any,
) -> Axes:
    """Lines of the mean over rows that share x and hue (the seeds), with a band of one standard
    deviation.
    """
    ax = ax or plt.subplots()[1]
    if hue is not None:
        order = list(dict.fromkeys(frame[hue].astype(str)))
        options = {"hue": hue, "hue_order": order, "palette": palette(order), **options}
    sns.lineplot(
        frame, x=x, y=y, errorbar="sd", err_kws={"alpha": 0.18, "linewidth": 0}, ax=ax, **options
    )
    _finish(ax, title, xlabel, ylabel, hue is not None, labels)
    return ax


def bars(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    hue: str | None = None,
    title: str,
    ylabel: str,
    xlabel: str = "",
    chance: dict[str, float] | None = None,
    ceiling: dict[str, float] | None = None,
    ceiling_label: str = "teacher",
    ax: Axes | None = None,
    labels: dict[str, str] | None = None,
) -> Axes:
    """Bars of the mean with one standard deviation and every row (seed) as a point.

    `chance`, `ceiling`: a value per category of x, drawn as a dotted and a solid line across its
    group.
    """
    ax = ax or plt.subplots()[1]
    order = list(dict.fromkeys(frame[x].astype(str)))
    hues = list(dict.fromkeys(frame[hue].astype(str))) if hue else order
    common = {"x": x, "y": y, "hue": hue or x, "order": order, "hue_order": hues, "ax": ax}
    sns.barplot(
        frame,
        palette=palette(hues),
        saturation=0.95,
        errorbar="sd",
        legend=bool(hue),
        capsize=0.25,
        err_kws={"linewidth": 1.1, "color": INK},
        width=0.8,
        **common,
    )
    if frame.groupby([x, hue] if hue else [x]).size().max() > 1:
        sns.stripplot(
            frame,
            palette=dict.fromkeys(hues, "white"),
            dodge=bool(hue),
            jitter=False,
            size=4,
            linewidth=0.8,
            edgecolor=INK,
            legend=False,
            **common,
        )
    for values, line, name in ((chance, ":", "chance"), (ceiling, "-", ceiling_label)):
        for i, category in enumerate(order):
            if values and category in values:
                ax.hlines(
                    values[category],
                    i - 0.46,
                    i + 0.46,
                    colors=INK,
                    linestyles=line,  # type: ignore[arg-type]
                    linewidth=1.3,
                    label=name,
                    zorder=5,
                )
    _finish(ax, title, xlabel, ylabel, bool(hue or chance or ceiling), labels)
    return ax


def tradeoff(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    hue: str,
    title: str,
    xlabel: str,
    ylabel: str,
    ax: Axes | None = None,
    labels: dict[str, str] | None = None,
    legend: bool = True,
) -> Axes:
    """What is gained against what it costs: each hue's mean, one standard deviation as a bar, its
    rows as dots.
    """
    ax = ax or plt.subplots()[1]
    names = list(dict.fromkeys(frame[hue].astype(str)))
    for name, colour in palette(names).items():
        rows = frame[frame[hue] == name]
        if len(rows) > 1:
            ax.scatter(
                rows[x], rows[y], s=14, color="white", edgecolor=colour, linewidth=0.9, zorder=4
            )
        spread = rows[y].std() if len(rows) > 1 else 0.0
        ax.errorbar(
            rows[x].mean(),
            rows[y].mean(),
            yerr=spread,
            fmt="o",
            markersize=8,
            capsize=3,
            color=colour,
            label=name,
            zorder=3,
        )
    ax.margins(x=0.1, y=0.15)
    ax.set_xlim(left=0)
    _finish(ax, title, xlabel, ylabel, legend, labels)
    return ax


def estimates(
    frame: pd.DataFrame,
    points: pd.DataFrame,
    *,
    y: str,
    title: str,
    xlabel: str,
    ax: Axes | None = None,
    labels: dict[str, str] | None = None,
) -> Axes:
    """Differences with their intervals, one a row, the first on top, and a line at 0.

    `frame`: columns y, mean, low, high (an infinite interval is not drawn); `points`: columns y,
    value, the seeds.
    """
    ax = ax or plt.subplots()[1]
    names = list(dict.fromkeys(frame[y].astype(str)))
    for row in frame.itertuples():
        name, at = str(getattr(row, y)), names.index(str(getattr(row, y)))
        width = [[row.mean - row.low], [row.high - row.mean]] if math.isfinite(row.low) else None
        ax.errorbar(
            row.mean,
            at,
            xerr=width,
            fmt="o",
            markersize=6,
            capsize=3,
            color=COLOURS["clip-cid"],
            zorder=3,
        )
        own = points.loc[points[y] == name, "value"]
        ax.scatter(
            own, [at] * len(own), s=14, color="white", edgecolor=INK, linewidth=0.8, zorder=4
        )
    ax.axvline(0, color=MUTED, linestyle=":", linewidth=1.2)
    ax.set_yticks(range(len(names)), [(labels or {}).get(name, name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    _finish(ax, title, xlabel, "", False)
    return ax


def differences(
    panels: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]],
    *,
    title: str,
    labels: dict[str, str] | None = None,
) -> Figure:
    """A panel of `estimates` a set, side by side: set -> (frame, points), both with a column
    recipe; percent points.
    """
    rows = max(frame["recipe"].nunique() for frame, _ in panels.values())
    fig, axes = plt.subplots(
        1, len(panels), figsize=(WIDTH, 1.4 + 0.42 * rows), sharey=True, squeeze=False
    )
    for ax, (name, (frame, points)) in zip(axes[0], panels.items(), strict=True):
        estimates(
            frame, points, y="recipe", title=name, xlabel="difference, points", ax=ax, labels=labels
        )
    fig.suptitle(title, x=0.01, ha="left")
    return fig


def heatmap(
    matrix: np.ndarray | pd.DataFrame,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    title: str,
    xlabel: str,
    ylabel: str,
    unit: str,
    fmt: str = ".0f",
    annotate: bool | None = None,
    ax: Axes | None = None,
    **options: Any,
) -> Axes:
    """A matrix as coloured cells with their numbers (up to 15 columns, or as `annotate` says)."""
    frame = (
        matrix
        if isinstance(matrix, pd.DataFrame)
        else pd.DataFrame(matrix, index=rows, columns=columns)
    )
    annotate = frame.shape[1] <= 15 if annotate is None else annotate
    if ax is None:
        ax = plt.subplots(figsize=(WIDTH, min(8.5, 1.6 + 0.42 * len(frame))))[1]
    sns.heatmap(
        frame,
        ax=ax,
        cmap=options.pop("cmap", "crest"),
        annot=annotate,
        fmt=fmt,
        linewidths=0.5,
        annot_kws={"fontsize": 8},
        cbar_kws={"label": unit},
        **options,
    )
    ax.tick_params(axis="y", rotation=0)
    if max(len(str(name)) for name in frame.columns) > 5:
        ax.tick_params(axis="x", rotation=40)
        plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    _finish(ax, title, xlabel, ylabel, False)
    return ax


def radar(
    frame: pd.DataFrame,
    *,
    axis: str,
    y: str,
    hue: str,
    outer: dict[str, float],
    title: str,
    unit: str = "%",
    labels: dict[str, str] | None = None,
) -> Axes:
    """Each hue's mean over its rows as a polygon, an axis a category, scaled to its own outer ring.

    outer : the value of the ring on each axis, written beside it (the best teacher's, say); its
        keys are the axes,
    three or more. A band is one standard deviation over the rows (the seeds).
    """
    names = list(outer)
    if len(names) < 3:
        raise ValueError(f"a radar has three axes or more, here {len(names)}")
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    ax: Any = plt.subplots(figsize=(WIDTH, 5.4), subplot_kw={"projection": "polar"})[1]
    ax.set_theta_zero_location("N")
    ax.set_theta_direction(-1)
    closed = [*angles, angles[0]]
    groups = frame.groupby([hue, axis])[y].agg(["mean", "std"]).fillna(0.0)
    order = list(dict.fromkeys(frame[hue].astype(str)))
    for name, colour in palette(order).items():
        there = [(name, a) in groups.index for a in names]
        if not all(there):
            continue
        of = (
            groups.loc[[(name, a) for a in names]].to_numpy()
            / np.array(list(outer.values()))[:, None]
        )
        middle, spread = np.vstack([of, of[:1]]).T
        ax.plot(closed, middle, color=colour, label=name, marker="o", markersize=3.5)
        ax.fill_between(
            closed,
            np.maximum(middle - spread, 0),
            middle + spread,
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
    ax.set_xticks(
        angles, [f"{name}\n{value:.1f} {unit}" for name, value in outer.items()], fontsize=8.5
    )
    ax.set_yticks([0.25, 0.5, 0.75, 1.0], [])
    ax.set_ylim(0, max(1.0, ax.get_ylim()[1]))
    for text, angle in zip(ax.get_xticklabels(), angles, strict=True):  # away from the ring
        text.set_horizontalalignment(
            "center" if abs(np.sin(angle)) < 0.1 else "left" if np.sin(angle) > 0 else "right"
        )
    ax.spines["polar"].set_color(MUTED)
    _finish(ax, title, "", "", True, labels)
    return ax


def _finish(
    ax: Axes,
    title: str,
    xlabel: str,
    ylabel: str,
    legend: bool,
    labels: dict[str, str] | None = None,
):
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if legend:
        handles, names = ax.get_legend_handles_labels()
        unique = dict(
            zip(names, handles, strict=True)
        )  # one entry a name: chance and ceiling repeat
        # Under the axes: no line is ever hidden by its legend.
        ax.legend(
            unique.values(),
            [str((labels or {}).get(n, n)) for n in unique],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=min(6, len(unique)),
        )
