import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mclip.balance.unionfind import Sets, minimum_forest


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_sets_equal_connected_components(batch):
    rng = np.random.default_rng(0)
    n = 500
    a, b = rng.integers(n, size=(2, 300))
    sets = Sets(n)
    for i in range(0, len(a), batch):
        sets.join(a[i : i + batch], b[i : i + batch])
        assert sets.joined(a[: i + batch], b[: i + batch]).all()
    expected = connected_components(
        coo_array((np.ones(300), (a, b)), shape=(n, n)), directed=False
    )[1]
    labels = sets.roots()
    assert len(np.unique(labels)) == expected.max() + 1
    assert len(np.unique(labels * n + expected)) == expected.max() + 1
    np.testing.assert_array_equal(
        labels, [np.flatnonzero(expected == e)[0] for e in expected]
    )  # its lowest row


def test_no_links():
    sets = Sets(3)
    sets.join(np.empty(0, np.int64), np.empty(0, np.int64))
    assert sets.roots().tolist() == [0, 1, 2] and sets.find(np.array([2])).tolist() == [2]


def test_a_minimum_forest_joins_what_the_edges_join_by_the_shortest():
    a, b = np.array([0, 1, 0, 3, 2]), np.array([1, 2, 2, 4, 5])  # 0 - 2 closes a circle
    assert minimum_forest(a, b, 7).tolist() == [0, 1, 3, 4]
    assert minimum_forest(a[:0], b[:0], 7).tolist() == []
