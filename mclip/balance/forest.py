"""Minimum spanning forest of all links up to a distance.

One search for the forest answers what every smaller threshold would join. Threads compute it, or
several workers (`mclip.system.workers`), each for its own part. An edge that is in no forest of the
edges seen so far is in no later forest either, so only forests are held and merged.
"""

from collections.abc import Iterable

import numpy as np

from mclip.balance import links
from mclip.balance.components import How, given, spread
from mclip.balance.prepared import Prepared
from mclip.balance.unionfind import Sets, minimum_forest

LINKS = 2_000_000  # links of a forest collected before they are merged
STEPS = 15  # thresholds on the way to the largest at which it is known what is joined already

Edges = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # rows i < j, (m,) int64 each; squared L2 distances, (m,) float64


def forest(prepared: Prepared, limit: float, how: How) -> Edges:
    """Edges of the minimum spanning forest of the links of squared distance <= limit, ascending; of
    equally long edges those between the lowest rows come first.

    prepared : the rows, by `how.prepare`.
    """
    desc = "balance: curve"
    if how.alone:
        return _search(prepared, limit, desc=desc)
    found = none()
    for _, edges in spread(_search_lot, prepared, limit, range(prepared.count), how, desc=desc):
        found = merged([found, edges], len(prepared.order))
    return found


def none() -> Edges:
    """No edges."""
    return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)


def merged(edges: list[Edges], n: int) -> Edges:
    """Minimum spanning forest over n rows of lists of edges (i < j, length), no edge twice."""
    a, b, length = map(np.concatenate, zip(*edges, strict=True))
    order = np.lexsort((b, a, length))
    a, b, length = a[order], b[order], length[order]
    chosen = minimum_forest(a, b, n)
    return a[chosen], b[chosen], length[chosen]


def _search(
    prepared: Prepared, limit: float, *, tiles: Iterable[int] | None = None, desc: str | None
) -> Edges:
    """The forest of some tiles' links with all later ones."""
    n = len(prepared.order)
    # An edge between rows that shorter edges connect already is in no minimum spanning forest. To
    # drop most of those at once, the rows' sets at a few thresholds on the way are kept beside the
    # forest.
    steps = limit * np.arange(1, STEPS + 1) / (STEPS + 1)
    sets = [Sets(n) for _ in steps]
    kept, batch, count = none(), [], 0

    def wanted(a: np.ndarray, b: np.ndarray, lower: np.ndarray) -> np.ndarray:
        level = (
            np.searchsorted(steps, lower, side="left") - 1
        )  # steps[level] < lower, which is at most the length
        out = np.ones(len(a), bool)
        for k in range(len(steps)):
            here = np.flatnonzero(level == k)
            out[here] = ~sets[k].joined(a[here], b[here])
        return out

    def found(a: np.ndarray, b: np.ndarray, square: np.ndarray) -> None:
        nonlocal kept, batch, count
        for known, step in zip(sets, steps, strict=True):
            short = square <= step
            known.join(a[short], b[short])
        batch.append((np.minimum(a, b), np.maximum(a, b), square))
        count += len(a)
        if count > LINKS:
            kept, batch, count = merged([kept, *batch], n), [], 0

    links.search(prepared, limit, wanted, found, squares=True, tiles=tiles, desc=desc)  # type: ignore[arg-type]
    return merged([kept, *batch], n)


def _search_lot(
    files: list[str], folder: str, limit: float, lot: list[int]
) -> tuple[list[int], Edges]:
    """One worker's part, see `components.spread`."""
    return lot, _search(given(files, folder), limit, tiles=lot, desc=None)
