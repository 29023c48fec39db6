"""The baselines against their definitions in loops."""

import numpy as np
import pytest

from mclip.balance import prune
from mclip.cluster import cluster


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(12, 16))
    x = centre[rng.integers(12, size=300)] + 0.3 * rng.normal(size=(300, 16))
    x[200:260] = x[rng.integers(200, size=60)] + 0.02 * rng.normal(size=(60, 16))
    x[260:265] = x[0]
    return x.astype(np.float32)


@pytest.mark.parametrize("order", prune.ORDERS)
def test_semdedup_is_its_definition(rows, order):
    found = prune.semdedup_distances(rows, clusters=6, seed=1, order=order)
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    rank = np.random.default_rng(1).permutation(len(rows))
    similarity, labels = found.clusters.similarity, found.clusters.labels
    first = {"hard": similarity, "easy": -similarity, "random": rank}[order]
    for i in range(len(rows)):
        before = [
            j
            for j in range(len(rows))
            if labels[j] == labels[i] and (first[j], rank[j]) < (first[i], rank[i])
        ]
        expected = min((((unit[i] - unit[j]) ** 2).sum() for j in before), default=np.inf)
        assert found.square[i] == pytest.approx(expected, abs=2e-6)
    keep = prune.semdedup(rows, 250, clusters=6, seed=1, order=order)
    assert keep.sum() == 250 and found.square[keep].min() >= found.square[~keep].max()
    if order == "hard":  # of the five copies and the original one stays longest
        copies = np.r_[0, 260:265]
        assert np.isfinite(found.square[copies]).sum() >= 5


def test_large_clusters_go_by_blocks(rows, monkeypatch):
    big = np.tile(rows[:3], (2000, 1)) + np.random.default_rng(0).normal(size=(6000, 16)).astype(
        np.float32
    )
    square = prune.semdedup_distances(big, clusters=1, seed=0, iterations=1).square
    found = cluster(big, 1, iterations=1, seed=0)
    order = np.lexsort((np.random.default_rng(0).permutation(6000), found.similarity))
    unit = big / np.linalg.norm(big, axis=1, keepdims=True)
    last = order[-1]
    expected = ((unit[order[:-1]] - unit[last]) ** 2).sum(1).min()
    assert square[last] == pytest.approx(expected, abs=1e-5) and np.isinf(square[order[0]])
    assert np.isfinite(square).sum() == 5999


def test_density_keeps_the_far_ones_of_sparse_clusters(rows):
    keep = prune.density(rows, 100, clusters=8, seed=0)
    assert keep.sum() == 100
    found = cluster(rows, 8, iterations=20, seed=0)
    for c in range(8):
        mine = found.labels == c
        if (keep & mine).any() and (~keep & mine).any():
            assert (
                found.similarity[keep & mine].max() <= found.similarity[~keep & mine].min() + 1e-7
            )
    unit_sizes = found.sizes
    intra = np.array([(1 - found.similarity[found.labels == c]).mean() for c in range(8)])
    near = 1 - found.centres @ found.centres.T
    inter = np.array([np.sort(near[c])[1:].mean() for c in range(8)])
    p = np.exp(inter * intra / 0.1)
    target = 100 * p / p.sum()
    got = np.array([keep[found.labels == c].sum() for c in range(8)])
    free = (got > 1) & (
        got < unit_sizes
    )  # clusters at no bound are all off their target by the same
    assert np.ptp((got - target)[free]) <= 2


def test_budget_is_the_quadratic_programs_solution():
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    sizes, target = rng.integers(1, 40, 12), rng.uniform(0, 40, 12)
    count = int(sizes.sum() * 0.6)
    target *= count / target.sum()
    x = prune.whole_budget(target, sizes, count)
    assert x.sum() == count and (x >= 1).all() and (x <= sizes).all()
    exact = minimize(
        lambda x: ((x - target) ** 2).sum(),
        np.minimum(sizes, 2.0),
        bounds=[(1, s) for s in sizes],
        constraints={"type": "eq", "fun": lambda x: x.sum() - count},
    ).x
    assert np.abs(x - exact).max() < 1.01
    assert prune.whole_budget(np.full(3, 5.0), np.full(3, 9), 3).tolist() == [1, 1, 1]
    assert prune.whole_budget(np.full(3, 5.0), np.full(3, 9), 27).tolist() == [9, 9, 9]


def test_random():
    keep = prune.random(50, 20, seed=3)
    assert keep.sum() == 20 and np.array_equal(keep, prune.random(50, 20, seed=3))
    assert not np.array_equal(keep, prune.random(50, 20, seed=4))


def test_errors(rows):
    with pytest.raises(prune.PruneError, match="count: 400 rows to keep of 300"):
        prune.semdedup(rows, 400, clusters=3, seed=0)
    with pytest.raises(prune.PruneError, match="at least one of each of 8 clusters"):
        prune.density(rows, 5, clusters=8, seed=0)
    with pytest.raises(
        prune.PruneError, match="order: expected one of hard, easy, random, found 'best'"
    ):
        prune.semdedup(rows, 5, clusters=8, seed=0, order="best")
