"""Image semantic balance: drop images that repeat another (CLIP-CID; papers.md 1.1).

Two images whose embeddings are at most a threshold apart are linked. Linked images are one set,
also by chains (single linkage). Of each set the image nearest to the set's centroid is kept; ties
go to the lowest key.

    mclip balance EMBEDDINGS OUT --threshold 0.07 --metric sql2    # any clip-retrieval folder

    result = balance(embeddings, keys, threshold=0.07, metric="sql2")
    result.keep.sum(), result.removed_fraction

The paper doesn't say which distance its 0.07 is, so the metric is explicit, on unit-normalised
rows: "l2" = |x - y|, "sql2" = |x - y|^2 (faiss's convention), "cosine" = 1 - x.y. They order pairs
alike and convert exactly: sql2 = l2^2 = 2 cosine.

`mclip.balance.links` finds the links without measuring most pairs, and decides each as float64
would; `mclip.balance.unionfind` joins them as they are found. Besides the embeddings, which stay
where they are, this takes about 270 bytes a row of 1,280 columns, at most 130 MB for cells, and
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
from mclip.data.stores.rows import Rows, as_rows, check_keys
from mclip.system.threads import side_by_side

CHUNK = 512  # rows read at once for the centroids
FIRST_LIMIT = 0.05  # squared distance up to which links are first looked for to remove a part
SAME = 1e-12  # the least threshold that is returned: nearer rows differ by rounding
LEAST_KEPT = 0.05  # part of the images; with fewer kept a threshold is taken for a mistake


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
    """Find sets of near-duplicates and keep one image of each.

    Images at most `threshold` apart are linked, and linked images are one set, also by chains
    (single linkage). Of each set the image nearest to the set's centroid stays; of equally near
    ones, that with the lowest key.

    Parameters
    ----------
    embeddings : array_like or list of path or mclip.data.stores.rows.Rows
        Floats of shape (n, d): an array, a memmap, or .npy files that follow one another. Rows are
        normalised here. A `Rows` may leave some of them out.
    keys : sequence of str or int, shape (n,), optional
        A different one for each row; by default the row's number.
    threshold : float
        Largest distance that links two images, in the unit of `metric`.
    metric : {"l2", "sql2", "cosine"}
        Distance of unit-norm rows: Euclidean, its square, or 1 minus the cosine.
    tile : int, optional
        Rows compared at once; by default chosen by n. It changes memory and speed, never the
        result.
    device : str, optional
        Where the matrix products are computed; by default on a GPU if there is one.
    state : path, optional
        File for intermediate results, from which a killed run continues.
    workers : int, default 1
        Processes that search for links; 1 is this process, with as many threads as torch has.
    backend : {"processes", "ray"}, default "processes"
        Where several workers run, see `mclip.system.workers`. With "ray" the embeddings must be
        files that every worker sees.
    scratch : path, optional
        Folder for what several workers share, about 300 bytes a row; by default the system's
        temporary folder. With "ray" on several machines, a folder that all of them see.

    Returns
    -------
    Balance
        For each row its set, whether it is kept, and its distance to the set's centroid.

    Raises
    ------
    BalanceError
        If the metric is unknown or the threshold is out of its range.
    EmbeddingsError
        If there are no rows, a row has no direction, rows differ in width, or keys repeat.

    See Also
    --------
    threshold_that_removes : The threshold for a fraction of the images.
    removed_curve : The removed fraction at many thresholds.
    mclip.balance.prune : Other ways to drop as many images.

    Notes
    -----
    The sets, their numbers and the kept images do not depend on the order of the rows.

    References
    ----------
    Yang et al., "CLIP-CID: Efficient CLIP Distillation via Cluster-Instance Discrimination",
    arXiv 2408.09441: image semantic balance.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance import balance
    >>> rows = np.array([[1.0, 0.0], [0.99, 0.14], [0.0, 1.0]])
    >>> result = balance(rows, ["a", "b", "c"], threshold=0.07, metric="sql2")
    >>> result.set_id.tolist(), result.keep.tolist()
    ([0, 0, 1], [True, False, True])
    """
    limit = convert(threshold, metric)["sql2"]
    rows = as_rows(embeddings)
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
    """Calculate the fraction of images that `balance` removes at each of many thresholds.

    One search serves all: at a threshold t there are as many sets as rows minus edges of length <=
    t in the minimum spanning forest, and all images but one of each set are removed.

    Parameters
    ----------
    embeddings : array_like or list of path
        As in `balance`.
    thresholds : sequence of float
        In the unit of `metric`, in any order.
    metric : {"l2", "sql2", "cosine"}
        Distance of unit-norm rows.
    tile, device, workers, backend, scratch : optional
        As in `balance`.

    Returns
    -------
    ndarray of float64, shape (len(thresholds),)
        Removed fraction, 0 to 1, in the order of the thresholds.

    Raises
    ------
    BalanceError, EmbeddingsError
        As in `balance`.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance import removed_curve
    >>> rows = np.array([[1.0, 0.0], [0.99, 0.14], [0.0, 1.0], [0.0, 1.0]])
    >>> removed_curve(rows, [0.001, 0.07, 2.0], metric="sql2").tolist()
    [0.25, 0.5, 0.75]
    """
    if len(thresholds) == 0:
        return np.empty(0)
    limits, rows = [convert(t, metric)["sql2"] for t in thresholds], as_rows(embeddings)
    how = _how(tile, device, workers, backend, scratch)
    _, _, square = forest.forest(how.prepare(rows), max(limits), how)
    return np.searchsorted(np.sort(square), limits, side="right") / len(rows)


def threshold_that_removes(
    embeddings,
    fraction: float,
    *,
    metric: str,
    tile: int | None = None,
    device: str | None = None,
    workers: int = 1,
    backend: str = "processes",
    scratch: str | Path | None = None,
) -> float:
    """Find the smallest threshold at which `balance` removes a fraction of the images.

    It is the length of an edge of the minimum spanning forest: at each edge's length one more image
    is removed, so the fraction is met exactly, to the nearest whole image. Where several edges
    have that very length (exact duplicates, above all) more images go.

    Parameters
    ----------
    embeddings : array_like or list of path or mclip.data.stores.rows.Rows
        As in `balance`.
    fraction : float
        Of the images, above 0 and below 1.
    metric : {"l2", "sql2", "cosine"}
        Distance of unit-norm rows.
    tile, device, workers, backend, scratch : optional
        As in `balance`.

    Returns
    -------
    float
        The threshold for `balance`, in the unit of `metric`.

    Raises
    ------
    BalanceError
        If the fraction is out of its range, or no image would be left.
    EmbeddingsError
        As in `balance`.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance import balance, threshold_that_removes
    >>> rows = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    >>> threshold = threshold_that_removes(rows, 0.25, metric="sql2")
    >>> round(threshold, 6), balance(rows, threshold=threshold, metric="sql2").removed_fraction
    (0.4, 0.25)
    """
    convert(1.0, metric)  # fails for an unknown metric
    rows = as_rows(embeddings)
    if not 0 < fraction < 1:
        raise BalanceError(f"remove: a fraction above 0 and below 1 is expected, found {fraction}")
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        raise BalanceError(f"remove: {fraction:g} of {len(rows)} images would leave none")
    how = _how(tile, device, workers, backend, scratch)
    prepared, limit = how.prepare(rows), FIRST_LIMIT
    while len(square := forest.forest(prepared, limit, how)[2]) < count and limit < 4:
        limit = min(4.0, 2 * limit)
    # no unit vectors are farther apart than 4 but by rounding
    last = max(float(square[count - 1]) if count <= len(square) else 4.0, SAME)
    threshold = convert(last, "sql2")[metric]
    while convert(threshold, metric)["sql2"] < last:  # the way there and back rounds
        threshold = float(np.nextafter(threshold, np.inf))
    return threshold


def check_kept(result: Balance, name: str = "threshold") -> None:
    """Fail where a threshold removes nearly everything: it does not fit the embeddings.

    Parameters
    ----------
    result : Balance
        What `balance` returned.
    name : str, default "threshold"
        What the message calls the threshold.

    Raises
    ------
    BalanceError
        If fewer than a twentieth of the images are kept.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance import balance, check_kept
    >>> check_kept(balance(np.eye(3), threshold=0.07, metric="sql2"))
    """
    n, kept = len(result.keep), int(result.keep.sum())
    if kept < LEAST_KEPT * n:
        raise BalanceError(
            f"{name}: {result.threshold:g} ({result.metric}) links nearly everything, {kept:,} of "
            f"{n:,} images would be kept: these embeddings lie closer together than that, as those "
            f"of an untrained model do. Take a smaller threshold, or say by `remove` which "
            "fraction is to go"
        )


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
    """Find the minimum spanning forest of all links up to a threshold.

    Parameters
    ----------
    embeddings : array_like or list of path
        As in `balance`.
    threshold : float
        Largest distance that links two images, in the unit of `metric`.
    metric : {"l2", "sql2", "cosine"}
        Distance of unit-norm rows.
    tile, device, workers, backend, scratch : optional
        As in `balance`.

    Returns
    -------
    i, j : ndarray of int64, shape (m,)
        Rows that an edge joins, i < j.
    square : ndarray of float64, shape (m,)
        Squared L2 distances, ascending; of equally long edges those between the lowest rows come
        first.

    Raises
    ------
    BalanceError, EmbeddingsError
        As in `balance`.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance import spanning_forest
    >>> rows = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> i, j, square = spanning_forest(rows, 2.0, metric="sql2")
    >>> i.tolist(), j.tolist(), square.tolist()
    ([0, 0], [2, 1], [0.0, 2.0])
    """
    limit = convert(threshold, metric)["sql2"]
    how = _how(tile, device, workers, backend, scratch)
    return forest.forest(how.prepare(as_rows(embeddings)), limit, how)


def representative_distance(embeddings, result: Balance, *, chunk: int = CHUNK) -> np.ndarray:
    """Measure how far each image is from the kept image of its set.

    Single linkage chains: where this distance is above the threshold, the two are in one set only
    by way of others. Complete linkage, which asks it of every pair of a set, would keep them apart.

    Parameters
    ----------
    embeddings : array_like or list of path
        The rows that `result` was made from.
    result : Balance
        What `balance` returned for them.
    chunk : int, default 512
        Rows held at once.

    Returns
    -------
    ndarray of float64, shape (n,)
        Squared L2 distance of each unit row to the kept row of its set.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance import balance, representative_distance
    >>> rows = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> result = balance(rows, threshold=0.9, metric="sql2")
    >>> representative_distance(rows, result).round(2).tolist()
    [0.8, 0.0, 0.4]
    """
    rows = as_rows(embeddings)
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
