import dataclasses

import faiss
import numpy as np
import pytest

from mclip.cluster import ClusterError, assign, cluster, read, write
from mclip.data.stores import clusters as cluster_store
from mclip.data.stores.embeddings import EmbeddingsError


def blobs(n=400, k=5, d=8, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(d, d)))[0][:k]
    which = np.arange(n) % k
    return centres[which] + 0.05 * rng.normal(size=(n, d)), which


def test_finds_the_blobs_whatever_the_rows_lengths():
    rows, which = blobs()
    rows *= np.random.default_rng(1).uniform(0.1, 9, (len(rows), 1))
    best = max(
        (cluster(rows, 5, iterations=10, seed=s) for s in range(4)), key=lambda c: c.objective[-1]
    )
    assert best.centres.dtype == np.float32
    assert best.centres.shape == (5, 8)
    np.testing.assert_allclose(np.linalg.norm(best.centres, axis=1), 1, atol=1e-6)
    assert best.labels.dtype == np.int64
    assert best.sizes.tolist() == [80] * 5
    assert len(set(zip(best.labels.tolist(), which.tolist(), strict=True))) == 5


def test_labels_are_the_nearest_centres_and_the_objective_rises():
    rows = np.random.default_rng(0).normal(size=(500, 12))
    result = cluster(rows, 20, iterations=15, seed=0)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    product = unit @ result.centres.T.astype(np.float64)
    np.testing.assert_allclose(product[np.arange(500), result.labels], product.max(1), atol=1e-6)
    np.testing.assert_allclose(result.similarity, product.max(1), atol=1e-6)
    assert len(result.objective) == 15
    assert (np.diff(result.objective) > -1e-6).all()
    assert result.objective[-1] <= result.similarity.mean() + 1e-6
    assert result.sizes.sum() == 500


def test_converged_centres_are_the_normalised_means():
    rows, _ = blobs()
    result = cluster(rows, 5, iterations=30, seed=0)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for j, centre in enumerate(result.centres):
        mean = unit[result.labels == j].mean(0)
        np.testing.assert_allclose(centre, mean / np.linalg.norm(mean), atol=1e-5)


def test_same_seed_same_bytes_with_any_number_of_threads(tmp_path):
    rows, before = np.random.default_rng(0).normal(size=(3000, 16)), faiss.omp_get_max_threads()
    try:
        for threads in (1, 2, 3):
            faiss.omp_set_num_threads(threads)
            write(tmp_path / str(threads), cluster(rows, 40, iterations=5, seed=3))
    finally:
        faiss.omp_set_num_threads(before)
    for name in ("centres.npy", "labels.parquet"):
        assert len({(tmp_path / str(t) / name).read_bytes() for t in (1, 2, 3)}) == 1
    other = cluster(rows, 40, iterations=5, seed=4)
    assert not np.array_equal(other.centres, read(tmp_path / "1").centres)


