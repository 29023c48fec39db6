"""Other ways to drop images by their embeddings: the baselines of the threshold ablation.

    # (n,) bool, exactly `count` True
    keep = prune.semdedup(embeddings, count, clusters=300, seed=0)

- `semdedup`: SemDeDup (arXiv 2303.09540): k-means; of two images in a cluster that are nearer than
  a threshold, one is dropped.
- `density`: density-based pruning (arXiv 2401.04578): dense clusters close to others lose most.
- `random`: the control.

None of them sees pairs across clusters, which `mclip.balance` does. All take the number of rows to
keep, so that they can be compared at equal size; SemDeDup's threshold follows from it.
"""

from typing import NamedTuple

import faiss
import numpy as np
import torch

from mclip.cluster import Clusters, cluster
from mclip.data.stores.rows import Rows

ORDERS = ("hard", "easy", "random")


class PruneError(ValueError):
    """A number or an option is impossible; the message names it."""


class SemDeDup(NamedTuple):
    """What SemDeDup removes at every threshold.

    Parameters
    ----------
    square : ndarray of float64, shape (n,)
        Squared L2 distance of each row to the nearest row of its cluster that goes before it in the
        order of keeping; infinite for the first. At a threshold t the rows with square <= t go.
    clusters : Clusters
        The k-means that the distances were measured in.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance.prune import semdedup_distances
    >>> rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> sorted(semdedup_distances(rows, clusters=1, seed=0).square.round(3).tolist())
    [0.0, 2.0, inf]
    """

    square: np.ndarray
    clusters: Clusters


def semdedup_distances(
    embeddings, *, clusters: int, seed: int, order: str = "hard", iterations: int = 20
) -> SemDeDup:
    """Measure what SemDeDup removes at every threshold, in one pass over the clusters.

    Parameters
    ----------
    embeddings : array_like or list of path
        Floats of shape (n, d), as `mclip.balance.balance` takes them.
    clusters : int
        Of the k-means; sqrt(n) is a good start, the paper takes 50,000 for 440 million rows.
    seed : int
        Of the k-means and of the order of equals.
    order : {"hard", "easy", "random"}, default "hard"
        Which of two near images stays: the one farther from the centre (the paper's), the nearer
        one, or either.
    iterations : int, default 20
        Of the k-means.

    Returns
    -------
    SemDeDup
        Each row's distance, and the clusters.

    Raises
    ------
    PruneError
        If the order is unknown.

    References
    ----------
    Abbas et al., "SemDeDup: Data-efficient learning at web-scale through semantic deduplication",
    arXiv 2303.09540, Section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance import prune
    >>> rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> int((prune.semdedup_distances(rows, clusters=1, seed=0).square <= 0.07).sum())
    1
    """
    if order not in ORDERS:
        raise PruneError(f"order: expected one of {', '.join(ORDERS)}, found {order!r}")
    rows = Rows(embeddings)
    found = cluster(embeddings, clusters, iterations=iterations, seed=seed)
    rank = np.random.default_rng(seed).permutation(len(rows))  # of equals, and for "random"
    first = {"hard": found.similarity, "easy": -found.similarity, "random": rank}[order]
    square = np.full(len(rows), np.inf)
    by_cluster = np.lexsort((rank, first, found.labels))
    for members in np.split(by_cluster, np.cumsum(found.sizes)[:-1]):
        for start in range(0, len(members), 4096):
            stop = min(start + 4096, len(members))
            later = torch.from_numpy(rows.unit(members[start:stop])).float()
            best = torch.full((stop - start,), -torch.inf)
            for before in range(0, stop, 4096):
                earlier = members[before : min(before + 4096, stop)]
                product = later @ torch.from_numpy(rows.unit(earlier)).float().T
                if before == start:  # only those that go before
                    product.masked_fill_(
                        torch.ones_like(product, dtype=torch.bool).triu_(), -torch.inf
                    )
                best = torch.maximum(best, product.amax(1))
            square[members[start:stop]] = np.maximum(2 - 2 * best.double().numpy(), 0)
    return SemDeDup(square, found)


def semdedup(
    embeddings, count: int, *, clusters: int, seed: int, order: str = "hard", iterations: int = 20
) -> np.ndarray:
    """Keep as many rows as wanted by SemDeDup, at the threshold that leaves that many.

    Parameters
    ----------
    embeddings : array_like or list of path
        As in `semdedup_distances`.
    count : int
        Rows to keep, at most n. Of rows at the same distance those of lower number stay.
    clusters, seed, order, iterations : optional
        As in `semdedup_distances`.

    Returns
    -------
    ndarray of bool, shape (n,)
        True for `count` rows.

    Raises
    ------
    PruneError
        If the order is unknown or `count` is out of range.

    References
    ----------
    Abbas et al., arXiv 2303.09540, Section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance import prune
    >>> rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> int(prune.semdedup(rows, 2, clusters=1, seed=0).sum())
    2
    """
    square = semdedup_distances(
        embeddings, clusters=clusters, seed=seed, order=order, iterations=iterations
    ).square
    return _most(square, count)


