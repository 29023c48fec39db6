"""The look of every figure: one theme, one colour per recipe and teacher, and the few kinds
notebooks draw.

    from mclip.report import plots
    plots.style()    # once, at the head of a notebook
    plots.bars(frame, x="set", y="accuracy", hue="recipe", title="...", ylabel="top-1, %")
    plots.gallery(images, titles, title="Twelve pairs")

Figures are PNG of fixed size and resolution, so that the same numbers give the same bytes (error
bars are standard deviations, never bootstrapped). A figure's text form in the executed notebook is
its title: the picture's alternative text in the report.
"""

from mclip.report.plots.charts import bars, curves, differences, estimates, heatmap, radar, tradeoff
from mclip.report.plots.learning import amounts, learning
from mclip.report.plots.sheets import captioned, gallery, grid, ranked, wrap
from mclip.report.plots.tables import claims, table, verdicts
from mclip.report.plots.theme import (
    COLOURS,
    DPI,
    GRID,
    INK,
    MUTED,
    SPARE,
    WIDTH,
    describe,
    palette,
    style,
)

__all__ = [
    "COLOURS",
    "DPI",
    "GRID",
    "INK",
    "MUTED",
    "SPARE",
    "WIDTH",
    "amounts",
    "bars",
    "captioned",
    "claims",
    "curves",
    "describe",
    "differences",
    "estimates",
    "gallery",
    "grid",
    "heatmap",
    "learning",
    "palette",
    "radar",
    "ranked",
    "style",
    "table",
    "tradeoff",
    "verdicts",
    "wrap",
]
