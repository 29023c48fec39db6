import itertools
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import webdataset

from mclip import cli
from mclip.balance import (
    BalanceError,
    balance,
    check_kept,
    components,
    convert,
    forest,
    links,
    read,
    removed_curve,
    representative_distance,
    spanning_forest,
    threshold_that_removes,
    write,
)
from mclip.data.shards import Sample, iter_samples, write_shards
from mclip.data.stores import embeddings as embedding_store
from mclip.data.stores.embeddings import EmbeddingsError
from mclip.data.stores.rows import Rows
from mclip.system.workers import WorkerError, run_tasks
from tests.world import png

DISTANCE = {
    "l2": lambda x, y: np.sqrt(((x - y) ** 2).sum()),
    "sql2": lambda x, y: ((x - y) ** 2).sum(),
    "cosine": lambda x, y: 1 - (x * y).sum(),
}


def brute_force(embeddings, keys, threshold, metric):
    """The definition, in float64 and loops: {lowest key: (sorted members, representative)} and
    distances.
    """
    unit = np.asarray(embeddings, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    n = len(unit)
    parent = list(range(n))

    def find(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for i in range(n):
        for j in range(i):
            if DISTANCE[metric](unit[i], unit[j]) <= threshold:
                parent[find(i)] = find(j)
    sets, distance = {}, {}
    for root in {find(i) for i in range(n)}:
        members = sorted((i for i in range(n) if find(i) == root), key=lambda i: keys[i])
        centroid = np.mean([unit[i] for i in members], axis=0)
        for i in members:
            distance[keys[i]] = np.linalg.norm(unit[i] - centroid)
        nearest = min(distance[keys[i]] for i in members)
        best = min(keys[i] for i in members if distance[keys[i]] <= nearest + 1e-9)
        sets[keys[members[0]]] = ([keys[i] for i in members], best)
    return sets, distance


def as_sets(result):
    sets = {}
    for s in range(result.set_id.max() + 1):
        at = result.set_id == s
        members = sorted(result.keys[at].tolist())
        (kept,) = result.keys[at & result.keep].tolist()
        sets[members[0]] = (members, kept)
    return sets


def clumps(n=70, d=9, seed=0, dtype=np.float32):
    """Groups of near rows at all distances, with exact duplicates, of any length."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(n // 5, d))
    rows = centre[rng.integers(len(centre), size=n)] + rng.normal(size=(n, d)) * rng.uniform(
        0, 0.4, (n, 1)
    )
    rows[n // 2 : n // 2 + 4] = rows[:4]
    return (rows * rng.uniform(0.1, 30, (n, 1))).astype(dtype)


@pytest.mark.parametrize("metric", ["l2", "sql2", "cosine"])
@pytest.mark.parametrize("threshold", [0.01, 0.07, 0.3])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equals_brute_force(metric, threshold, dtype):
    rows = clumps(dtype=dtype)
    keys = [f"{k:05d}" for k in np.random.default_rng(1).permutation(len(rows))]
    result = balance(rows, keys, threshold=threshold, metric=metric, tile=16)
    sets, distance = brute_force(rows, keys, threshold, metric)
    assert as_sets(result) == sets
    np.testing.assert_allclose(result.centroid_distance, [distance[k] for k in keys], atol=1e-12)
    assert result.set_id.dtype == np.int64
    assert result.keep.dtype == bool
    assert result.removed_fraction == pytest.approx(1 - len(sets) / len(rows))


@pytest.mark.parametrize("tile", [1, 2, 7, 69, 70, 5000])
def test_any_tile_size(tile):
    rows = clumps()
    want = balance(rows, threshold=0.1, metric="sql2")
    got = balance(rows, threshold=0.1, metric="sql2", tile=tile)
    np.testing.assert_array_equal(got.set_id, want.set_id)
    np.testing.assert_array_equal(got.keep, want.keep)
    np.testing.assert_allclose(got.centroid_distance, want.centroid_distance, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_order_of_the_rows_does_not_matter(seed):
    rows, keys = clumps(seed=seed), np.array([f"k{i:03d}" for i in range(70)])
    want = balance(rows, keys, threshold=0.1, metric="sql2")
    shuffle = np.random.default_rng(seed).permutation(70)
    got = balance(rows[shuffle], keys[shuffle], threshold=0.1, metric="sql2", tile=8)
    np.testing.assert_array_equal(got.set_id, want.set_id[shuffle])
    np.testing.assert_array_equal(got.keep, want.keep[shuffle])


def on_circle(degrees):
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_chain_is_one_set_and_its_middle_is_kept():
    rows = on_circle([0, 5, 10, 15, 20, 90])  # neighbours 5 degrees apart, the ends 20
    result = balance(rows, threshold=2 * np.sin(np.deg2rad(2.6)), metric="l2")
    assert result.set_id.tolist() == [0, 0, 0, 0, 0, 1]
    assert result.keep.tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("keys", [["b", "a"], ["a", "b"], [10, 9], [2, 10]])
def test_ties_go_to_the_lowest_key(keys):
    result = balance(on_circle([0, 1]), keys, threshold=0.1, metric="l2")
    assert result.keys[result.keep].tolist() == [min(keys)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_exact_duplicates_under_a_tiny_threshold(dtype):
    rows = np.repeat(np.random.default_rng(0).normal(size=(3, 33)), 50, axis=0).astype(dtype)
    scale = np.random.default_rng(1).uniform(0.1, 9, (150, 1))  # length does not matter
    result = balance(rows.astype(np.float64) * scale, threshold=1e-6, metric="sql2", tile=40)
    assert result.set_sizes.tolist() == [50, 50, 50]
    assert np.flatnonzero(result.keep).tolist() == [0, 50, 100]
    assert result.centroid_distance.max() < 1e-12


def test_large_sets_of_duplicates():
    rows = np.repeat(np.random.default_rng(0).normal(size=(4, 5)), 300, axis=0)
    assert balance(rows, threshold=1e-7, metric="sql2").set_sizes.tolist() == [300] * 4


@pytest.mark.parametrize("side", [-1, 1])
def test_pairs_next_to_the_threshold_are_decided_in_float64(side):
    # the step is far below what a float32 product can tell from the threshold
    limit = 0.07
    angle = 2 * np.arcsin(np.sqrt(limit) / 2)
    rng = np.random.default_rng(0)
    x, y = np.linalg.qr(rng.normal(size=(300, 2)))[0].T
    near = np.cos(angle + side * 1e-9) * x + np.sin(angle + side * 1e-9) * y
    result = balance(np.stack([x, near]), threshold=limit, metric="sql2")
    assert len(result.set_sizes) == (2 if side > 0 else 1)


def test_metrics_agree_at_converted_thresholds():
    rows = clumps()
    results = [balance(rows, threshold=t, metric=m) for m, t in convert(0.07, "sql2").items()]
    for other in results[1:]:
        np.testing.assert_array_equal(other.set_id, results[0].set_id)
    assert convert(0.07, "sql2") == {"l2": pytest.approx(0.2645751), "sql2": 0.07, "cosine": 0.035}
    assert convert(0.07, "l2") == {
        "l2": 0.07,
        "sql2": pytest.approx(0.0049),
        "cosine": pytest.approx(0.00245),
    }
    assert convert(0.07, "cosine")["sql2"] == 0.14


def test_arrays_memmaps_and_files_are_alike(tmp_path):
    rows = clumps()
    np.save(tmp_path / "all.npy", rows)
    parts = [rows[:30], rows[30:30], rows[30:31], rows[31:]]
    files = []
    for k, part in enumerate(parts):
        files.append(tmp_path / f"part_{k}.npy")
        np.save(files[-1], part)
    want = balance(rows, threshold=0.1, metric="sql2")
    for source in (np.load(tmp_path / "all.npy", mmap_mode="r"), files, [str(f) for f in files]):
        got = balance(source, threshold=0.1, metric="sql2", tile=13)
        np.testing.assert_array_equal(got.set_id, want.set_id)
        np.testing.assert_array_equal(got.keep, want.keep)


@pytest.mark.parametrize("metric", ["l2", "sql2", "cosine"])
def test_curve_equals_balancing_at_each_threshold(metric):
    rows = clumps(n=90)
    thresholds = [0.5, 0.01, 0.03, 0.1, 0.2, 1.0]
    want = [balance(rows, threshold=t, metric=metric).removed_fraction for t in thresholds]
    np.testing.assert_allclose(
        removed_curve(rows, thresholds, metric=metric, tile=20), want, atol=1e-12
    )
    assert len(removed_curve(rows, [], metric=metric)) == 0


@pytest.mark.parametrize("metric", ["l2", "sql2", "cosine"])
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.25, 0.4, 0.77, 0.95])
def test_the_threshold_that_removes_a_fraction_is_the_smallest(fraction, metric):
    rows = clumps(n=90)[:85]  # four of them exact duplicates of others
    threshold = threshold_that_removes(rows, fraction, metric=metric, tile=20)
    removed = int((~balance(rows, threshold=threshold, metric=metric).keep).sum())
    wanted = round(fraction * len(rows))
    assert removed == max(wanted, 4)  # which go together
    if wanted > 4:
        less = balance(rows, threshold=threshold * (1 - 1e-9), metric=metric)
        assert (~less.keep).sum() == removed - 1


@pytest.mark.parametrize(
    ("fraction", "message"),
    [(0.0, "above 0 and below 1"), (1.0, "above 0 and below 1"), (0.99, "would leave none")],
)
def test_a_fraction_that_cannot_be_removed(fraction, message):
    with pytest.raises(BalanceError, match=f"remove: .*{message}"):
        threshold_that_removes(clumps()[:8], fraction, metric="sql2")


def test_a_threshold_that_removes_nearly_everything_is_named():
    rows = 1 + 0.01 * np.random.default_rng(0).normal(size=(300, 8))  # as of a random teacher
    result = balance(rows, threshold=0.07, metric="sql2")
    message = (
        r"balance.threshold: 0.07 \(sql2\) links nearly everything, 1 of 300 images .*`remove`"
    )
    with pytest.raises(BalanceError, match=message):
        check_kept(result, "balance.threshold")
    threshold = threshold_that_removes(rows, 0.4, metric="sql2")
    result = balance(rows, threshold=threshold, metric="sql2")
    assert result.keep.sum() == 180
    check_kept(result)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rows_that_are_left_out_are_as_if_they_were_not_there(tmp_path, workers):
    good, skip = clumps(), np.array([0, 20, 21, 72, 73])
    rows = np.full((75, good.shape[1]), np.nan, np.float32)
    rows[np.setdiff1d(np.arange(75), skip)] = good
    rows[20] = 0
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    np.save(files[0], rows[:30])
    np.save(files[1], rows[30:])
    for source in [rows, files]:
        every = Rows(source)
        assert every.without_direction() == [
            (row, "all zeros" if row == 20 else "not finite (NaN or infinity)") for row in skip
        ]
        left = Rows(source, skip)
        assert len(left) == 70 and left.without_direction() == []
        options = {"threshold": 0.1, "metric": "sql2"}
        want, got = balance(good, **options), balance(left, **options, workers=workers)
        np.testing.assert_array_equal(got.set_id, want.set_id)
        np.testing.assert_array_equal(got.keep, want.keep)
        curve = [removed_curve(x, [0.1, 0.4], metric="sql2").tolist() for x in (good, left)]
        assert curve[0] == curve[1]
    assert every.name(72) == (str(files[1]), 42) and left.name(68) == (str(files[1]), 41)
    with pytest.raises(EmbeddingsError, match="no rows but those"):
        Rows(rows[:1], [0])


def test_a_forest_of_forests_is_that_of_all_links():
    """Links are collected in batches, and each worker has those of its own tiles."""
    rng = np.random.default_rng(0)
    a, b = np.triu_indices(60, 1)
    links = a, b, rng.integers(9, size=len(a)) / 9  # with ties
    whole = forest.merged([links], 60)
    parts = np.array_split(rng.permutation(len(a)), 7)
    kept = forest.none()
    for part in parts:
        kept = forest.merged([kept, tuple(x[part] for x in links)], 60)
    assert len(whole[0]) == 59
    for one, other in zip(kept, whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_row():
    result = balance(np.ones((1, 3)), threshold=0.1, metric="l2")
    assert (result.set_id.tolist(), result.keep.tolist(), result.centroid_distance.tolist()) == (
        [0],
        [True],
        [0],
    )


def changed(value, row=3):
    rows = clumps()
    rows[row] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "keys", "options", "error", "message"),
    [
        (changed(np.nan), None, {}, EmbeddingsError, "embeddings: row 3 is not finite"),
        (changed(np.inf), None, {}, EmbeddingsError, "embeddings: row 3 is not finite"),
        (changed(0.0), None, {}, EmbeddingsError, "embeddings: row 3 is all zeros"),
        (
            clumps(),
            ["a"] * 2 + [str(i) for i in range(68)],
            {},
            EmbeddingsError,
            "keys: a occurs 2 times, 1 keys are",
        ),
        (clumps(), ["a"], {}, EmbeddingsError, "keys: 1 for 70 embeddings"),
        (np.empty((0, 4)), None, {}, EmbeddingsError, "there are no rows"),
        ([], None, {}, EmbeddingsError, "there are no rows"),
        (np.ones(4), None, {}, EmbeddingsError, r"expected floats of shape \(n, d\)"),
        (np.ones((4, 4), int), None, {}, EmbeddingsError, r"expected floats of shape \(n, d\)"),
        (
            clumps(),
            None,
            {"threshold": 0.0},
            BalanceError,
            "threshold: with metric sql2 it lies above 0",
        ),
        (clumps(), None, {"threshold": 4.1}, BalanceError, "at most 4"),
        (clumps(), None, {"threshold": 2.1, "metric": "l2"}, BalanceError, "at most 2"),
        (clumps(), None, {"threshold": float("nan")}, BalanceError, "threshold"),
        (
            clumps(),
            None,
            {"metric": "euclid"},
            BalanceError,
            "metric: expected one of l2, sql2, cosine",
        ),
        (clumps(), None, {"tile": 0}, BalanceError, "tile"),
    ],
)
def test_errors(rows, keys, options, error, message):
    with pytest.raises(error, match=message):
        balance(rows, keys, **{"threshold": 0.1, "metric": "sql2", **options})


def test_the_curve_checks_its_options_too():
    with pytest.raises(BalanceError, match="tile: expected at least 1 row, found 0"):
        removed_curve(clumps(), [0.1], metric="sql2", tile=0)


def test_errors_name_the_file(tmp_path):
    good, narrow, bad, cut = (tmp_path / f"{name}.npy" for name in ("good", "narrow", "bad", "cut"))
    np.save(good, clumps())
    np.save(narrow, clumps(d=4))
    np.save(bad, changed(np.nan, row=5))
    cut.write_bytes(good.read_bytes()[:-10])
    for files, message in [
        ([good, narrow], "narrow.npy: rows are 4 wide, those of .*good.npy 9"),
        ([good, bad], "bad.npy: row 5 is not finite"),
        ([good, cut], "cut.npy: not a whole .npy file"),
        ([good, tmp_path / "none.npy"], "none.npy: no such file"),
    ]:
        with pytest.raises(EmbeddingsError, match=message):
            balance(files, threshold=0.1, metric="sql2")


def test_write_and_read(tmp_path):
    result = balance(clumps(), [f"k{i}" for i in range(70)], threshold=0.1, metric="sql2")
    write(tmp_path / "a", result)
    write(tmp_path / "b", result)
    again = read(tmp_path / "a")
    for name in ("set_id", "keep", "centroid_distance", "keys"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    assert (again.threshold, again.metric) == (0.1, "sql2")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["balance.parquet"]
    assert (tmp_path / "a/balance.parquet").read_bytes() == (
        tmp_path / "b/balance.parquet"
    ).read_bytes()
    with pytest.raises(
        BalanceError, match=r"balance.parquet is missing: run `dvc repro balance` first"
    ):
        read(tmp_path / "c")
    (tmp_path / "a/balance.parquet").write_bytes(b"x")
    with pytest.raises(BalanceError, match="is no file of mclip"):
        read(tmp_path / "a")


def test_summary_says_it_all():
    result = balance(on_circle([0, 1, 90]), threshold=0.07, metric="l2")
    assert result.summary() == (
        "3 images, 2 kept, 1 removed (33.3 %); 1 sets of several images, the largest of 2; "
        "threshold l2 0.07, sql2 0.0049, cosine 0.00245"
    )


def clip_retrieval_folder(folder, rows, column, keys, cuts=(0, 20, 70)):
    for part in ("img_emb", "metadata"):
        (folder / part).mkdir(parents=True)
    for k, (s, e) in enumerate(pairwise(cuts)):
        k = k + 9  # img_emb_9, img_emb_10: numeric order, not the names'
        np.save(folder / f"img_emb/img_emb_{k}.npy", rows[s:e].astype(np.float16))
        pd.DataFrame({column: keys[s:e]}).to_parquet(folder / f"metadata/metadata_{k}.parquet")
    return folder


def test_the_command_and_the_pipeline_name_samples_alike(tmp_path, capsys):
    """A folder whose metadata has key, uid and image_path, as DataComp's does."""
    keys, uids = [f"k{69 - i:02d}" for i in range(70)], [f"{i:032x}" for i in range(70)]
    folder = clip_retrieval_folder(tmp_path / "emb", clumps(), "key", keys)
    for k, (s, e) in {9: (0, 20), 10: (20, 70)}.items():
        paths = [f"{i}.jpg" for i in range(s, e)]
        table = pd.DataFrame({"image_path": paths, "uid": uids[s:e], "key": keys[s:e]})
        table.to_parquet(folder / f"metadata/metadata_{k}.parquet")
    args = [str(folder), str(tmp_path / "out"), "--threshold", "0.1", "--metric", "sql2"]
    for option, column in [([], keys), (["--key", "uid"], uids)]:
        assert cli.main(["balance", *args, *option]) == 0
        assert read(tmp_path / "out").keys.tolist() == column
    assert embedding_store.index(folder).keys.tolist() == keys
    assert embedding_store.load(folder).keys == keys
    assert embedding_store.index(folder, "uid").keys.tolist() == uids
    capsys.readouterr()


def run_cli(*args):
    return subprocess.run(
        [sys.executable, "-m", "mclip.balance", *map(str, args)], capture_output=True, text=True
    )


@pytest.mark.slow
def test_cli_on_a_clip_retrieval_folder_of_datacomp_uids(tmp_path):
    rows = clumps(d=16)
    keys = [f"{(i * 0x9E3779B97F4A7C15F39CC0605CEDC835) % 2**128:032x}" for i in range(1, 71)]
    folder = clip_retrieval_folder(tmp_path / "emb", rows, "uid", keys)
    done = run_cli(folder, tmp_path / "out", "--threshold", 0.1, "--metric", "sql2")
    assert done.returncode == 0, done.stderr
    result, want = (
        read(tmp_path / "out"),
        balance(rows.astype(np.float16), keys, threshold=0.1, metric="sql2"),
    )
    assert done.stdout.strip() == want.summary()
    assert result.keys.tolist() == keys
    np.testing.assert_array_equal(result.keep, want.keep)
    uids = np.load(tmp_path / "out/kept_uids.npy", allow_pickle=False)
    assert uids.dtype == np.dtype("u8,u8")
    assert [f"{a:016x}{b:016x}" for a, b in uids.tolist()] == sorted(want.keys[want.keep])


def test_cli_errors_are_one_line(tmp_path, capsys):
    folder = clip_retrieval_folder(
        tmp_path / "emb", clumps(), "image_path", [str(i) for i in range(70)]
    )
    for args, message in [
        ((tmp_path / "none",), "none/img_emb is missing (clip-retrieval's layout is expected"),
        ((folder, "--key", "url"), "no column url"),
        ((folder, "--threshold", "9"), "threshold: with metric sql2"),
    ]:
        args = [
            str(a)
            for a in (
                args[0],
                tmp_path / "out",
                "--threshold",
                "0.1",
                "--metric",
                "sql2",
                *args[1:],
            )
        ]
        assert cli.main(["balance", *args]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_cli_without_metadata_and_with_too_little(tmp_path, capsys):
    folder = clip_retrieval_folder(
        tmp_path / "emb", clumps(), "image_path", [str(i) for i in range(70)]
    )
    args = [str(folder), str(tmp_path / "out"), "--threshold", "0.1", "--metric", "sql2"]
    pd.DataFrame({"image_path": ["a"]}).to_parquet(folder / "metadata/metadata_10.parquet")
    assert cli.main(["balance", *args]) == 2
    assert "metadata_10.parquet has 1 rows, img_emb_10.npy has 50" in capsys.readouterr().err
    (folder / "metadata/metadata_10.parquet").unlink()
    assert cli.main(["balance", *args]) == 2
    assert "there is no parquet file for img_emb_10.npy" in capsys.readouterr().err
    (folder / "metadata/metadata_9.parquet").unlink()
    assert cli.main(["balance", *args]) == 0
    assert read(tmp_path / "out").keys.tolist() == [f"{i:09d}" for i in range(70)]


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    rows = np.concatenate([clumps(n=300, seed=s) for s in range(20)])
    want = balance(rows, threshold=0.1, metric="sql2")
    # an hour passes from tile to tile: the state is saved after each
    monkeypatch.setattr(time, "monotonic", itertools.count(0, 3600).__next__)
    state, search, seen = tmp_path / "state.npz", links.search, []

    def watched(prepared, *args, tiles, done, stop=None, **options):
        def after(tile):
            done(tile)
            seen.append(tile)
            if len(seen) == stop:
                raise KeyboardInterrupt

        return search(prepared, *args, tiles=tiles, done=after, **options)

    monkeypatch.setattr(links, "search", lambda *args, **options: watched(*args, stop=4, **options))
    with pytest.raises(KeyboardInterrupt):
        balance(rows, threshold=0.1, metric="sql2", tile=64, state=state)
    assert state.exists()
    first = set(seen)
    monkeypatch.setattr(links, "search", watched)
    seen.clear()
    got = balance(rows, threshold=0.1, metric="sql2", tile=64, state=state)
    assert len(first) >= 4 and seen and len(first & set(seen)) <= 1 and not state.exists()
    np.testing.assert_array_equal(got.set_id, want.set_id)
    np.testing.assert_array_equal(got.keep, want.keep)


def test_the_state_of_other_rows_is_not_taken(tmp_path, monkeypatch):
    state = tmp_path / "state.npz"
    np.savez(
        state,
        about=np.zeros(32, np.uint8),
        finished=np.ones(1, bool),
        parent=np.zeros(70, np.int64),
    )
    got = balance(clumps(), threshold=0.1, metric="sql2", state=state)
    np.testing.assert_array_equal(
        got.set_id, balance(clumps(), threshold=0.1, metric="sql2").set_id
    )
    state.write_bytes(b"PK nothing")
    with pytest.raises(components.StateError, match="not the state of a balancing run; delete it"):
        balance(clumps(), threshold=0.1, metric="sql2", state=state)


def test_distance_to_the_representative_shows_chains():
    rows = on_circle([0, 5, 10, 15, 20, 90])
    result = balance(rows, threshold=2 * np.sin(np.deg2rad(2.6)), metric="l2")
    expected = [(2 * np.sin(np.deg2rad(d / 2))) ** 2 for d in (10, 5, 0, 5, 10, 0)]
    np.testing.assert_allclose(representative_distance(rows, result, chunk=4), expected, atol=1e-12)


@pytest.mark.slow
def test_many_workers_find_the_same_sets(tmp_path):
    """Three over files; test_what_workers_share_lies_where_it_is_told has two over an array."""
    rows = np.concatenate([clumps(n=300, seed=s) for s in range(10)])
    want = balance(rows, threshold=0.1, metric="sql2")
    paths = [tmp_path / f"{k}.npy" for k in range(2)]
    for path, part in zip(paths, np.split(rows, [900]), strict=True):
        np.save(path, part)
    got = balance(paths, threshold=0.1, metric="sql2", tile=64, workers=3)
    np.testing.assert_array_equal(got.set_id, want.set_id)
    np.testing.assert_array_equal(got.keep, want.keep)
    edges = [spanning_forest(paths, 0.3, metric="sql2", tile=64, workers=n) for n in (1, 3)]
    assert len(edges[0][0]) > 1000
    for one, many in zip(*edges, strict=True):
        np.testing.assert_array_equal(one, many)


@pytest.mark.slow
def test_what_workers_share_lies_where_it_is_told(tmp_path, monkeypatch):
    rows, told = np.concatenate([clumps(n=300, seed=s) for s in range(4)]), []

    def recorded(function, tasks, **options):
        told.extend(tasks)
        return run_tasks(function, tasks, **options)

    monkeypatch.setattr(components, "run_tasks", recorded)
    options = {"metric": "sql2", "tile": 64, "workers": 2, "scratch": tmp_path / "shared"}
    got, (_, _, square) = (
        balance(rows, threshold=0.1, **options),
        spanning_forest(rows, 0.1, **options),
    )
    assert len(square) == len(rows) - len(got.set_sizes)
    want = balance(rows, threshold=0.1, metric="sql2")
    np.testing.assert_array_equal(got.set_id, want.set_id)
    assert {Path(task[1]).parent for task in told} == {tmp_path / "shared"}
    assert list((tmp_path / "shared").iterdir()) == []


def test_wrong_workers(monkeypatch):
    with pytest.raises(WorkerError, match="workers: expected at least 1, found 0"):
        balance(clumps(), threshold=0.1, metric="sql2", workers=0)
    with pytest.raises(WorkerError, match="backend: expected one of processes, ray, found 'spark'"):
        balance(clumps(), threshold=0.1, metric="sql2", workers=2, backend="spark")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match="ray is not installed"):
        balance(clumps(), threshold=0.1, metric="sql2", workers=2, backend="ray")


@pytest.mark.slow
def test_more_files_than_a_process_begins_with(tmp_path):
    rows = clumps()
    for k, row in enumerate(rows):
        np.save(tmp_path / f"{k:03d}.npy", row[None])
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom mclip.balance import balance\n"
        "for most in (1000, 100):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (60, most))\n"
        "    files = sorted(Path(sys.argv[1]).glob('*.npy'))\n"
        "    try:\n"
        "        print(balance(files, threshold=0.1, metric='sql2').set_id.tolist())\n"
        "    except ValueError as err:\n"
        "        print(err)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    ).stdout.splitlines()
    assert said == [
        str(balance(rows, threshold=0.1, metric="sql2").set_id.tolist()),
        f"embeddings: {len(rows)} files, but this process may open 100: raise `ulimit -n`, or write larger files",
    ]


@pytest.mark.slow
def test_blocks_over_any_files(tmp_path):
    rows, files = clumps(), []
    for k, (start, stop) in enumerate([(0, 3), (3, 3), (3, 4), (4, 40), (40, 70)]):
        files.append(tmp_path / f"{k}.npy")
        np.save(files[-1], rows[start:stop])
    whole, parts = Rows(rows), Rows(files)
    for start in range(70):
        for stop in range(start, 71):
            a, b = whole.block(start, stop), parts.block(start, stop)
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_the_command_skips_counts_and_lists_bad_rows(tmp_path, capsys):
    rows, keys = clumps(), [f"k{i:02d}" for i in range(70)]
    rows[21], rows[3] = 0, np.nan
    folder = clip_retrieval_folder(tmp_path / "emb", rows, "key", keys)
    words = ["balance", str(folder), str(tmp_path / "out"), "--remove", "0.25"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert said.out.startswith("68 images, 51 kept, 17 removed (25.0 %)")
    assert "2 of 70 rows skipped:\n" in said.err
    assert "img_emb_10.npy: row 1 (k21) is all zeros\n" in said.err
    listed = json.loads((tmp_path / "out/skipped.json").read_text())
    assert [entry["key"] for entry in listed] == ["k03", "k21"]
    first = read(tmp_path / "out")
    assert set(keys) - set(first.keys.tolist()) == {"k03", "k21"}

    again = said.out.splitlines()[1].removeprefix("the same again: ").split()
    assert cli.main([*words[:3], *again]) == 0
    np.testing.assert_array_equal(read(tmp_path / "out").keep, first.keep)


def test_the_command_warns_where_nearly_everything_goes(tmp_path, capsys):
    rows = 1 + 0.01 * np.random.default_rng(0).normal(size=(70, 8))
    folder = clip_retrieval_folder(tmp_path / "emb", rows, "key", [str(i) for i in range(70)])
    words = [str(folder), str(tmp_path / "out"), "--threshold", "0.07", "--metric", "sql2"]
    assert cli.main(["balance", *words]) == 0
    assert "warning: --threshold: 0.07 (sql2) links nearly everything" in capsys.readouterr().err


def test_the_command_writes_the_kept_pairs_as_tars_that_open_clips_trainer_reads(
    tmp_path, monkeypatch, capsys
):
    rows, keys = clumps(), [f"k{i:02d}" for i in range(70)]
    folder = clip_retrieval_folder(tmp_path / "emb", rows, "key", keys)
    samples = [
        Sample(f"other{i}", png(i), "png", f"number {i}", {"uid": key, "key": "-"})
        for i, key in enumerate(keys[:60])  # ten are lacking
    ]
    write_shards(samples, tmp_path / "pairs", shard_size=25)
    out = tmp_path / "out"
    words = ["balance", str(folder), str(out), "--remove", "0.3", "--workers", "1"]
    for sources in [str(tmp_path / "pairs")], [str(tmp_path / "pairs/*.tar")]:
        assert cli.main([*words, "--write-shards", *sources]) == 0
        said = capsys.readouterr()
        result = read(out)
        kept = [i for i in range(60) if result.keep[result.keys.tolist().index(keys[i])]]
        assert f"{result.keep.sum() - len(kept)} kept images are not in the shards" in said.err
        tar = out / "pairs/pairs-000000.tar"
        assert f"--train-num-samples {len(kept)} --train-data '{tar}'" in said.out
        assert [s.caption for s in iter_samples(out / "pairs")] == [f"number {i}" for i in kept]
    trainer = pytest.importorskip("open_clip_train.data")
    assert trainer.get_dataset_size(str(tar)) == (len(kept), 1)
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(str(tar)),
        webdataset.tarfile_to_samples(),
        webdataset.select(trainer.filter_no_caption_or_no_image),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
    )
    read_back = list(pipeline)
    assert [sample["text"] for sample in read_back] == [f"number {i}" for i in kept]
    assert read_back[0]["image"].size == (20, 20)

    write_shards([Sample("x", png(0), "png", "x", {})], tmp_path / "else", shard_size=9)
    assert cli.main([*words, "--write-shards", str(tmp_path / "else")]) == 2
    assert "none of the 49 kept images is in these shards" in capsys.readouterr().err
