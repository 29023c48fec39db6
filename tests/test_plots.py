"""mclip.plots: titles, units, fixed colours, the same bytes for the same numbers."""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mclip import plots


@pytest.fixture(autouse=True)
def _style():
    with matplotlib.rc_context():
        plots.style()
        yield
    plt.close("all")


def runs() -> pd.DataFrame:
    rows = [(s, r, k, 10 * i + k) for s in ("a", "b") for i, r in enumerate(("clip", "combined")) for k in range(3)]
    return pd.DataFrame(rows, columns=["set", "recipe", "seed", "value"])


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_all() -> list:
    bars = plots.bars(
        runs(),
        x="set",
        y="value",
        hue="recipe",
        title="Bars",
        ylabel="top-1, %",
        chance={"a": 1.0},
        ceiling={"b": 20.0},
    )
    curves = plots.curves(runs(), x="value", y="seed", hue="recipe", title="Curves", xlabel="samples", ylabel="loss")
    heat = plots.heatmap(
        np.eye(3), rows=list("abc"), columns=list("xyz"), title="Heat", xlabel="x", ylabel="y", unit="%"
    )
    sheet = plots.gallery(
        [Image.new("RGB", (8, 8), "red")] * 5, ["cost $5 and a long tail of words"] * 5, 4, title="Sheet"
    )
    trade = plots.tradeoff(
        runs()[lambda f: f["set"] == "a"], x="seed", y="value", hue="recipe", title="Trade", xlabel="ms", ylabel="%"
    )
    assert trade.get_xlim()[0] == 0 and [t.get_text() for t in trade.get_legend().get_texts()] == ["clip", "combined"]
    return [bars.figure, curves.figure, heat.figure, sheet, trade.figure]


def test_figures_name_themselves_and_repeat_their_bytes():
    figures = draw_all()
    assert [plots.describe(f) for f in figures] == ["Bars", "Curves", "Heat", "Sheet", "Trade"]
    first = [png(f) for f in figures]
    plt.close("all")
    assert [png(f) for f in draw_all()] == first


def test_bars_show_spread_points_chance_and_ceiling():
    ax = draw_all()[0].axes[0]
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"clip", "combined", "chance", "teacher"}
    assert len(ax.lines) >= 4  # an error bar a bar
    assert sum(len(c.get_offsets()) for c in ax.collections if hasattr(c, "get_sizes") and len(c.get_sizes())) == 12


def test_colours_are_fixed_and_distinct():
    assert plots.palette(["combined", "clip"]) == {"combined": plots.COLOURS["combined"], "clip": plots.COLOURS["clip"]}
    extra = plots.palette(["zeta", "clip", "alpha"])
    assert extra == plots.palette(["alpha", "zeta", "clip"]) and len(set(extra.values())) == 3


def test_wrap_shortens():
    assert plots.wrap("one two three four five six", width=9, lines=2) == "one two\nthree …"
    assert plots.wrap("a b\nlong words here", width=8) == "a b\nlong …"


def test_table_escapes_aligns_and_marks_the_best(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **options: shown.append(data))
    frame = pd.DataFrame({"name": ["<a>", "b"], "n": [1200, 3], "score": [0.25, np.nan]})
    plots.table(frame, caption="T & U", digits=2, best=["score"])
    text, plain = shown[0]["text/html"], shown[0]["text/plain"]
    assert "&lt;a&gt;" in text and "T &amp; U" in text and "<strong>0.25</strong>" in text
    assert "–" in text and 'style="text-align: right">1,200' in text
    assert plain.startswith("T & U\n")
