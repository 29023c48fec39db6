"""Image semantic balance (CLIP-CID, arXiv 2408.09441; papers.md 1.1): drop images that repeat
another.

Two images whose embeddings are at most a threshold apart are linked; linked images, also by chains,
are one set (single linkage); of each set the image nearest to the set's centroid is kept, ties by
the lowest key.

    mclip balance EMBEDDINGS OUT --threshold 0.07 --metric sql2    # any clip-retrieval folder

    result = balance(embeddings, keys, threshold=0.07, metric="sql2")
    result.keep.sum(), result.removed_fraction

The paper doesn't say which distance its 0.07 is, so the metric is explicit, on unit-normalised
rows: "l2" = |x - y|, "sql2" = |x - y|^2 (faiss's convention), "cosine" = 1 - x.y. They order pairs
alike and convert exactly: sql2 = l2^2 = 2 cosine.

How: `mclip.balance.links` finds the links without measuring most pairs, and decides each as float64
would; they are joined as they are found (`mclip.balance.unionfind`). Beside the embeddings, which
stay where they are, memory is about 270 bytes a row of 1,280 columns, at most 130 MB for cells, and
some blocks (figures: benchmarks/balance.md).
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from mclip.balance import forest
from mclip.balance.components import How, components
from mclip.data.stores.balance import Balance, BalanceError, convert
from mclip.data.stores.rows import Rows, check_keys
from mclip.system.threads import side_by_side

CHUNK = 512  # rows read at once for the centroids


def balance(
    embeddings,
    keys: Sequence | np.ndarray | None = None,
    *,
    threshold: float,
    metric: str,
    tile: int | None = None,
    device: str | None = None,
    state: str | Path | None = None,
    workers: int = 1,
    backend: str = "processes",
    scratch: str | Path | None = None,
) -> Balance:
    """Sets of near-duplicates and the representative of each; see the module's docstring.

    Parameters
    ----------
    embeddings : (n, d) float array or memmap, or a list of .npy files; rows are normalised here
    keys : n different strings or integers; None: the row's number
    threshold : largest distance that links two images, in `metric`
    metric : "l2" | "sql2" | "cosine"
    tile : rows that are compared at once; None: by their number. Changes memory and speed, never
        the result
    device : of the matrix products; None: a GPU if there is one
    state : a file that what was found is kept in while this runs, so that a killed run goes on
        there; None: none
    workers : processes that search for links; 1: this one, with as many threads as torch has
    backend : of several workers, see mclip.system.workers; with "ray" the embeddings must be files
        that all workers see
    scratch : folder that several workers read what they share from, some 300 bytes a row; None: the
        system's for temporary files. With "ray" on several machines one that all of them see

    Notes
    -----
    Neither the sets, their numbers nor the representatives depend on the order of the rows.
    """
    limit = convert(threshold, metric)["sql2"]
    rows = Rows(embeddings)
    keys = check_keys(keys, len(rows))
    how = _how(tile, device, workers, backend, scratch)
    label = components(rows, limit, how, state=state)
    order = np.argsort(keys, kind="stable")
    # sets are numbered by their lowest key: by first appearance in key order
    _, first, number = np.unique(label[order], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    set_id = np.empty(len(rows), np.int64)
    set_id[order] = rank[number]
    distance = _centroid_distance(rows, set_id, order)
    keep = _nearest(distance, set_id, order)
    return Balance(set_id, keep, distance, keys, float(threshold), metric)


def removed_curve(
    embeddings,
    thresholds: Sequence[float],
    *,
    metric: str,
    tile: int | None = None,
    device: str | None = None,
    workers: int = 1,
    backend: str = "processes",
    scratch: str | Path | None = None,
) -> np.ndarray:
    """Fraction of the images that `balance` removes at each threshold, (len(thresholds),): one pass
    for all.

    A minimum spanning forest of the links up to the largest threshold answers every smaller one: at
    t there are as many sets as rows minus the forest's edges of length <= t, and all but one of
    each set is removed.
    """
    if len(thresholds) == 0:
        return np.empty(0)
    limits, rows = [convert(t, metric)["sql2"] for t in thresholds], Rows(embeddings)
    how = _how(tile, device, workers, backend, scratch)
    _, _, square = forest.forest(rows, max(limits), how)
    return np.searchsorted(np.sort(square), limits, side="right") / len(rows)


def spanning_forest(
    embeddings,
    threshold: float,
    *,
    metric: str,
    tile: int | None = None,
    device: str | None = None,
    workers: int = 1,
    backend: str = "processes",
    scratch: str | Path | None = None,
) -> forest.Edges:
    """Edges (i < j, squared L2 distance) of the minimum spanning forest of all links up to
    `threshold`, ascending; of equally long edges those between the lowest rows come first. The
    other arguments are those of `balance`.
    """
    limit = convert(threshold, metric)["sql2"]
    return forest.forest(Rows(embeddings), limit, _how(tile, device, workers, backend, scratch))


def representative_distance(embeddings, result: Balance, *, chunk: int = CHUNK) -> np.ndarray:
    """(n,) float64, squared L2 distance of each unit row to the row of its set that is kept.

    Single linkage chains: where this is above the threshold, the two are in one set only by way of
    others; complete linkage, which asks it of every pair of a set, would have kept them apart.
    """
    rows = Rows(embeddings)
    kept = np.empty(len(result.set_sizes), np.int64)
    kept[result.set_id[result.keep]] = np.flatnonzero(result.keep)
    out = np.empty(len(rows))
    for s in range(0, len(rows), chunk):
        index = np.arange(s, min(s + chunk, len(rows)))
        out[index] = rows.squares(index, kept[result.set_id[index]])
    return out


def _how(tile: int | None, *options) -> How:
    if tile is not None and tile < 1:
        raise BalanceError(f"tile: expected at least 1 row, found {tile}")
    return How(tile, *options)


def _centroid_distance(
    rows: Rows, set_id: np.ndarray, order: np.ndarray, chunk: int = CHUNK
) -> np.ndarray:
    """(n,) distance of each unit row to the mean of its set; sums run in the order of the keys."""
    distance = np.zeros(len(rows))
    size = np.bincount(set_id)
    members = order[np.argsort(set_id[order], kind="stable")]  # by set, then by key
    members = members[size[set_id[members]] > 1]
    if not len(members):
        return distance
    _, start = np.unique(set_id[members], return_index=True)
    end = np.append(start[1:], len(members))
    cuts = [0]  # as many whole sets as fit a block, or one that is larger than a block
    while cuts[-1] < len(start):
        cuts.append(
            max(cuts[-1] + 1, int(np.searchsorted(end, start[cuts[-1]] + chunk, side="right")))
        )

    def sets(cut: tuple[int, int]) -> None:
        s, e = cut
        index, sizes = members[start[s] : end[e - 1]], end[s:e] - start[s:e]
        if len(index) <= chunk:
            unit, number = (
                torch.from_numpy(rows.unit(index)),
                torch.from_numpy(np.repeat(np.arange(e - s), sizes)),
            )
            mean = torch.zeros(e - s, rows.width, dtype=torch.float64).index_add_(0, number, unit)
            mean /= torch.from_numpy(sizes)[:, None]
            distance[index] = torch.linalg.vector_norm(unit.sub_(mean[number]), dim=1).numpy()
            return
        centre = np.zeros(rows.width)
        for k in range(0, len(index), chunk):
            centre += rows.unit(index[k : k + chunk]).sum(0)
        centre /= len(index)
        for k in range(0, len(index), chunk):
            difference = rows.unit(index[k : k + chunk]) - centre
            distance[index[k : k + chunk]] = np.sqrt(np.einsum("nd,nd->n", difference, difference))

    for _ in side_by_side(sets, pairwise(cuts), ahead=None):
        pass
    return distance


def _nearest(distance: np.ndarray, set_id: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(n,) bool: of each set the row nearest to the centroid, of equally near ones the lowest key.

    Equally near: within 1e-9, far above float64's rounding and far below what an embedding can
    tell. Two members of a set of two are always equally near.
    """
    nearest = np.full(set_id.max() + 1, np.inf)
    np.minimum.at(nearest, set_id, distance)
    ties = order[distance[order] <= nearest[set_id[order]] + 1e-9]
    keep = np.zeros(len(set_id), bool)
    keep[ties[np.unique(set_id[ties], return_index=True)[1]]] = True
    return keep
