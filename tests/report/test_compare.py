"""mclip.report.compare: the metrics files as one table, and what a difference allows to say."""

import json
import math

import pandas as pd
import pytest
from scipy import stats

from mclip.data.stores import metrics
from mclip.params import EvalSet
from mclip.report import compare

SETS = {
    "home": EvalSet(path="a", task="classification", kind="in domain"),
    "away": EvalSet(path="b", task="classification", kind="unseen"),
    "pairs": EvalSet(path="c", task="retrieval", kind="unseen"),
}


def rows(recipe: str, gain: float) -> list[tuple]:
    out = []
    for seed, wobble in enumerate((-0.01, 0.0, 0.01)):
        out += [
            (
                recipe,
                "home",
                "in domain",
                "classification",
                "top1",
                seed,
                0.5 + wobble,
                0.1,
                "top1",
            ),
            (recipe, "home", "in domain", "classification", "probe_top1", seed, 0.9, 0.1, "top1"),
            (
                recipe,
                "away",
                "unseen",
                "classification",
                "top1",
                seed,
                0.2 + gain + wobble,
                0.05,
                "top1",
            ),
            (recipe, "pairs", "unseen", "retrieval", "i2t_r1", seed, 0.0, 0.01, "mean_r1"),
            (
                recipe,
                "pairs",
                "unseen",
                "retrieval",
                "mean_r1",
                seed,
                0.1 + gain + wobble,
                0.01,
                "mean_r1",
            ),
        ]
    return out


@pytest.fixture
def folder(tmp_path):
    for recipe, gain in (("clip", 0.0), ("more", 0.1)):
        frame = pd.DataFrame(rows(recipe, gain), columns=metrics.COLUMNS)
        frame.to_csv(tmp_path / f"{recipe}.csv", index=False)
    tree = {
        "more": {
            "away": {"top1": {"mean": 0.3, "std": 0.01}},
            "mean": {"mean": 0.25, "std": 0.01, "sets": 2},
        }
    }
    (tmp_path / "more.json").write_text(json.dumps(tree))
    (tmp_path / "teachers.json").write_text(
        json.dumps({"large": {"away": {"top1": 0.6}, "pairs": {"mean_r1": 0.4}}})
    )
    return tmp_path


def test_main_metric_and_held_out_mean(folder):
    frame, missing = metrics.read_seeds(["clip", "more", "gone"], folder)
    assert missing == [f"{folder}/gone.csv is missing: run `dvc repro evaluate@gone` first"]
    main = compare.main_metric(frame)
    assert (
        set(main["set"]) == {compare.HELD_OUT, "home", "away", "pairs"} and len(main) == 2 * 3 * 4
    )
    head = main[main["set"] == compare.HELD_OUT].groupby("recipe")[["value", "chance"]].mean()
    assert head.loc["clip"].tolist() == pytest.approx([0.15, 0.03])
    assert head.loc["more", "value"] == pytest.approx(0.25)


def test_spreads(folder):
    main = compare.main_metric(metrics.read_seeds(["clip", "more"], folder)[0])
    one = main[(main["recipe"] == "clip") | (main["seed"] == 1)]
    one = one[(one["recipe"] == "clip") | (one["set"] != "away")]
    said = compare.spreads(one, {"clip": "CLIP", "more": "better", "none": "not run"})
    assert list(said.index) == ["CLIP", "better", "not run"]
    assert said["home (in domain)"].tolist() == ["50.0 ± 1.0", "50.0", "–"]
    assert said["away (unseen)"].tolist() == ["20.0 ± 1.0", "–", "–"]
    assert said[compare.HELD_OUT].tolist() == ["15.0 ± 1.0", "25.0", "–"]


def test_verdicts_are_welch_intervals(folder):
    main = compare.main_metric(metrics.read_seeds(["clip", "more"], folder)[0])
    said = compare.verdicts(main, "clip").set_index("set")
    assert said["verdict"].to_dict() == {
        compare.HELD_OUT: "better",
        "home": "within noise",
        "away": "better",
        "pairs": "better",
    }
    assert compare.verdicts(main, "more").set_index("set").loc["away", "verdict"] == "worse"
    a, b = (
        main[(main["recipe"] == r) & (main["set"] == "away")]["value"] for r in ("more", "clip")
    )
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert said.loc["away", ["low", "high"]].tolist() == pytest.approx(
        [expected.low, expected.high]
    )


def test_one_seed_allows_no_verdict():
    one = pd.Series([0.5])
    assert compare.welch(one, one) == (-math.inf, math.inf)
    same = pd.Series([0.5, 0.5])
    assert compare.welch(same + 0.25, same) == (0.25, 0.25)


def test_rows_of_recipes_teachers_and_chance(folder):
    found = compare.main_rows(metrics.read_metrics(folder), SETS)
    means = {(r.name, r.set): r.mean for r in found}
    assert means["large", compare.HELD_OUT] == pytest.approx(0.5) and means["more", "away"] == 0.3
    assert {r.group for r in found} == {"recipe", "teacher"} and ("more", "home") not in means
    chance = compare.chance_rows(metrics.read_seeds(["clip"], folder)[0])
    assert {r.set: r.mean for r in chance}["home"] == 0.1
    assert compare.chance_rows(metrics.read_seeds([], folder)[0]) == []


def test_headlines_have_a_file_each_with_the_same_keys(folder, tmp_path):
    found = compare.main_rows(metrics.read_metrics(folder), SETS)
    compare.write_headlines(found, tmp_path / "headline")
    assert {f.name: json.loads(f.read_text()) for f in (tmp_path / "headline").iterdir()} == {
        "more.json": {"away": 30.0, "held-out mean": 30.0, "held-out std": 1.0},
        "large.json": {"away": 60.0, "pairs": 40.0, "held-out mean": 50.0},
    }


def test_two_sets_stand_for_all(tmp_path):
    assert compare.representative(SETS) == {"home": "home (in domain)", "pairs": "pairs (unseen)"}
    assert compare.representative({"only": EvalSet(path="-")}) == {"only": "only"}
    here = {
        name: spec.model_copy(update={"path": str(tmp_path)})
        for name, spec in SETS.items()
        if name != "pairs"
    }
    assert "pairs" not in compare.representative(
        SETS | here
    )  # a set that is not here stands for nothing
