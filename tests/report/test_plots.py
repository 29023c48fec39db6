"""mclip.report.plots: titles, units, fixed colours, the same bytes for the same numbers."""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mclip.report import claims, compare, plots
from mclip.report.plots import theme


@pytest.fixture(autouse=True)
def _style():
    with matplotlib.rc_context():
        plots.style()
        yield
    plt.close("all")


def runs() -> pd.DataFrame:
    rows = [
        (s, r, k, 10 * i + k)
        for s in ("a", "b")
        for i, r in enumerate(("clip", "combined"))
        for k in range(3)
    ]
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
    curves = plots.curves(
        runs(), x="value", y="seed", hue="recipe", title="Curves", xlabel="samples", ylabel="loss"
    )
    heat = plots.heatmap(
        np.eye(3),
        rows=list("abc"),
        columns=list("xyz"),
        title="Heat",
        xlabel="x",
        ylabel="y",
        unit="%",
    )
    sheet = plots.gallery(
        [Image.new("RGB", (8, 8), "red")] * 5,
        ["cost $5 and a long tail of words"] * 5,
        4,
        title="Sheet",
    )
    trade = plots.tradeoff(
        runs()[lambda f: f["set"] == "a"],
        x="seed",
        y="value",
        hue="recipe",
        title="Trade",
        xlabel="ms",
        ylabel="%",
    )
    assert trade.get_xlim()[0] == 0 and [t.get_text() for t in trade.get_legend().get_texts()] == [
        "clip",
        "combined",
    ]
    around = pd.concat([runs().assign(set=name) for name in ("a", "b", "c")])
    radar = plots.radar(
        around,
        axis="set",
        y="value",
        hue="recipe",
        outer={"a": 20.0, "b": 40.0, "c": 12.0},
        title="Radar",
    )
    grid = plots.grid(
        [[Image.new("RGB", (8, 8), "red")] * 3, [np.eye(4)] * 3],
        ["pictures", "maps"],
        title="Grid",
        columns=["one", "two", "three"],
    )
    found = [[(Image.new("RGB", (8, 8), "red"), right) for right in (True, False, None)]] * 2
    ranked = plots.ranked(
        {"CLIP": found, "CLIP-CID": found}, ["a red square", "a blue one"], title="Ranked"
    )
    gaps = pd.DataFrame({"recipe": ["a", "b"], "mean": [0, 3], "low": [0, 1], "high": [0, 5]})
    panels = {"one": (gaps, runs().replace({"recipe": {"clip": "b"}})), "two": (gaps, runs())}
    differences = plots.differences(panels, title="Differences", labels={"b": "second"})
    return [
        bars.figure,
        curves.figure,
        heat.figure,
        sheet,
        trade.figure,
        radar.figure,
        grid,
        ranked,
        differences,
    ]


@pytest.mark.slow
def test_figures_name_themselves_and_repeat_their_bytes():
    figures = draw_all()
    assert [plots.describe(f) for f in figures] == [
        "Bars",
        "Curves",
        "Heat",
        "Sheet",
        "Trade",
        "Radar",
        "Grid",
        "Ranked",
        "Differences",
    ]
    first = [png(f) for f in figures]
    plt.close("all")
    assert [png(f) for f in draw_all()] == first


@pytest.mark.slow
def test_bars_show_spread_points_chance_and_ceiling():
    ax = draw_all()[0].axes[0]
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {
        "clip",
        "combined",
        "chance",
        "teacher",
    }
    assert len(ax.lines) >= 4  # an error bar a bar
    assert (
        sum(
            len(c.get_offsets())
            for c in ax.collections
            if hasattr(c, "get_sizes") and len(c.get_sizes())
        )
        == 12
    )


def test_differences_have_a_panel_a_set_and_a_row_a_variant():
    figure = draw_all()[-1]
    assert [
        ax.get_title(loc) for ax in figure.axes for loc in ("left", "center") if ax.get_title(loc)
    ] == ["one", "two"]
    first, second = figure.axes
    assert [t.get_text() for t in first.get_yticklabels()] == [
        "a",
        "second",
    ] and first.get_ylim() == (1.5, -0.5)
    assert (
        sum(len(c.get_offsets()) for c in first.collections if len(c.get_facecolor())) == 6
    )  # b's points
    assert first.get_xlabel() == second.get_xlabel() == "difference, points"


