"""Spherical k-means of image embeddings by faiss (CLIP-CID, arXiv 2408.09441; papers.md 1.2).

    result = cluster(embeddings, 300, iterations=20, seed=0)
    result.centres    # (k, d) float32, unit norm: the first value of W in mclip.losses.ClusterLoss
    result.labels     # (n,) int64

It runs on a GPU if faiss has one. All rows take part in every iteration (faiss alone would draw 256
a centre), or `points` of them a centre where memory is short, at 4 bytes a number. Labels are found
block by block. The same seed gives the same bytes on the same machine, whatever the number of
threads.
"""

from collections.abc import Iterator

import faiss
import numpy as np

from mclip.data.stores.clusters import ClusterError, Clusters, read, write
from mclip.data.stores.embeddings import EmbeddingsError
from mclip.data.stores.rows import Rows, check_keys

BLOCK = 65536  # rows held at once
# images a cluster below which a warning is due: such centres are hardly more than single images
FEW = 10


def cluster(
    embeddings,
    k: int,
    *,
    iterations: int,
    seed: int,
    keys=None,
    chosen: np.ndarray | None = None,
    points: int | None = None,
) -> Clusters:
    """Cluster rows by spherical k-means: each gets the centre of the largest inner product.

    Parameters
    ----------
    embeddings : array_like or list of path
        Floats of shape (n, d): an array, a memmap, or .npy files that follow one another. Rows are
        normalised here.
    k : int
        Clusters, at most n (params.yaml: cluster.clusters).
    iterations : int
        Assignments and updates of the centres.
    seed : int
        Of the first centres, a random choice of rows.
    keys : sequence of str or int, shape (n,), optional
        Written beside the labels; by default the rows' numbers.
    chosen : ndarray of bool, shape (n,), optional
        Rows to cluster; the result has these only. By default all.
    points : int, optional
        Rows a centre that move the centres, a random choice by `seed` where there are more
        (params.yaml: cluster.points_per_centre). By default all.

    Returns
    -------
    Clusters
        Centres, labels, and each row's cosine to its centre.

    Raises
    ------
    ClusterError
        If k or the number of iterations is out of range.
    EmbeddingsError
        If there are no rows, a row has no direction, rows differ in width, or keys repeat.

    References
    ----------
    Yang et al., "CLIP-CID: Efficient CLIP Distillation via Cluster-Instance Discrimination",
    arXiv 2408.09441: cluster-level distillation, which starts from these centres.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.cluster import cluster
    >>> rows = np.repeat(np.eye(2), 10, axis=0)
    >>> result = cluster(rows, 2, iterations=5, seed=1)
    >>> result.centres.shape, result.sizes.tolist()
    ((2, 2), [10, 10])
    """
    rows = Rows(embeddings)
    keys = check_keys(keys, len(rows))
    index = np.arange(len(rows)) if chosen is None else np.flatnonzero(chosen)
    if not 1 <= k <= len(index):
        raise ClusterError(
            f"cluster.clusters: {k} clusters of {len(index)} images; "
            f"it must lie between 1 and {len(index)}"
        )
    if iterations < 1:
        raise ClusterError(f"cluster.iterations: at least 1, found {iterations}")
    drawn = index
    if points is not None and k * points < len(index):
        drawn = index[
            np.sort(np.random.default_rng(seed).choice(len(index), k * points, replace=False))
        ]
    unit = np.empty((len(drawn), rows.width), np.float32)
    for s, block in _blocks(rows, drawn):
        unit[s : s + len(block)] = block
    gpu = faiss.get_num_gpus() > 0
    kmeans = faiss.Kmeans(
        rows.width,
        k,
        niter=iterations,
        seed=seed,
        spherical=True,
        gpu=gpu,
        min_points_per_centroid=1,
        max_points_per_centroid=len(unit),
    )
    kmeans.train(unit)
    # faiss leaves rows that are unit norm to its own rounding
    centres = np.asarray(kmeans.centroids)
    centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    labels, similarity = assign(rows, centres, index)
    few = len(index) / k
    warning = (
        ""
        if few >= FEW
        else (
            f"cluster.clusters: {k:,} clusters of {len(index):,} images are {few:.1f} each: "
            "a centre says little that is "
            f"common to several; take fewer clusters, say {max(1, len(index) // FEW):,}"
        )
    )
    return Clusters(
        centres,
        labels,
        similarity,
        np.asarray(kmeans.obj, np.float64) / len(unit),
        keys[index],
        warning,
    )


def assign(
    embeddings, centres: np.ndarray, index: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest centre of every row.

    Parameters
    ----------
    embeddings : array_like, list of path or Rows
        Floats of shape (n, d), as `cluster` takes them.
    centres : ndarray of float32, shape (k, d)
        Unit-norm rows.
    index : ndarray of int64, shape (m,), optional
        Rows to assign; by default all n.

    Returns
    -------
    labels : ndarray of int64, shape (m,)
        Number of the nearest centre.
    similarity : ndarray of float32, shape (m,)
        Cosine to it.

    Raises
    ------
    ClusterError
        If embeddings and centres differ in width.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.cluster import assign
    >>> labels, similarity = assign(np.array([[3.0, 4.0]]), np.eye(2, dtype=np.float32))
    >>> labels.tolist(), similarity.round(2).tolist()
    ([1], [0.800000011920929])
    """
    rows = embeddings if isinstance(embeddings, Rows) else Rows(embeddings)
    index = np.arange(len(rows)) if index is None else index
    if rows.width != centres.shape[1]:
        raise ClusterError(
            f"embeddings are {rows.width} wide, the cluster centres {centres.shape[1]}: "
            "are they of the same teacher (cluster.teacher)?"
        )
    flat: faiss.Index = faiss.IndexFlatIP(rows.width)
    flat.add(np.ascontiguousarray(centres, np.float32))
    if faiss.get_num_gpus() > 0:
        flat = faiss.index_cpu_to_all_gpus(flat)
    labels, similarity = np.empty(len(index), np.int64), np.empty(len(index), np.float32)
    for s, block in _blocks(rows, index):
        nearest, which = flat.search(block, 1)
        labels[s : s + len(block)], similarity[s : s + len(block)] = which[:, 0], nearest[:, 0]
    return labels, similarity


def _blocks(rows: Rows, index: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Where each block of the rows `index` begins, and its rows, unit norm float32."""
    for s in range(0, len(index), BLOCK):
        yield s, rows.unit(index[s : s + BLOCK]).astype(np.float32)


__all__ = ["ClusterError", "Clusters", "EmbeddingsError", "assign", "cluster", "read", "write"]