def density(
    embeddings,
    count: int,
    *,
    clusters: int,
    seed: int,
    temperature: float = 0.1,
    neighbours: int = 20,
    iterations: int = 20,
) -> np.ndarray:
    """Keep as many rows as wanted by density-based pruning.

    A cluster's complexity is d_inter * d_intra: the mean cosine distance of its centre to the
    `neighbours` nearest centres, times that of its members to it. Its budget is near count *
    softmax(complexity / temperature), the nearest point in squares with at least one and at most
    all of its members. The members farthest from the centre stay.

    Parameters
    ----------
    embeddings : array_like or list of path
        Floats of shape (n, d), as `mclip.balance.balance` takes them.
    count : int
        Rows to keep, at least one of each cluster and at most n.
    clusters : int
        Of the k-means.
    seed : int
        Of the k-means.
    temperature : float, default 0.1
        The lower it is, the more budgets differ.
    neighbours : int, default 20
        Centres that d_inter looks at.
    iterations : int, default 20
        Of the k-means.

    Returns
    -------
    ndarray of bool, shape (n,)
        True for `count` rows.

    Raises
    ------
    PruneError
        If `count` is out of range.

    References
    ----------
    Abbas et al., "Effective pruning of web-scale datasets based on complexity of concept clusters",
    arXiv 2401.04578.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance import prune
    >>> rows = np.random.default_rng(0).normal(size=(40, 8))
    >>> int(prune.density(rows, 12, clusters=4, seed=0).sum())
    12
    """
    found = cluster(embeddings, clusters, iterations=iterations, seed=seed)
    sizes, distance = found.sizes, 1 - found.similarity.astype(np.float64)
    full = sizes > 0
    _check(count, len(distance), int(full.sum()))
    intra = np.bincount(found.labels, distance, minlength=len(sizes)) / np.maximum(sizes, 1)
    index = faiss.IndexFlatIP(found.centres.shape[1])
    index.add(found.centres[full])
    near = index.search(found.centres, min(neighbours + 1, int(full.sum())))[0][
        :, 1:
    ]  # the first is itself
    inter = (1 - near.astype(np.float64)).mean(axis=1) if near.shape[1] else np.ones(len(sizes))
    weight = np.where(full, np.exp((inter * intra - (inter * intra).max()) / temperature), 0)
    budget = whole_budget(count * weight[full] / weight.sum(), sizes[full], count)
    of = np.zeros(len(sizes), np.int64)
    of[full] = budget
    order = np.lexsort(
        (np.arange(len(distance)), -distance, found.labels)
    )  # by cluster, the farthest first
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    keep = np.zeros(len(order), bool)
    keep[order] = place < np.repeat(of, sizes)
    return keep


def whole_budget(target: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """Round budgets to integers that add up, each at least 1 and at most its cluster's size.

    The quadratic program min |x - target|^2 under these constraints has the solution clip(target +
    v, 1, sizes) for the one v that makes the sum right; v is found by bisection.

    Parameters
    ----------
    target : ndarray of float, shape (k,)
        Budgets that were wanted.
    sizes : ndarray of int, shape (k,)
        Most that each can have.
    count : int
        What they add up to.

    Returns
    -------
    ndarray of int64, shape (k,)
        The nearest such integers in squares, up to the rounding.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance.prune import whole_budget
    >>> whole_budget(np.array([0.2, 3.9, 5.9]), np.array([5, 5, 5]), 10).tolist()
    [1, 4, 5]
    """
    low, high = -target.max() - 1, float(sizes.max()) + 1
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.clip(target + middle, 1, sizes).sum() < count else (low, middle)
        )
    x = np.clip(target + high, 1, sizes)
    whole = np.floor(x + 1e-9).astype(np.int64)
    left = count - whole.sum()
    room = np.flatnonzero(whole < sizes)
    whole[room[np.argsort(-(x - whole)[room], kind="stable")[:left]]] += 1
    return whole


def random(n: int, count: int, *, seed: int) -> np.ndarray:
    """Keep as many rows as wanted by chance: the control.

    Parameters
    ----------
    n : int
        Rows.
    count : int
        Rows to keep, at most n.
    seed : int
        Of the choice.

    Returns
    -------
    ndarray of bool, shape (n,)
        True for `count` rows.

    Raises
    ------
    PruneError
        If `count` is out of range.

    Examples
    --------
    >>> from mclip.balance import prune
    >>> int(prune.random(10, 4, seed=0).sum())
    4
    """
    _check(count, n, 0)
    keep = np.zeros(n, bool)
    keep[np.random.default_rng(seed).permutation(n)[:count]] = True
    return keep


def _most(square: np.ndarray, count: int) -> np.ndarray:
    """The `count` rows with the largest values."""
    _check(count, len(square), 0)
    keep = np.zeros(len(square), bool)
    keep[np.lexsort((np.arange(len(square)), -square))[:count]] = True
    return keep


def _check(count: int, n: int, least: int) -> None:
    if not least <= count <= n:
        raise PruneError(
            f"count: {count} rows to keep of {n}"
            + (f", at least one of each of {least} clusters" if least else "")
        )
