"""Union-find on arrays: sets of the rows 0..n-1, joined by batches of links, and forests."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree


class Sets:
    """parent[x] is x for a set's root, else a row nearer to it.

    One thread at a time may `join`; others may `find` and compare meanwhile: they then see an
    earlier state.
    """

    def __init__(self, n: int):
        self.parent = np.arange(n)

    def find(self, x: np.ndarray) -> np.ndarray:
        """The roots of rows x."""
        root = self.parent[x]
        while True:
            up = self.parent[root]
            if (up == root).all():
                return root
            root = up

    def joined(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Are a[k] and b[k] in one set?"""
        return self.find(a) == self.find(b)

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Join the sets of a[k] and b[k], for all k; the lowest root of those that meet becomes the
        root.
        """
        both = np.concatenate([a, b])
        roots, place = np.unique(self.find(both), return_inverse=True)
        x, y = np.split(place, 2)
        graph = coo_array((np.ones(len(a), np.int8), (x, y)), shape=(len(roots), len(roots)))
        label = connected_components(graph, directed=False)[1]
        lowest = np.full(label.max(initial=-1) + 1, len(roots))
        np.minimum.at(lowest, label, np.arange(len(roots)))
        # the roots last: a reader in between finds its way by the old ones
        new = roots[lowest[label]]
        self.parent[both] = new[place]
        self.parent[roots] = new

    def roots(self) -> np.ndarray:
        """(n,) the root of each row."""
        return self.find(np.arange(len(self.parent)))


def minimum_forest(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """Which of the edges a[k] - b[k] between n vertices make a minimum spanning forest, ascending.

    a, b : (m,) vertices 0..n-1 of each edge, the shortest edge first, no two vertices twice.
    """
    # ranks for lengths: scipy takes an edge of length 0, an exact duplicate, for no edge
    tree = minimum_spanning_tree(
        coo_array((np.arange(1, len(a) + 1), (a, b)), shape=(n, n)).tocsr()
    )
    return np.sort(tree.data).astype(np.int64) - 1