def test_write_and_read(tmp_path):
    rows, _ = blobs()
    result = cluster(
        rows.astype(np.float16), 5, iterations=3, seed=0, keys=[f"k{i:03d}" for i in range(400)]
    )
    write(tmp_path, result)
    again = read(tmp_path)
    for name in ("centres", "labels", "similarity", "objective", "keys"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["centres.npy", "labels.parquet"]
    (tmp_path / "centres.npy").unlink()
    with pytest.raises(
        ClusterError, match=r"centres.npy is missing: run `dvc repro cluster` first"
    ):
        read(tmp_path)


def test_reading_another_run_s_centres_fails(tmp_path):
    rows, _ = blobs()
    write(tmp_path, cluster(rows, 5, iterations=3, seed=0))
    np.save(tmp_path / "centres.npy", np.ones((2, 8), np.float32))
    with pytest.raises(
        ClusterError, match="label [234], but there are 2 centres: run `dvc repro -f cluster`"
    ):
        read(tmp_path)


def test_a_negative_label_fails(tmp_path):
    rows, _ = blobs()
    result = cluster(rows, 5, iterations=3, seed=0)
    write(
        tmp_path,
        dataclasses.replace(result, labels=np.where(np.arange(400) == 7, -1, result.labels)),
    )
    for reader in (read, lambda folder: list(cluster_store.labels(folder))):
        with pytest.raises(ClusterError, match="label -1, but there are 5 centres"):
            reader(tmp_path)


def test_assign_other_rows():
    rows, _ = blobs()
    result = cluster(rows, 5, iterations=5, seed=0)
    labels, _ = assign(result.centres * 3, result.centres)
    assert labels.tolist() == list(range(5))
    with pytest.raises(ClusterError, match="embeddings are 3 wide, the cluster centres 8"):
        assign(np.ones((2, 3)), result.centres)


def test_edges():
    rows, _ = blobs(n=6)
    assert cluster(rows, 1, iterations=2, seed=0).sizes.tolist() == [6]
    every = cluster(rows, 6, iterations=2, seed=0)
    assert every.sizes.tolist() == [1] * 6
    assert "cluster.clusters: 6 clusters of 6 images are 1.0 each" in every.warning
    assert cluster(blobs()[0], 5, iterations=1, seed=0).warning == ""
    same = cluster(np.ones((30, 4)), 3, iterations=2, seed=0)
    assert np.isfinite(same.centres).all()


@pytest.mark.parametrize(
    ("k", "message"), [(7, r"cluster\.clusters: 7 clusters of 6 images"), (0, "between 1 and 6")]
)
def test_wrong_k(k, message):
    with pytest.raises(ClusterError, match=message):
        cluster(blobs(n=6)[0], k, iterations=2, seed=0)


def test_bad_rows():
    rows, _ = blobs(n=6)
    rows[2] = np.nan
    with pytest.raises(EmbeddingsError, match="row 2 is not finite"):
        cluster(rows, 2, iterations=2, seed=0)
    with pytest.raises(ClusterError, match=r"cluster\.iterations"):
        cluster(blobs(n=6)[0], 2, iterations=0, seed=0)


def test_chosen_rows_as_if_the_others_were_not_there(tmp_path):
    rows = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float16)
    chosen = np.arange(60) % 3 > 0
    keys = np.array([f"k{i}" for i in range(60)])
    parts = [tmp_path / "0.npy", tmp_path / "1.npy"]
    np.save(parts[0], rows[:25]), np.save(parts[1], rows[25:])
    alone = cluster(rows[chosen], 4, iterations=5, seed=1, keys=keys[chosen])
    among = cluster(parts, 4, iterations=5, seed=1, keys=keys, chosen=chosen)
    assert np.array_equal(alone.centres, among.centres) and np.array_equal(
        alone.labels, among.labels
    )
    assert among.keys.tolist() == keys[chosen].tolist() and np.array_equal(
        alone.similarity, among.similarity
    )
    with pytest.raises(ClusterError, match="41 clusters of 40 images"):
        cluster(rows, 41, iterations=1, seed=0, chosen=chosen)


def test_few_points_move_the_centres_and_every_row_has_a_label():
    rng = np.random.default_rng(0)
    rows = np.eye(6)[rng.integers(0, 3, 900)] + 0.05 * rng.standard_normal((900, 6))
    all_of_them, few = (
        cluster(rows, 3, iterations=10, seed=0, points=points) for points in (None, 20)
    )
    assert len(few.labels) == 900 and few.sizes.sum() == 900
    nearest = (all_of_them.centres @ few.centres.T).max(1)
    assert (nearest > 0.99).all() and not np.array_equal(few.centres, all_of_them.centres)
    again = cluster(rows, 3, iterations=10, seed=0, points=20)
    assert np.array_equal(few.centres, again.centres)
    enough = cluster(rows, 3, iterations=10, seed=0, points=300)
    assert np.array_equal(enough.centres, all_of_them.centres)
    assert few.objective.max() <= 1 + 1e-6
