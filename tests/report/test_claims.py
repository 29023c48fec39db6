"""mclip.report.claims: pooled spreads and intervals against scipy's, verdicts at their borders."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mclip.data.stores.metrics import COLUMNS, ITEMS
from mclip.params import sections
from mclip.report import claims
from mclip.report.claims import Claim
from mclip.report.compare import HELD_OUT


def frame(values: dict[str, list[float]], name: str = HELD_OUT) -> pd.DataFrame:
    return pd.DataFrame(
        [
            (variant, name, "", seed, value, 0.1)
            for variant, own in values.items()
            for seed, value in enumerate(own)
        ],
        columns=["recipe", "set", "kind", "seed", "value", "chance"],
    )


def test_two_variants_with_the_same_seeds_give_the_paired_t_test():
    a, b = [0.31, 0.35, 0.30], [0.25, 0.33, 0.21]
    found = claims.differences(frame({"a": a, "b": b}), [Claim("a is above", "a", "b")]).iloc[0]
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found["df"] == 2 and found["difference"] == pytest.approx(np.mean(a) - np.mean(b))
    assert found["half"] == pytest.approx((expected.high - expected.low) / 2)


def test_complete_blocks_are_the_two_way_analysis_of_variance():
    x = np.random.default_rng(0).normal(size=(4, 3)) + np.arange(3) * 5
    found = claims.fit(frame({f"v{i}": list(row) for i, row in enumerate(x)}))
    rest = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    std = math.sqrt((rest**2).sum() / 6)
    assert found.df == 6 and found.std == pytest.approx(std)
    gap, half = found.difference("v3", "v1")
    assert gap == pytest.approx(x[3].mean() - x[1].mean())
    assert half == pytest.approx(stats.t.ppf(0.975, 6) * std * math.sqrt(2 / 3))


def test_a_variant_that_lacks_a_seed_is_compared_within_the_others():
    values = {
        "a": [0.1, 0.6, 0.3],
        "b": [0.2, 0.7, 0.4],
        "c": [0.4],
    }  # seeds differ, variants by +0.1 and +0.3 exactly
    found = claims.fit(frame(values))
    assert found.df == 2 and found.std == pytest.approx(0, abs=1e-12)
    assert found.difference("c", "a")[0] == pytest.approx(0.3) and found.difference("b", "c")[
        0
    ] == pytest.approx(-0.2)
    noisy = claims.fit(frame({"a": [0.1, 0.5, 0.3], "b": [0.2, 0.7, 0.4], "c": [0.4]}))
    assert noisy.difference("c", "a")[1] > noisy.difference("b", "a")[1] > 0


def test_two_changes_that_add_up_or_not():
    rng = np.random.default_rng(3)
    values = (
        rng.normal(size=(4, 6)) / 100
        + rng.normal(size=6) / 10
        + np.array([[0.5], [0.3], [0.25], [0.2]])
    )
    main = frame(dict(zip(("both", "one", "other", "neither"), values, strict=True)))
    found = claims.interactions(main, "both", "one", "other", "neither").loc[HELD_OUT]
    means = 100 * values.mean(1)
    rest = 100 * (values - values.mean(0) - values.mean(1, keepdims=True) + values.mean())
    std = np.sqrt((rest**2).sum() / 15)
    assert found["their sum"] == pytest.approx(means[1] + means[2] - 2 * means[3])
    assert found["both"] == pytest.approx(means[0] - means[3])
    assert found["more than the sum"] == pytest.approx(means[0] - means[1] - means[2] + means[3])
    assert found["±"] == pytest.approx(stats.t.ppf(0.975, 15) * std * np.sqrt(4 / 6))
    assert not len(
        claims.interactions(main[main["recipe"] != "one"], "both", "one", "other", "neither")
    )


def test_differences_to_the_first_variant_seed_by_seed():
    main = pd.concat(
        [
            frame({"a": [0.1, 0.2], "b": [0.5, 0.4]}),
            frame({"a": [0.0, 0.0], "b": [0.0, 0.0]}, "other"),
        ]
    )
    rows, seeds = claims.against(main, HELD_OUT, "a")
    assert rows["recipe"].tolist() == ["a", "b"] and rows["mean"].tolist() == pytest.approx([0, 30])
    assert rows.loc[0, ["low", "high"]].tolist() == [0, 0]
    half = 100 * claims.fit(main[main["set"] == HELD_OUT]).difference("b", "a")[1]
    assert rows.loc[1, ["low", "high"]].tolist() == pytest.approx([30 - half, 30 + half])
    assert seeds["value"].tolist() == pytest.approx([0, 0, 40, 20])


@pytest.mark.parametrize(
    "other, said",
    [([0.1, 0.101], claims.HOLDS), ([0.5, 0.501], claims.REVERSED), ([0.3, 0.301], claims.OPEN)],
)
def test_a_claim_holds_where_the_interval_is_above_zero(other, said):
    found = claims.differences(
        frame({"a": [0.3, 0.301], "b": other}), [Claim("a is above", "a", "b")]
    )
    assert found["verdict"].tolist() == [said]
    assert f"{said} for 1" in claims.verdict(found)


def test_differences_are_read_in_points():
    found = claims.differences(
        frame({"a": [0.3, 0.5], "b": [0.25, 0.35]}), [Claim("a is above", "a", "b")]
    )
    shown = claims.percent(found)
    assert list(claims.percent(pd.concat([found, found])).index) == [
        0,
        1,
    ]  # of which a table shows none
    assert shown["difference, points"].item() == pytest.approx(10)
    assert shown["±"].item() == pytest.approx(100 * found["half"].item())
    assert shown[["claim", "set", "verdict"]].values.tolist() == [
        ["a is above", HELD_OUT, claims.OPEN]
    ]


def test_one_seed_tells_nothing_and_variants_not_run_are_left_out():
    found = claims.differences(
        frame({"a": [0.3], "b": [0.1]}), [Claim("x", "a", "b"), Claim("y", "a", "gone")]
    )
    assert found["claim"].tolist() == ["x"] and found["verdict"].tolist() == [claims.OPEN]
    assert math.isinf(found["half"].iloc[0])
    assert claims.verdict(found) == (
        "The paper's direction, in 1 comparison with 95 % intervals (0 degrees of freedom): on "
        "held-out mean it is within noise for 1."
    )
    assert claims.verdict(found.iloc[:0]) == "The variants that the paper compares were not run."


def test_the_sentence_counts_and_names():
    main = frame({"a": [0.3, 0.301], "b": [0.1, 0.101], "c": [0.5, 0.501]})
    open_one = frame({"a": [0.3, 0.301], "b": [0.5, 0.1], "c": [0.3, 0.4]}, "far")
    found = claims.differences(
        pd.concat([main, open_one]), [Claim("one", "a", "b"), Claim("two", "a", "c")]
    )
    assert claims.verdict(found, [HELD_OUT, "far"]) == (
        "The paper's direction, in 2 comparisons with 95 % intervals (2 degrees of freedom): on held-out mean it holds for 1 "
        "(one, +20.0 ± 0.0 points), is reversed for 1 (two, -20.0 ± 0.0 points); on far it is within noise for "
        "2."
    )


def test_the_table_keeps_the_order_and_takes_the_paper_s_numbers():
    made = claims.table(
        frame({"b": [0.2, 0.4], "a": [0.1, 0.1]}),
        {"a": "first", "b": "second"},
        [HELD_OUT],
        {"zero-shot": {"b": 69.4}},
    )
    assert made.index.tolist() == ["first", "second"]
    assert made[f"{HELD_OUT}, %"].tolist() == pytest.approx([10, 30])
    assert made["the paper's: zero-shot"].tolist() == pytest.approx([math.nan, 69.4], nan_ok=True)


def study(values: dict[str, list[float]], name: str = "pets") -> pd.DataFrame:
    """The frame of a study with one held-out set."""
    return pd.DataFrame(
        [
            (recipe, name, "", "classification", "top1", seed, value, 0.1, "top1")
            for recipe, own in values.items()
            for seed, value in enumerate(own)
        ],
        columns=COLUMNS,
    )


def above(better: str, worse: str, **values) -> sections.Claim:
    return sections.Claim(claim=f"{better} > {worse}", better=better, worse=worse, **values)


def shares(right: dict[str, np.ndarray], name: str = "pets") -> pd.DataFrame:
    """Items of the same pictures; right: a recipe -> (seeds, pictures)."""
    return pd.DataFrame(
        [
            (recipe, name, seed, f"picture{i}", float(value))
            for recipe, own in right.items()
            for seed, row in enumerate(own)
            for i, value in enumerate(row)
        ],
        columns=ITEMS,
    )


NO_ITEMS = pd.DataFrame(columns=ITEMS)


def test_without_items_a_claim_is_the_paired_t_test():
    a, b = [0.31, 0.35, 0.30], [0.25, 0.33, 0.21]
    row = claims.settle("s", study({"a": a, "b": b}), NO_ITEMS, [above("a", "b")]).iloc[0]
    paired = stats.ttest_rel(a, b)
    interval = paired.confidence_interval(0.95)
    assert row["difference"] == pytest.approx(100 * (np.mean(a) - np.mean(b)))
    assert (row["low"], row["high"]) == pytest.approx((100 * interval.low, 100 * interval.high))
    assert row["adjusted"] == pytest.approx(paired.pvalue) and row["seeds"] == 3


def test_items_widen_the_interval_by_the_spread_of_the_pictures():
    rng = np.random.default_rng(0)
    right = {"a": rng.random((3, 200)) < 0.6, "b": rng.random((3, 200)) < 0.5}
    frame = study({name: list(own.mean(1)) for name, own in right.items()})
    row = claims.settle("s", frame, shares(right), [above("a", "b")]).iloc[0]
    gap = right["a"].mean(0) - right["b"].mean(0)
    assert row["se_items"] == pytest.approx(100 * gap.std(ddof=1) / math.sqrt(200))
    alone = claims.settle("s", frame, NO_ITEMS, [above("a", "b")]).iloc[0]
    assert row["se_seeds"] == alone["se_seeds"] and row["difference"] == alone["difference"]


def test_sets_that_show_the_same_pictures_are_no_independent_evidence():
    rng = np.random.default_rng(1)
    right = {"a": rng.random((2, 300)) < 0.6, "b": rng.random((2, 300)) < 0.5}
    values = {name: list(own.mean(1)) for name, own in right.items()}
    once = claims.settle("s", study(values), shares(right), [above("a", "b")]).iloc[0]
    twice = claims.settle(
        "s",
        pd.concat([study(values), study(values, "again")]),
        pd.concat([shares(right), shares(right, "again")]),
        [above("a", "b")],
    ).iloc[0]
    assert twice["se_items"] == pytest.approx(once["se_items"])


def test_verdicts_follow_holms_p_and_the_sign():
    frame = study({"a": [0.5, 0.501, 0.502], "b": [0.1, 0.102, 0.101], "c": [0.1, 0.3, 0.0]})
    asked = [above("a", "b"), above("b", "a"), above("b", "c"), above("a", "nobody")]
    found = claims.settle("s", frame, NO_ITEMS, asked)
    assert found["verdict"].tolist() == ["holds", "reversed", "within noise"]
    p = [stats.ttest_rel(frame["value"][:3], frame["value"][3:6]).pvalue]
    assert found["adjusted"].iloc[0] == pytest.approx(3 * p[0])
    said = claims.answer(found)
    assert said.startswith("1 of 3 claims holds: a > b") and "1 is within noise: b > c" in said


def test_a_single_seed_decides_nothing(tmp_path):
    found = claims.settle("s", study({"a": [0.9], "b": [0.1]}), NO_ITEMS, [above("a", "b")])
    assert found["verdict"].tolist() == ["within noise"] and math.isnan(found["low"].iloc[0])
    claims.write("s", found, tmp_path / "claims")
    (row,) = claims.join(tmp_path / "claims", tmp_path / "claims.json")
    assert row["low"] is None and row["study"] == "s" and row["difference"] == pytest.approx(80)


def test_a_probe_can_be_an_outcome():
    frame = study({"a": [0.5, 0.6], "b": [0.4, 0.5]}).assign(metric="probe_top1")
    found = claims.settle("s", frame, NO_ITEMS, [above("a", "b", outcome={"probe": "pets"})])
    assert found["outcome"].tolist() == ["linear probe on pets"]
    assert found["difference"].iloc[0] == pytest.approx(10)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 4, 6])
def test_five_claims_without_any_effect_are_seldom_significant(seeds):
    """Each interval leaves out 0 in about 5 % of the studies, any of five verdicts in at most 5 %."""
    rng = np.random.default_rng(seeds)
    pictures, names = 400, [f"v{i}" for i in range(5)]
    asked = [above(name, "base") for name in names]
    single, family, runs = 0, 0, 300
    for _ in range(runs):
        right = {}
        for name in [*names, "base"]:  # a variant's own luck with pictures and with seeds
            chance = 0.5 + 0.2 * rng.standard_normal(pictures)
            chance = chance + 0.01 * rng.standard_normal((seeds, 1))
            right[name] = rng.random((seeds, pictures)) < chance
        frame = study({name: list(own.mean(1)) for name, own in right.items()})
        found = claims.settle("s", frame, shares(right), asked)
        single += ((found["low"] > 0) | (found["high"] < 0)).sum()
        family += (found["verdict"] != "within noise").any()
    print(f"{seeds} seeds: single {single / runs / 5:.3f}, family {family / runs:.3f}")
    assert 0.01 < single / runs / 5 < 0.075 and family / runs < 0.08
