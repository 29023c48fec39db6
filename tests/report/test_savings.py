"""mclip.report.savings: learning curves by hand."""

import math

import pandas as pd
import pytest

from mclip.report import savings
from mclip.report.compare import HELD_OUT


def test_samples_to_an_accuracy_lie_between_points_in_the_logarithm():
    samples, accuracy = [100, 400, 1600], [0.1, 0.3, 0.5]
    assert savings.samples_to(samples, accuracy, 0.2) == pytest.approx(200)
    assert savings.samples_to(samples, accuracy, 0.5) == pytest.approx(1600)
    assert savings.samples_to(samples, accuracy, 0.05) == 100
    assert savings.samples_to(samples, accuracy, 0.6) == math.inf
    assert savings.samples_to([1, 2, 4], [0.1, 0.4, 0.2], 0.3) == pytest.approx(
        2 ** (2 / 3)
    )  # the first crossing


def learning() -> pd.DataFrame:
    curves = {
        "clip": {100: 0.1, 400: 0.2, 1600: 0.3},
        "fast": {100: 0.25, 400: 0.5},
        "slow": {100: 0.05, 400: 0.15},
        "same": {100: 0.1, 400: 0.2},
    }
    return pd.DataFrame(
        [
            (r, n, HELD_OUT, seed, v + seed / 100)
            for r, c in curves.items()
            for n, v in c.items()
            for seed in (0, 1)
        ],
        columns=["recipe", "samples", "set", "seed", "value"],
    )


def test_savings_say_where_they_are_only_bounds():
    found = savings.savings(learning(), "clip", 400)
    found = found[found["whose"] == "clip"].set_index(["recipe", "reference"])
    assert sorted(set(found.index.get_level_values("reference"))) == [400, 1600]
    assert found.loc[("fast", 400), ["needed", "bound"]].to_list() == [100, ">="]
    assert found["factor"].tolist() == pytest.approx((found["reached"] / found["needed"]).tolist())
    assert found.loc[("fast", 400), "factor"] == pytest.approx(4)
    assert found.loc[("fast", 1600), "bound"] == "=" and found.loc[
        ("fast", 1600), "needed"
    ] == pytest.approx(100 * 4**0.2)
    assert found.loc[("slow", 400), ["needed", "bound"]].tolist() == [400, "<"]
    assert found.loc[("same", 400), ["needed", "bound"]].tolist() == [pytest.approx(400), "="]
    text = savings.saving(
        found.reset_index(), {r: r.upper() for r in ("clip", "fast", "slow", "same")}, "clip", 10
    )
    assert "FAST at least 4.0, SLOW less than 1.0, SAME 1.0" in text
    assert (
        "FAST 12.1 on held-out mean, to CLIP's accuracy at 1,600 samples (2 seeds); the paper's factor of 10 holds."
        in text
    )


def test_savings_are_a_table_to_read():
    saved = savings.savings(learning(), "clip", 400)
    table = savings.savings_table(
        saved, {r: r.upper() for r in ("clip", "fast", "slow", "same")}, "clip"
    )
    assert len(table) == len(saved) and table["recipe"].isin(["FAST", "SLOW", "SAME"]).all()
    row = table[
        (table["recipe"] == "FAST")
        & (table["at samples"] == 400)
        & (table["whose accuracy"] == "CLIP")
    ].iloc[0]
    assert (
        row["factor"] == "≥\N{NO-BREAK SPACE}4.0"
        and row["CLIP reaches it at"] == 400
        and row["accuracy, %"] == pytest.approx(20.5)
    )


def test_a_baseline_that_falls_back_is_counted_where_it_first_was_there():
    main = pd.DataFrame(
        [
            (r, n, "s", 0, v)
            for r, c in {"clip": {100: 0.1, 200: 0.3, 800: 0.2}, "other": {100: 0.2}}.items()
            for n, v in c.items()
        ],
        columns=["recipe", "samples", "set", "seed", "value"],
    )
    found = savings.savings(main, "clip", 800).iloc[0]
    assert (found["reference"], found["seeds"], found["bound"]) == (800, 1, ">=")
    assert found["reached"] == pytest.approx(100 * 2**0.5) and found["factor"] == pytest.approx(
        2**0.5
    )


@pytest.mark.parametrize(
    "curve, reached, bound, said",
    [
        (
            {100: 0.1, 400: 0.45},
            1600,
            ">=",
            "4.0 on s, to its own accuracy at 400 samples (1 seed), which CLIP does not reach with "
            "1,600; the paper's factor of 4 holds",
        ),
        (
            {100: 0.1, 400: 0.35},
            400 * 2 ** (5 / 12),
            "=",
            "1.3 on s, to its own accuracy at 400 samples (1 seed), which CLIP reaches with 534; ",
        ),
        ({100: 0.01, 400: 0.05}, 100, "<", None),  # the baseline's shortest run is above it
    ],
)
def test_a_baseline_may_need_more_than_its_longest_run(curve, reached, bound, said):
    base = {100: 0.1, 400: 0.3, 800: 0.42, 1600: 0.4}
    main = pd.DataFrame(
        [
            (r, n, "s", 0, v)
            for r, c in {"clip": base, "other": curve}.items()
            for n, v in c.items()
        ],
        columns=["recipe", "samples", "set", "seed", "value"],
    )
    saved = savings.savings(main, "clip", 400)
    own = saved[saved["whose"] == "other"].iloc[0]
    assert (own["reference"], own["needed"], own["bound"]) == (400, pytest.approx(400), bound)
    assert own["reached"] == pytest.approx(reached) and own["factor"] == pytest.approx(
        reached / 400
    )
    if said:
        assert said in savings.saving(saved, {"clip": "CLIP", "other": "OTHER"}, "clip", 4)
