"""The look of every figure: one theme, one colour per recipe and teacher, and the few kinds notebooks draw.

    from mclip import plots
    plots.style()                                                   # once, at the head of a notebook
    plots.bars(frame, x="set", y="accuracy", hue="recipe", title="...", ylabel="top-1, %")
    plots.gallery(images, titles, title="Twelve pairs")

Figures are PNG of fixed size and resolution, so that the same numbers give the same bytes (error bars are
standard deviations, never bootstrapped). A figure's text form in the executed notebook is its title: the
picture's alternative text in the report.
"""

import contextlib
import html
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 8.0  # inches, of every figure, so that type has one size down a page
DPI = 150
INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"

# seaborn's "colorblind" palette, one fixed colour a name; other names get the spare ones in sorted order.
COLOURS = {
    "clip": "#8c8c8c",
    "clip-cid": "#0173b2",
    "mobileclip": "#de8f05",
    "combined": "#029e73",
    "small": "#e9bfe0",
    "base": "#cc78bc",
    "large": "#8b3a7c",
}
SPARE = ["#d55e00", "#56b4e9", "#ca9161", "#ece133", "#fbafe4", "#5b5ea6", "#7f6000", "#44aa99"]


def style() -> None:
    """Set the theme; in a notebook also: PNG output, and a figure's title as its text form."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=[COLOURS["clip-cid"], COLOURS["mobileclip"], COLOURS["combined"], *SPARE],
        rc={
            "figure.figsize": (WIDTH, 4.2),
            "figure.dpi": DPI,
            "savefig.dpi": DPI,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "font.family": "DejaVu Sans",  # ships with matplotlib: the same everywhere
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 10,
            "figure.titlesize": 11.5,
            "figure.titleweight": "bold",
            "axes.labelsize": 10,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "grid.color": GRID,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.8,
        },
    )
    with contextlib.suppress(ImportError):
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        shell = get_ipython()
        if shell is not None and hasattr(shell, "kernel"):
            set_matplotlib_formats("png")
            plt.uninstall_repl_displayhook()  # it would draw each figure once more, for windows that there are none of
            shell.display_formatter.formatters["text/plain"].for_type(
                Figure, lambda figure, printer, cycle: printer.text(f"Figure: {describe(figure)}")
            )


def describe(figure: Figure) -> str:
    """A figure in words: its title, or the titles of its axes."""
    title = figure.get_suptitle()
    titles = [title] if title else [t for ax in figure.axes for t in [ax.get_title("left") or ax.get_title()] if t]
    return " ".join("; ".join(titles or ["untitled"]).split())


def palette(names: Iterable[str]) -> dict[str, str]:
    """Each name's colour: the fixed one, else a spare one by sorted order."""
    names = list(dict.fromkeys(str(name) for name in names))
    spare = [name for name in sorted(names) if name not in COLOURS]
    extra = {name: SPARE[i % len(SPARE)] for i, name in enumerate(spare)}
    return {name: COLOURS.get(name) or extra[name] for name in names}


def wrap(text: str, width: int = 16, lines: int = 2) -> str:
    """A caption on at most `lines` lines of about `width` characters, shortened with an ellipsis."""
    text = text.replace("$", r"\$")  # no accidental formulas
    if "\n" in text:  # its own lines, each shortened
        return "\n".join(wrap(line, width, 1) for line in text.split("\n"))
    return textwrap.fill(text, width, max_lines=lines, placeholder=" …", break_long_words=True)


