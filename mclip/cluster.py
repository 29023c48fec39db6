"""Spherical k-means of image embeddings by faiss (CLIP-CID, arXiv 2408.09441; papers.md 1.2).

    result = cluster(embeddings, 300, iterations=20, seed=0)
    result.centres    # (k, d) float32, unit norm: the first value of W in mclip.losses.ClusterLoss
    result.labels     # (n,) int64

On a GPU where faiss has one. All rows take part in every iteration (faiss alone would draw 256 a
centre), or as many as memory has room for: `points` of them a centre, 4 bytes a number. Labels are
found block by block. The same seed gives the same bytes on the same machine, also with another
number of threads.
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
    """Spherical k-means: k unit-norm centres, every row labelled with the centre of the largest
    inner product.

    Parameters
    ----------
    embeddings : (n, d) float array or memmap, or a list of .npy files; rows are normalised here
    k : clusters, at most n (params.yaml: cluster.clusters)
    iterations : assignments and updates of the centres
    seed : of the first centres, a random choice of rows
    keys : n different strings or integers to write beside the labels; None: the rows' numbers
    chosen : (n,) bool, the rows to cluster; the result has these only. None: all
    points : rows a centre that move the centres, a random choice by `seed` where there are more
        (params.yaml: cluster.points_per_centre); None: all
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
    """Nearest centre of every row, or of the rows `index`: (n,) int64, and the cosine to it, (n,)
    float32.
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
