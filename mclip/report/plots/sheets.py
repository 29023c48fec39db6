"""Pictures in rows: contact sheets, maps beside their pictures, and results of a search."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mclip.report.plots.tables import table
from mclip.report.plots.theme import COLOURS, GRID, INK, WIDTH

RIGHT = COLOURS["combined"]


def wrap(text: str, width: int = 16, lines: int = 2) -> str:
    """A caption on at most `lines` lines of about `width` characters; an ellipsis if shortened."""
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
            ax.imshow(
                np.asarray(images[i]),
                interpolation="nearest" if _small(images[i]) else "antialiased",
            )
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


def captioned(
    pictures: Sequence[Any],
    true: Sequence[str],
    synthetic: Sequence[str],
    similarity: np.ndarray,
    *,
    title: str,
) -> None:
    """Pictures, numbered, and below them a table of their captions.

    Parameters
    ----------
    pictures : sequence of n PIL images
    true, synthetic : sequences of n str
    similarity : np.ndarray, shape (n, 2)
        Of the picture and its true, its synthetic caption.
    title : str
        Of the pictures and the table.
    """
    numbers = list(range(1, len(pictures) + 1))
    nearer = similarity[:, 1] >= similarity[:, 0]
    gallery(
        pictures,
        [str(number) for number in numbers],
        columns=10,
        lines=1,
        title=title,
        colours=["tab:green" if near else "black" for near in nearer],
    )
    frame = pd.DataFrame(
        {
            "true caption": true,
            "its similarity": similarity[:, 0],
            "synthetic caption": synthetic,
            "similarity": similarity[:, 1],
        },
        index=numbers,
    )
    table(frame, digits=2, caption=title)


def grid(
    rows: Sequence[Sequence[Any]],
    labels: Sequence[str],
    *,
    title: str,
    columns: Sequence[str] | None = None,
    limits: Sequence[tuple[float, float] | None] | None = None,
    cmap: str = "viridis",
) -> Figure:
    """The same things down a column, seen in as many ways as there are rows.

    rows : of PIL images, (h, w, 3) arrays in 0..1 or 0..255, or (h, w) maps, which `cmap` colours
        between the row's
    `limits` (None: the row's own extremes). labels: one a row, to its left. columns: a caption over
    each column.
    """
    count = max(len(row) for row in rows)
    side = WIDTH / (max(count, 5) + 1.1)
    figure, axes = plt.subplots(
        len(rows), count, squeeze=False, figsize=(WIDTH, len(rows) * side * 1.04 + 0.7)
    )
    for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
        flat = [np.asarray(cell) for cell in row]
        low, high = (limits[r] if limits and limits[r] else None) or (
            min((c.min() for c in flat if c.ndim == 2), default=0),
            max((c.max() for c in flat if c.ndim == 2), default=1),
        )
        for ax in axes[r]:
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            for spine in ax.spines.values():
                spine.set_visible(False)
        for ax, cell in zip(axes[r], flat, strict=False):
            ax.imshow(
                cell,
                cmap=cmap,
                vmin=low,
                vmax=high,
                interpolation="nearest" if _small(cell) else "antialiased",
            )
        axes[r][0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8, labelpad=6)
    for ax, text in zip(axes[0], columns or [], strict=False):
        ax.set_title(
            wrap(text, max(9, int(side * 13)), 3),
            fontsize=7,
            fontweight="normal",
            loc="center",
            pad=3,
        )
    figure.suptitle(title, x=0.01, ha="left")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    return figure


def ranked(
    found: Mapping[str, Sequence[Sequence[tuple[Any, bool | None]]]],
    queries: Sequence[str],
    *,
    title: str,
) -> Figure:
    """What searches found: a row a query, a block of pictures a searcher, the best first.

    found : searcher -> for each query its pictures, each with whether it is right (None: nobody
        knows). Right ones are
    framed and ticked.
    """
    names, wide = list(found), max(len(row) for rows in found.values() for row in rows)
    side, gap, label = (WIDTH - 1.3) / (len(names) * wide + 0.4 * (len(names) - 1)), 0.4, 1.3
    figure = plt.figure(figsize=(WIDTH, len(queries) * side * 1.06 + 0.75))
    widths = [
        w
        for i in range(len(names))
        for w in ([label + side * wide] if i == 0 else [gap * side, side * wide])
    ]
    panels = figure.subfigures(1, len(widths), squeeze=False, width_ratios=widths)[0][::2]
    for block, (panel, name) in enumerate(zip(panels, names, strict=True)):
        axes = panel.subplots(len(queries), wide, squeeze=False)
        panel.get_layout_engine().set(w_pad=0.012, h_pad=0.012, wspace=0, hspace=0)
        axes[0][(wide - 1) // 2].set_title(name, fontsize=9.5, loc="center", pad=5)
        for row, line in enumerate(axes):
            for ax in line:
                ax.set(xticks=[], yticks=[])
                ax.grid(False)
                ax.set_frame_on(False)
            for ax, (image, right) in zip(line, found[name][row], strict=False):
                ax.set_frame_on(True)
                ax.imshow(
                    np.asarray(image), interpolation="nearest" if _small(image) else "antialiased"
                )
                for spine in ax.spines.values():
                    spine.set(
                        visible=True,
                        color=RIGHT if right else GRID,
                        linewidth=2.2 if right else 0.6,
                    )
                if right:
                    ax.text(
                        0.04,
                        0.96,
                        "✓",
                        transform=ax.transAxes,
                        color="white",
                        fontsize=7,
                        fontweight="bold",
                        va="top",
                        bbox={"boxstyle": "round,pad=0.12", "color": RIGHT},
                    )
            if block == 0:
                line[0].set_ylabel(
                    wrap(queries[row], 18, 3),
                    rotation=0,
                    ha="right",
                    va="center",
                    fontsize=8,
                    labelpad=6,
                )
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _small(image: Any) -> bool:
    return max(np.asarray(image).shape[:2]) <= 48
