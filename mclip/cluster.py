"""Spherical k-means of image embeddings by faiss (CLIP-CID, arXiv 2408.09441; papers.md 1.2).

    result = cluster(embeddings, 300, iterations=20, seed=0)
    result.centres      # (k, d) float32, unit norm: the first value of W in mclip.losses.ClusterLoss
    result.labels       # (n,) int64

On a GPU where faiss has one. All rows take part in every iteration (faiss alone would draw 256 a centre).
The same seed gives the same bytes on the same machine, also with another number of threads.
"""

import faiss
import numpy as np

from mclip.data.clustered import ClusterError, Clusters, read, write
from mclip.rows import Rows, RowsError, check_keys

FEW = 10  # images a cluster below which a warning is due: such centres are hardly more than single images


def cluster(embeddings, k: int, *, iterations: int, seed: int, keys=None) -> Clusters:
    """Spherical k-means: k unit-norm centres, every row labelled with the centre of the largest inner product.

    Parameters
    ----------
    embeddings : (n, d) float array or memmap, or a list of .npy files; rows are normalised here
    k : clusters, at most n (params.yaml: cluster.clusters)
    iterations : assignments and updates of the centres
    seed : of the first centres, a random choice of rows
    keys : n different strings or integers to write beside the labels; None: the rows' numbers
    """
    rows = Rows(embeddings)
    keys = check_keys(keys, len(rows))
    if not 1 <= k <= len(rows):
        raise ClusterError(f"cluster.clusters: {k} clusters of {len(rows)} images; "
                           f"it must lie between 1 and {len(rows)}")
    if iterations < 1:
        raise ClusterError(f"cluster.iterations: at least 1, found {iterations}")
    unit = _unit(rows)
    gpu = faiss.get_num_gpus() > 0
    kmeans = faiss.Kmeans(rows.width, k, niter=iterations, seed=seed, spherical=True, gpu=gpu,
                          min_points_per_centroid=1, max_points_per_centroid=len(rows))
    kmeans.train(unit)
    # faiss leaves rows that are unit norm to its own rounding
    centres = kmeans.centroids / np.linalg.norm(kmeans.centroids, axis=1, keepdims=True)
    labels, similarity = assign(unit, centres)
    few = len(rows) / k
    warning = (f"cluster.clusters: {k:,} clusters of {len(rows):,} images are {few:.1f} each: a centre says little "
               f"that is common to several; take fewer clusters, say {max(1, len(rows) // FEW):,}") if few < FEW else ""
    return Clusters(centres, labels, similarity, np.asarray(kmeans.obj, np.float64) / len(rows), keys, warning)


def assign(embeddings, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centre of every row, (n,) int64, and the cosine to it, (n,) float32."""
    rows = Rows(embeddings)
    if rows.width != centres.shape[1]:
        raise ClusterError(f"embeddings are {rows.width} wide, the cluster centres {centres.shape[1]}: "
                           "are they of the same teacher (cluster.teacher)?")
    index = faiss.IndexFlatIP(rows.width)
    index.add(np.ascontiguousarray(centres, np.float32))
    if faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    labels, similarity = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    for s in range(0, len(rows), 65536):
        block = rows.unit(np.arange(s, min(s + 65536, len(rows)))).astype(np.float32)
        nearest, which = index.search(block, 1)
        labels[s:s + len(block)], similarity[s:s + len(block)] = which[:, 0], nearest[:, 0]
    return labels, similarity


def _unit(rows: Rows) -> np.ndarray:
    out = np.empty((len(rows), rows.width), np.float32)
    for s in range(0, len(rows), 65536):
        out[s:s + 65536] = rows.unit(np.arange(s, min(s + 65536, len(rows))))
    return out


__all__ = ["ClusterError", "Clusters", "RowsError", "assign", "cluster", "read", "write"]