def gallery(
    images: Sequence[Any],
    titles: Sequence[str] | None = None,
    columns: int = 8,
    *,
    title: str,
    colours: Sequence[str] | None = None,
    lines: int = 2,
) -> Figure:
    """A contact sheet: PIL images or (h, w, 3) arrays, each with a short wrapped caption under it.

    `colours`: one colour a caption, say green for right and red for wrong.
    """
    count = len(images)
    columns = max(1, min(columns, count))
    rows = max(1, math.ceil(count / columns))
    side = WIDTH / max(columns, 4)
    wide = max(10, int(side * (13 if columns > 5 else 12)))
    figure, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        figsize=(WIDTH, rows * (side + (0.15 * lines if titles else 0.02)) + 0.4),
    )
    for i, ax in enumerate(axes.flat):
        ax.axis("off")
        if i < count:
            ax.imshow(np.asarray(images[i]), interpolation="nearest" if _small(images[i]) else "antialiased")
            if titles is not None:
                ax.text(
                    0.5,
                    -0.04,
                    wrap(titles[i], wide, lines),
                    transform=ax.transAxes,
                    ha="center",
                    va="top",
                    fontsize=7 if columns > 5 else 8,
                    fontweight="normal",
                    color=colours[i] if colours else INK,
                )
    figure.suptitle(title, x=0.01, ha="left")
    return figure


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
    """Lines of the mean over rows that share x and hue (the seeds), with a band of one standard deviation."""
    ax = ax or plt.subplots()[1]
    if hue is not None:
        order = list(dict.fromkeys(frame[hue].astype(str)))
        options = {"hue": hue, "hue_order": order, "palette": palette(order), **options}
    sns.lineplot(frame, x=x, y=y, errorbar="sd", err_kws={"alpha": 0.18, "linewidth": 0}, ax=ax, **options)
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

    `chance`, `ceiling`: a value per category of x, drawn as a dotted and a solid line across its group.
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
                    linestyles=line,
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
    """What is gained against what it costs: each hue's mean, one standard deviation as a bar, its rows as dots."""
    ax = ax or plt.subplots()[1]
    names = list(dict.fromkeys(frame[hue].astype(str)))
    for name, colour in palette(names).items():
        rows = frame[frame[hue] == name]
        if len(rows) > 1:
            ax.scatter(rows[x], rows[y], s=14, color="white", edgecolor=colour, linewidth=0.9, zorder=4)
        spread = rows[y].std() if len(rows) > 1 else 0.0
        ax.errorbar(rows[x].mean(), rows[y].mean(), yerr=spread, fmt="o", markersize=8, capsize=3, color=colour,
                    label=name, zorder=3)
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

    `frame`: columns y, mean, low, high (an infinite interval is not drawn); `points`: columns y, value, the seeds.
    """
    ax = ax or plt.subplots()[1]
    names = list(dict.fromkeys(frame[y].astype(str)))
    for row in frame.itertuples():
        name, at = str(getattr(row, y)), names.index(str(getattr(row, y)))
        width = [[row.mean - row.low], [row.high - row.mean]] if math.isfinite(row.low) else None
        ax.errorbar(row.mean, at, xerr=width, fmt="o", markersize=6, capsize=3, color=COLOURS["clip-cid"], zorder=3)
        own = points.loc[points[y] == name, "value"]
        ax.scatter(own, [at] * len(own), s=14, color="white", edgecolor=INK, linewidth=0.8, zorder=4)
    ax.axvline(0, color=MUTED, linestyle=":", linewidth=1.2)
    ax.set_yticks(range(len(names)), [(labels or {}).get(name, name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    _finish(ax, title, xlabel, "", False)
    return ax


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
    """A matrix as coloured cells with their numbers (up to 15 columns unless `annotate` says so)."""
    frame = matrix if isinstance(matrix, pd.DataFrame) else pd.DataFrame(matrix, index=rows, columns=columns)
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


def table(
    frame: pd.DataFrame,
    *,
    caption: str = "",
    digits: int = 1,
    formats: dict[str, Callable[[Any], str]] | None = None,
    best: Iterable[str] = (),
) -> None:
    """Show a data frame: numbers to the right, fixed digits; in columns `best` the highest is bold."""
    formats, best = dict(formats or {}), set(best)

    def show(column: str, value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        if column in formats:
            return formats[column](value)
        if isinstance(value, float | np.floating):
            return f"{value:.{digits}f}"
        return f"{value:,}" if isinstance(value, int | np.integer) and not isinstance(value, bool) else str(value)

    text = pd.DataFrame({c: [show(c, v) for v in frame[c]] for c in frame.columns}, index=frame.index)
    numeric = {c for c in frame.columns if pd.api.types.is_numeric_dtype(frame[c]) or c in formats}
    top = {c: set(np.flatnonzero(frame[c] == frame[c].max())) for c in best if len(frame)}
    index = [str(name) for name in frame.index] if not isinstance(frame.index, pd.RangeIndex) else None

    def align(column: str) -> str:
        return f'style="text-align: {"right" if column in numeric else "left"}"'

    def cell(row: int, column: str) -> str:
        value = html.escape(text[column].iloc[row])
        value = f"<strong>{value}</strong>" if row in top.get(column, ()) else value
        return f"<td {align(column)}>{value}</td>"

    names = [f'<th scope="col" {align(c)}>{html.escape(str(c))}</th>' for c in frame.columns]
    if index is not None:
        names.insert(0, f'<th scope="col" style="text-align: left">{html.escape(frame.index.name or "")}</th>')
    rows = []
    for row in range(len(frame)):
        cells = [cell(row, c) for c in frame.columns]
        if index is not None:
            cells.insert(0, f'<th scope="row" style="text-align: left">{html.escape(index[row])}</th>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = "<tbody>\n" + "\n".join(rows) + "\n</tbody>"
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    from IPython.display import display

    plain = text.to_string(index=index is not None)
    display(
        {
            "text/html": f"<table>{title}<thead><tr>{''.join(names)}</tr></thead>{body}</table>",
            "text/plain": f"{caption}\n{plain}" if caption else plain,
        },
        raw=True,
    )


def _small(image: Any) -> bool:
    return max(np.asarray(image).shape[:2]) <= 48


def _finish(ax: Axes, title: str, xlabel: str, ylabel: str, legend: bool, labels: dict[str, str] | None = None):
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if legend:
        handles, names = ax.get_legend_handles_labels()
        unique = dict(zip(names, handles, strict=True))  # one entry a name: chance and ceiling repeat
        # Under the axes: no line is ever hidden by its legend.
        ax.legend(
            unique.values(),
            [(labels or {}).get(n, n) for n in unique],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=min(6, len(unique)),
        )
