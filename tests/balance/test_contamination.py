"""Training pictures that show a test picture: found exactly, listed, dropped on request."""

import json

import numpy as np
import pandas as pd
import pytest

from mclip import cli
from mclip.balance.contamination import contaminated, nearest
from mclip.data.check import check_shards
from mclip.data.shards import Sample, ShardError, iter_samples, write_shards
from mclip.data.stores.embeddings import EmbeddingsError
from tests.evaluate.sets import png, write_classification

from .test_balance import clumps

COLOURS = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20), (20, 250, 250)]


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("metric", ["l2", "sql2", "cosine"])
def test_equals_brute_force(metric, tmp_path):
    rows = clumps(n=160)
    train, sets = rows[:90], [rows[90:120], rows[120:121], rows[121:]]
    np.save(tmp_path / "a.npy", train[:40])
    np.save(tmp_path / "b.npy", train[40:])
    hits = 0
    for source in (train, [tmp_path / "a.npy", tmp_path / "b.npy"]):
        found = nearest(source, sets, threshold=0.08, metric=metric)
        for one, others in zip(found, sets, strict=True):
            square = ((unit(train)[:, None] - unit(others)[None]) ** 2).sum(-1)
            distance = {"l2": np.sqrt(square), "sql2": square, "cosine": square / 2}[metric]
            near = np.flatnonzero(distance.min(1) <= 0.08)
            np.testing.assert_array_equal(one.row, near)
            np.testing.assert_array_equal(one.other, distance[near].argmin(1))
            np.testing.assert_allclose(one.square, square[near].min(1), atol=1e-12)
            hits += len(near)
    assert hits > 20


def test_many_rows_in_several_cells_and_no_set():
    rng = np.random.default_rng(0)
    train, others = rng.normal(size=(6000, 24)), rng.normal(size=(300, 24))
    train[[5, 17, 5999]] = others[[3, 3, 299]] * 7 + 1e-4
    (found,) = nearest(train, [others], threshold=1e-3, metric="sql2")
    assert found.row.tolist() == [5, 17, 5999] and found.other.tolist() == [3, 3, 299]
    assert nearest(train[:9], [], threshold=1e-3, metric="sql2") == []
    empty = contaminated(train, range(6000), {"none": ([], others[:0])}, threshold=1, metric="l2")
    assert list(empty.columns) == ["key", "set", "picture", "distance"] and not len(empty)
    with pytest.raises(EmbeddingsError, match="no rows"):
        nearest([], [others], threshold=1, metric="l2")


@pytest.fixture
def shown(tmp_path, monkeypatch, student):
    """Ten pairs, of which k2 and k7 show a picture of the set `mine`, and how to ask."""
    monkeypatch.chdir(tmp_path)
    pictures = [png(COLOURS[i % 5], noise=i, size=32) for i in range(10)]
    test = [png(COLOURS[i % 5], noise=100 + i, size=32) for i in range(5)]
    test[1], test[4] = pictures[2], pictures[7]
    samples = [
        Sample(f"k{i}", picture, "png", f"picture {i}", {}) for i, picture in enumerate(pictures)
    ]
    write_shards(samples, tmp_path / "pairs", shard_size=4)
    write_classification(
        tmp_path / "sets/mine", [(data, i) for i, data in enumerate(test)], "abcde", ["a {c}"]
    )
    return ["check", "pairs/*.tar", "--against", "sets/mine", "--teacher", student]


def test_the_command_counts_lists_and_drops(shown, tmp_path, capsys):
    words = [*shown, "--threshold", "1e-6", "--workers", "1"]
    assert cli.main([*words, "--list", "found.csv"]) == 0
    said = capsys.readouterr().out
    assert "10 samples can be used" in said
    assert "2 pairs show a test picture:\n          2  mine\nk2: s0001 of mine, at 0.0000" in said
    found = pd.read_csv("found.csv")
    assert found["key"].tolist() == ["k2", "k7"] and found["picture"].tolist() == ["s0001", "s0004"]

    assert cli.main([*words, "--manifest", "checked", "--drop", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert [entry["key"] for entry in manifest["contaminated"]] == ["k2", "k7"]
    assert [(e["key"], e["reason"]) for e in manifest["skipped"]] == [
        ("k2", "left out: shows s0001 of mine"),
        ("k7", "left out: shows s0004 of mine"),
    ]
    kept = [f"k{i}" for i in range(10) if i not in (2, 7)]
    assert [sample.key for sample in iter_samples("checked")] == kept

    manifest = check_shards(["pairs/*.tar"], "data", leave_out="found.csv", workers=1)
    assert manifest["samples"] == 8 and len(manifest["skipped"]) == 2
    assert [sample.key for sample in iter_samples("data")] == kept


def test_embeddings_that_are_there_are_taken(shown, student, capsys):
    from mclip import embed

    embed.run({"t": student}, pairs="pairs", out="emb", cache="cache")
    words = ["--embeddings", "emb/t", "--threshold", "1e-6", "--workers", "1"]
    assert cli.main([*shown, *words]) == 0
    assert "2 pairs show a test picture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "cifar10"], "--against needs --teacher and --threshold"),
        (["--drop"], "--list, --drop and --embeddings are for --against"),
        (
            ["--against", "sets/mine", "--teacher", "demo-student", "--threshold", "5"],
            "--threshold",
        ),
        (["--against", "cifar", "--teacher", "demo-student", "--threshold", "1"], "'cifar10'"),
    ],
)
def test_wrong_use(shown, words, message, capsys):
    assert cli.main(["check", "pairs/*.tar", "--workers", "1", *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_table_that_is_none(tmp_path):
    (tmp_path / "found.csv").write_text("url\na\n")
    for name, message in (("found.csv", "no column key"), ("none.csv", "No such file")):
        with pytest.raises(ShardError, match=f"data.leave_out: .*{name}: {message}"):
            check_shards(["x.tar"], tmp_path / "out", leave_out=tmp_path / name)
