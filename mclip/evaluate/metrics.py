"""Ranks by cosine, from which every task calculates its metrics.

Of equal similarities the earlier gallery row comes first, as in argmax. So a collapsed model scores
as if it always named the first class, which is chance and not 1.
"""

import numpy as np
import torch
from torch import Tensor

AT_ONCE = 1 << 24  # similarities held at once: 64 MB


def ranks(
    queries: Tensor, gallery: Tensor, pairs: np.ndarray | Tensor, *, chunk: int | None = None
) -> Tensor:
    """How many wrong gallery rows come before each query's nearest right one.

    Parameters
    ----------
    queries : Tensor, (n, d)
        Unit-norm embeddings.
    gallery : Tensor, (m, d)
        Unit-norm embeddings.
    pairs : ndarray of int, (p, 2)
        Rows (query, gallery) that belong together, at least one a query.
    chunk : int, optional
        Queries at a time; by default as many as keep chunk x m similarities below `AT_ONCE`.

    Returns
    -------
    Tensor of int64, (n,)
        0: the nearest gallery row is right, a hit at 1.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from mclip.evaluate import metrics
    >>> pairs = np.array([[0, 0], [1, 2]])
    >>> metrics.ranks(torch.eye(3)[:2], torch.eye(3), pairs).tolist()
    [0, 2]
    """
    chunk = chunk or _rows_at_once(gallery)
    pairs = torch.as_tensor(pairs)
    pairs = pairs[pairs[:, 0].argsort(stable=True)]
    bounds = torch.searchsorted(
        pairs[:, 0].contiguous(), torch.arange(0, len(queries) + chunk, chunk)
    )
    position, out = torch.arange(len(gallery)), []
    for number, start in enumerate(range(0, len(queries), chunk)):
        similarity = queries[start : start + chunk] @ gallery.T
        query, right = (pairs[bounds[number] : bounds[number + 1]] - torch.tensor([start, 0])).T
        values = similarity[query, right]
        best = torch.full((len(similarity),), -torch.inf).scatter_reduce(0, query, values, "amax")
        # the first of the right ones that are as near as the best
        first = torch.full((len(similarity),), len(gallery)).scatter_reduce(
            0, query, torch.where(values == best[query], right, len(gallery)), "amin"
        )
        before = (similarity > best[:, None]).sum(1)
        before += ((similarity == best[:, None]) & (position < first[:, None])).sum(1)
        out.append(before)
    return torch.cat(out)


def nearest(queries: Tensor, gallery: Tensor) -> np.ndarray:
    """The gallery row nearest to each query, of equals the first.

    Parameters
    ----------
    queries : Tensor, (n, d)
        Unit-norm embeddings.
    gallery : Tensor, (m, d)
        Unit-norm embeddings.

    Returns
    -------
    ndarray of int64, (n,)

    Examples
    --------
    >>> import torch
    >>> from mclip.evaluate import metrics
    >>> metrics.nearest(torch.eye(3), torch.eye(3).flip(0)).tolist()
    [2, 1, 0]
    """
    parts = [(part @ gallery.T).numpy().argmax(1) for part in queries.split(_rows_at_once(gallery))]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _rows_at_once(gallery: Tensor) -> int:
    return max(1, AT_ONCE // max(len(gallery), 1))
