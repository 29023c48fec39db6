"""mclip.claims: pooled spreads and intervals against scipy's, verdicts at their borders, learning curves by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mclip import claims
from mclip.claims import Claim
from mclip.compare import HELD_OUT


def frame(values: dict[str, list[float]], name: str = HELD_OUT) -> pd.DataFrame:
    return pd.DataFrame([(variant, name, "", seed, value, 0.1) for variant, own in values.items()
                         for seed, value in enumerate(own)], columns=["recipe", "set", "kind", "seed", "value", "chance"])


def test_two_variants_give_the_t_test_with_equal_variances():
    a, b = [0.31, 0.35, 0.30], [0.25, 0.28]
    found = claims.differences(frame({"a": a, "b": b}), [Claim("a is above", "a", "b")]).iloc[0]
    expected = stats.ttest_ind(a, b).confidence_interval(0.95)
    assert found["difference"] == pytest.approx(np.mean(a) - np.mean(b))
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["df"] == 3


def test_the_spread_is_pooled_over_all_variants_and_by_set():
    main = pd.concat([frame({"a": [0.1, 0.2], "b": [0.5, 0.5, 0.8], "c": [0.4]}), frame({"a": [0.3, 0.3]}, "other")])
    found = claims.pooled(main)
    squares = 2 * 0.05**2 + 2 * 0.1**2 + 0.2**2
    assert found.loc[HELD_OUT, "df"] == 3 and found.loc[HELD_OUT, "std"] == pytest.approx(math.sqrt(squares / 3))
    assert found.loc["other", "df"] == 1 and found.loc["other", "std"] == 0
    rows = claims.intervals(main).set_index(["set", "recipe"])
    half = stats.t.ppf(0.975, 3) * math.sqrt(squares / 3) / math.sqrt(3)
    assert rows.loc[(HELD_OUT, "b"), ["low", "mean", "high"]].tolist() == pytest.approx([0.6 - half, 0.6, 0.6 + half])


@pytest.mark.parametrize("other, said", [([0.1, 0.101], claims.HOLDS), ([0.5, 0.501], claims.REVERSED),
                                         ([0.3, 0.301], claims.OPEN)])
def test_a_claim_holds_where_the_interval_is_above_zero(other, said):
    found = claims.differences(frame({"a": [0.3, 0.301], "b": other}), [Claim("a is above", "a", "b")])
    assert found["verdict"].tolist() == [said]
    assert f"a is above: {said}" in claims.verdict(found)


def test_one_seed_tells_nothing_and_variants_not_run_are_left_out():
    found = claims.differences(frame({"a": [0.3], "b": [0.1]}), [Claim("x", "a", "b"), Claim("y", "a", "gone")])
    assert found["claim"].tolist() == ["x"] and found["verdict"].tolist() == [claims.OPEN]
    assert "can't be told at this size in 1 of 1" in claims.verdict(found) and "one seed" in claims.verdict(found)
    assert claims.verdict(found.iloc[:0]) == "The variants that the paper compares were not run."


def test_the_sentence_counts_and_names():
    main = frame({"a": [0.3, 0.301], "b": [0.1, 0.101], "c": [0.5, 0.501]})
    text = claims.verdict(claims.differences(main, [Claim("one", "a", "b"), Claim("two", "a", "c")]))
    assert text.startswith("On the held-out mean the paper's direction holds in 1, is reversed in 1 of 2 comparisons "
                           "(95 % intervals, 3 degrees of freedom): one: holds (+20.0 points, ")


def test_the_table_keeps_the_order_and_takes_the_paper_s_numbers():
    made = claims.table(frame({"b": [0.2, 0.4], "a": [0.1, 0.1]}), {"a": "first", "b": "second"}, [HELD_OUT],
                        {"zero-shot": {"b": 69.4}})
    assert made.index.tolist() == ["first", "second"]
    assert made[f"{HELD_OUT}, %"].tolist() == pytest.approx([10, 30])
    assert made["the paper's: zero-shot"].tolist() == pytest.approx([math.nan, 69.4], nan_ok=True)


def test_samples_to_an_accuracy_lie_between_points_in_the_logarithm():
    samples, accuracy = [100, 400, 1600], [0.1, 0.3, 0.5]
    assert claims.samples_to(samples, accuracy, 0.2) == pytest.approx(200)
    assert claims.samples_to(samples, accuracy, 0.5) == pytest.approx(1600)
    assert claims.samples_to(samples, accuracy, 0.05) == 100
    assert claims.samples_to(samples, accuracy, 0.6) == math.inf
    assert claims.samples_to([1, 2, 4], [0.1, 0.4, 0.2], 0.3) == pytest.approx(2 ** (2 / 3))  # the first crossing


def learning() -> pd.DataFrame:
    curves = {"clip": {100: 0.1, 400: 0.2, 1600: 0.3}, "fast": {100: 0.25, 400: 0.5}, "slow": {100: 0.05, 400: 0.15},
              "same": {100: 0.1, 400: 0.2}}
    return pd.DataFrame([(r, n, HELD_OUT, seed, v + seed / 100) for r, c in curves.items() for n, v in c.items()
                         for seed in (0, 1)], columns=["recipe", "samples", "set", "seed", "value"])


def test_savings_say_where_they_are_only_bounds():
    found = claims.savings(learning(), "clip", 400).set_index(["recipe", "reference"])
    assert sorted(set(found.index.get_level_values("reference"))) == [400, 1600]
    assert found.loc[("fast", 400), ["needed", "factor", "bound"]].tolist() == [100, 4, ">="]
    assert found.loc[("fast", 1600), "bound"] == "=" and found.loc[("fast", 1600), "needed"] == pytest.approx(
        100 * 4**0.2)
    assert found.loc[("slow", 400), ["needed", "factor", "bound"]].tolist() == [400, 1, "<"]
    assert found.loc[("same", 400), ["needed", "bound"]].tolist() == [pytest.approx(400), "="]
    text = claims.saving(found.reset_index(), {r: r.upper() for r in ("clip", "fast", "slow", "same")}, "clip", 10)
    assert "FAST at least 4.0, SLOW less than 1.0, SAME 1.0" in text
    assert "FAST 12.1 on held-out mean, to CLIP's accuracy at 1,600 samples: a factor of 10 on one set holds." in text