def test_learning_curves_have_a_panel_a_set_and_a_level():
    rows = [
        (r, n, s, v + seed / 100)
        for r, v in (("clip", 0.1), ("combined", 0.2))
        for n in (100, 1000)
        for s in ("near", "far", "third")
        for seed in (0, 1)
    ]
    main = pd.DataFrame(rows, columns=["recipe", "samples", "set", "value"])
    level = pd.DataFrame({"recipe": "clip on all pairs", "set": "near", "value": [0.1, 0.2]})
    figure = plots.learning(main, level, title="Curves", labels={"clip": "CLIP"})
    panels = [ax for ax in figure.axes if ax.get_title("left")]
    assert [ax.get_title("left") for ax in panels] == ["near", "far", "third"] and len(
        figure.axes
    ) == 4
    assert all(ax.get_xscale() == "log" for ax in panels)
    assert [t.get_text() for t in panels[0].get_xticklabels()] == ["0.1k", "1k"]
    dotted = [
        [
            (line.get_ydata()[0], line.get_color())
            for line in ax.lines
            if line.get_linestyle() == ":"
        ]
        for ax in panels
    ]
    assert dotted == [[(pytest.approx(15), theme.COLOURS["clip"])], [], []]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["CLIP", "combined"]


def test_amounts_have_a_panel_a_kind_and_a_line_a_set():
    rows = [
        (what, n, s, -1.0 / n, -2.0 / n, 0.0)
        for what, most in (("augmentations", 10), ("captions", 5))
        for s in ("near", "far")
        for n in (most, 1, 2)
    ]
    frame = pd.DataFrame(rows, columns=["what", "number", "set", "mean", "low", "high"])
    figure = plots.amounts(frame, title="Stored", ylabel="points")
    assert [ax.get_xlabel() for ax in figure.axes] == ["augmentations stored", "captions stored"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1", "2", "10"]
    line = figure.axes[1].containers[0].lines[0]
    assert list(line.get_ydata()) == [-1.0, -0.5, -0.2]  # by number
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["near", "far"]


def test_a_radars_axes_are_scaled_to_their_own_ring():
    around = pd.concat([runs().assign(set=name) for name in ("a", "b", "c")])
    ax = plots.radar(
        around,
        axis="set",
        y="value",
        hue="recipe",
        outer={"a": 22.0, "b": 11.0, "c": 44.0},
        title="",
    )
    line = next(line for line in ax.lines if line.get_label() == "combined")  # 11 on average
    np.testing.assert_allclose(line.get_ydata(), [0.5, 1.0, 0.25, 0.5])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a\n22.0 %", "b\n11.0 %", "c\n44.0 %"]
    with pytest.raises(ValueError, match="three axes or more, here 2"):
        plots.radar(
            around, axis="set", y="value", hue="recipe", outer={"a": 1.0, "b": 1.0}, title=""
        )


def test_right_answers_are_ticked_and_queries_stand_at_the_left():
    square = Image.new("RGB", (8, 8), "red")
    figure = plots.ranked(
        {"x": [[(square, True), (square, False)]], "y": [[(square, None), (square, True)]]},
        ["q"],
        title="",
    )
    texts = [[t.get_text() for t in ax.texts] for ax in figure.axes]
    assert texts == [["✓"], [], [], ["✓"]] and figure.axes[0].get_ylabel() == "q"


def test_colours_are_fixed_and_distinct():
    assert plots.palette(["combined", "clip"]) == {
        "combined": plots.COLOURS["combined"],
        "clip": plots.COLOURS["clip"],
    }
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


def test_claims_are_shown_with_signs_and_their_p_value(monkeypatch):
    shown = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, **options: shown.append(data["text/plain"])
    )
    row = ["s", "A helps", "one", 2.14, 0.8, 3.4, 0.01, 3, "+2", "holds", 0.5, 0.2]
    settled = pd.DataFrame([row], columns=claims.COLUMNS)
    plots.claims(settled, caption="Claims")
    plots.claims(settled.drop(columns="outcome"), caption="Claims")
    numbers = ["+2", "+2.1", "+0.8", "+3.4", "+0.5", "+0.2", "0.010", "holds"]
    assert shown[0].splitlines()[2].split() == ["A", "helps", "one", *numbers]
    assert shown[1].splitlines()[2].split() == ["A", "helps", *numbers]


def test_verdicts_are_shown_in_points(monkeypatch):
    shown = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, **options: shown.append(data["text/plain"])
    )
    main = pd.DataFrame(
        {
            "recipe": ["clip"] * 2 + ["other"] * 2,
            "set": "one",
            "kind": "near",
            "seed": [0, 1] * 2,
            "value": [0.10, 0.11, 0.20, 0.21],
        }
    )
    plots.verdicts(compare.verdicts(main, "clip"), {"other": "Other"}, caption="Differences")
    assert shown[0].splitlines()[0] == "Differences"
    assert shown[0].splitlines()[2].split() == [
        "Other",
        "one",
        "near",
        "+10.0",
        "+7.0",
        "+13.0",
        "better",
    ]
