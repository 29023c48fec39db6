"""mclip.studies.students: the others are trained like the default, costs are those of real steps,
the verdict follows the numbers.
"""

import pandas as pd
import pytest
import torch

from mclip import models
from mclip.studies import ablate, students
from tests.world import RECIPES, TRAIN


def planned(names, training_set, tmp_path, **changes):
    spec = training_set("kept", True)
    folders = {
        k: getattr(spec, k)
        for k in ("pairs", "balance", "clusters", "embeddings", "reinforced", "cache")
    }
    return students.plan(
        "combined",
        RECIPES["combined"],
        names,
        TRAIN.model_copy(update=changes),
        [0, 1],
        teacher="large",
        data=folders,
        cache=tmp_path,
    )


def test_students_differ_in_nothing_but_the_student(student, training_set, tmp_path):
    runs = planned(["demo-student", student], training_set, tmp_path)
    assert list(runs) == ["demo-student", student]
    for default, other in zip(*runs.values(), strict=True):
        assert (default.seed, default.train, default.recipe, default.data) == (
            other.seed,
            other.train,
            other.recipe,
            other.data,
        )
        assert other.out == f"{tmp_path}/runs/{other.identity}" != default.out
        assert (
            default.out == f"{tmp_path}/runs/{default.identity}"
            and other.scratch != default.scratch
        )
    assert not ablate.distill.finished(other)


@pytest.mark.slow
def test_costs_are_of_real_steps_and_leave_nothing_behind(student, training_set, tmp_path):
    runs = planned([student, "demo-vit"], training_set, tmp_path / "out", samples=80)
    threads = torch.get_num_threads()
    table = students.costs({name: mine[0] for name, mine in runs.items()}, steps=3, rounds=3)
    assert list(table.index) == [student, "demo-vit"] and torch.get_num_threads() == threads
    assert (table > 0).all(axis=None)
    for name in runs:
        model = models.create(name)[0]
        assert table.loc[name, ["image_params", "text_params"]].sum() == sum(
            p.numel() for p in model.parameters()
        )
    row = table.loc["demo-vit"]
    assert row["train_s"] == pytest.approx(row["step_ms"] * 10 / 1e3)
    assert row["latency_ms"] == pytest.approx(row["image_ms"] + row["text_ms"])
    assert (
        row["step_ms"] > table.loc[student, "step_ms"]
    )  # four layers of width 128 against one of 16
    assert not (tmp_path / "out").exists()


def table(**rows) -> pd.DataFrame:
    columns = ["near mean", "near std", "far mean", "far std", "latency_ms", "train_s"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


@pytest.mark.parametrize(
    "other, said",
    [
        (
            (45, 1, 10, 1, 4, 150),
            "other has +5.0 points on near (in domain) and +0.0 points on far (within the spread) at 2.0 x "
            "the latency, 1.5 x the training: other would be worth a change.",
        ),
        (
            (45, 1, 6, 1, 1, 50),
            "-4.0 points on far at 0.5 x the latency, 0.5 x the training: none is worth a change.",
        ),
        ((40.5, 1, 10.5, 1, 1, 50), "0.5 x the training: other would be worth a change."),
        (
            (40.5, 1, 10.5, 1, 3, 50),
            "at 1.5 x the latency, 0.5 x the training: none is worth a change.",
        ),
    ],
)
def test_the_verdict_follows_the_numbers(other, said):
    sets = {"near": "near (in domain)", "far": "far"}
    text = students.verdict(table(default=(40, 1, 10, 1, 2, 100), other=other), sets)
    assert (
        text.startswith(
            "default reaches 40.0 ± 1.0 % on near (in domain) and 10.0 ± 1.0 % on far; "
        )
        and said in text
    )
    assert students.verdict(table(default=(40, 1, 10, 1, 2, 100)), sets).endswith(
        "no other student was asked for."
    )


def test_the_summary_is_of_every_student_s_seeds():
    main = pd.DataFrame(
        [("demo-student", "near", 0.1), ("demo-student", "near", 0.3), ("demo-vit", "near", 0.7)],
        columns=["student", "set", "value"],
    )
    cost = pd.DataFrame(
        {"latency_ms": [2.0, 1.0]}, index=pd.Index(["demo-student", "demo-vit"], name="student")
    )
    made = students.summary(main, cost, ["near"])
    assert (
        made.loc["demo-vit", "near mean"] == pytest.approx(70)
        and made.loc["demo-vit", "latency_ms"] == 1.0
    )
    assert (
        made.loc["demo-student", "near mean"] == pytest.approx(20)
        and made.loc["demo-vit", "near std"] == 0
    )
    assert made.loc["demo-student", "near std"] == pytest.approx(20 / 2**0.5)


@pytest.mark.parametrize("name", ["demo-student", "demo-mci", "demo-vit"])
def test_the_candidates_fold_and_share_preprocessing_and_text_tower(name):
    torch.manual_seed(0)
    model, _, preprocess, tokenizer = models.create(name)
    model.train()
    with torch.no_grad():
        for _ in range(3):  # statistics other than the initial ones
            model.encode_image(torch.randn(16, 3, 32, 32))
    x = torch.randn(5, 3, 32, 32)
    fast = models.for_inference(model)
    with torch.no_grad():
        torch.testing.assert_close(
            fast.encode_image(x), model.eval().encode_image(x), atol=1e-4, rtol=1e-3
        )
    assert sum(p.numel() for p in fast.visual.parameters()) <= sum(
        p.numel() for p in model.visual.parameters()
    )
    default, _, other, _ = models.create("demo-student")
    assert repr(preprocess) == repr(other) and tokenizer(["a"]).shape == (1, 16)
    text = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("visual."))
    assert text == sum(
        p.numel() for n, p in default.named_parameters() if not n.startswith("visual.")
    )
