"""Ranks, zero-shot accuracy, retrieval recall: arrays in, numbers in 0..1 out; what guessing scores
in each.

Of equal similarities the earlier gallery row comes first, as in argmax. So a collapsed model scores
as if it always named the first class, which is chance and not 1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
AT_ONCE = 1 << 24  # similarities held at once: 64 MB


def ranks(
    queries: Tensor, gallery: Tensor, pairs: np.ndarray, *, chunk: int | None = None
) -> Tensor:
    """(n,) how many wrong gallery rows come before the nearest right one; 0 hits at 1.

    Parameters
    ----------
    queries, gallery : (n, d) and (m, d), unit-norm.
    pairs : (p, 2) rows (query, gallery) that belong together, at least one a query.
    chunk : queries at a time; None: so many that chunk x m similarities stay below `AT_ONCE`.
    """
    chunk = chunk or max(1, AT_ONCE // max(len(gallery), 1))
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


def classification(
    images: Tensor,
    classes: Tensor,
    labels: Sequence[int],
    *,
    groups: Sequence[int] = (),
    f1: bool = False,
) -> dict[str, float]:
    """Zero-shot accuracy of (n, d) pictures against (c, d) classes, both unit-norm.

    Returns
    -------
    top1, top5 (with more than five classes), mean_per_class: the mean of the classes' own
    accuracies, of those that have a picture (balanced accuracy); with `groups`, a number a picture,
    worst_group_top1 and worst_group_top5: the accuracy in the group where it is lowest; with `f1`,
    f1_macro: the mean of the F1 of those classes.
    """
    labels = np.asarray(labels)
    rank = ranks(images, classes, np.stack([np.arange(len(labels)), labels], 1)).numpy()
    hit, out = {1: rank == 0, 5: rank < 5}, {}
    for k in (1, 5) if len(classes) > 5 else (1,):
        out[f"top{k}"] = hit[k].mean()
        if len(groups):
            out[f"worst_group_top{k}"] = min(
                hit[k][np.asarray(groups) == g].mean() for g in np.unique(groups)
            )
    there = np.unique(labels)
    out["mean_per_class"] = np.mean([hit[1][labels == c].mean() for c in there])
    if f1:
        right = np.array([hit[1][labels == c].sum() for c in there])
        named, real = (
            np.bincount(nearest(images, classes), minlength=len(classes))[there],
            np.bincount(labels)[there],
        )
        out["f1_macro"] = np.mean(2 * right / (named + real))
    return {name: float(value) for name, value in out.items()}


def nearest(queries: Tensor, gallery: Tensor) -> np.ndarray:
    """(n,) the gallery row nearest to each query, of equals the first."""
    rows = max(1, AT_ONCE // max(len(gallery), 1))
    parts = [(part @ gallery.T).numpy().argmax(1) for part in queries.split(rows)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def caption_pairs(
    captions: Sequence[Sequence[str]], distinct: bool = True
) -> tuple[list[str], np.ndarray]:
    """The captions to search among, in order of appearance, and (p, 2) rows (picture, caption) that
    belong together.

    distinct: a caption that several pictures share is one entry and right for all of them.
    Otherwise each is an entry of its own that is right for its own picture only, as CLIP_benchmark,
    and so the literature, counts.
    """
    if not distinct:
        owner = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
        return [text for texts in captions for text in texts], np.stack(
            [owner, np.arange(len(owner))], 1
        )
    ids: dict[str, int] = {}
    pairs = [
        (i, ids.setdefault(text, len(ids))) for i, texts in enumerate(captions) for text in texts
    ]
    return list(ids), np.unique(np.asarray(pairs, dtype=np.int64).reshape(-1, 2), axis=0)


def retrieval(
    images: Tensor, texts: Tensor, pairs: np.ndarray, ks: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """R@k from pictures to captions (i2t) and back (t2i), and `mean_r1` of the two R@1: see
    `caption_pairs`.
    """
    out = {}
    for name, rank in (
        ("i2t", ranks(images, texts, pairs)),
        ("t2i", ranks(texts, images, pairs[:, ::-1].copy())),
    ):
        out |= {f"{name}_r{k}": float((rank < k).double().mean()) for k in ks}
    return out | {"mean_r1": (out["i2t_r1"] + out["t2i_r1"]) / 2}


def classification_chance(classes: int) -> dict[str, float]:
    """What guessing at random scores in each metric of `classification`.

    For worst_group and f1_macro this is the accuracy of guessing, which the lowest of several
    groups stays a little below and the F1 of uneven classes, too.
    """
    top = {"top1": 1 / classes} | ({"top5": 5 / classes} if classes > 5 else {})
    worst = {f"worst_group_{name}": value for name, value in top.items()}
    return (
        top
        | worst
        | {"mean_per_class": 1 / classes, "f1_macro": 1 / classes, "probe_top1": 1 / classes}
    )


def retrieval_chance(pairs: np.ndarray, ks: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """What guessing at random scores in each metric of `retrieval`.

    k draws without replacement from m, of which r are right: 1 - prod_i (m - r - i) / (m - i), i <
    k.
    """
    out = {}
    for name, query, gallery in (("i2t", 0, 1), ("t2i", 1, 0)):
        right = np.bincount(pairs[:, query])
        others = pairs[:, gallery].max() + 1
        for k in ks:
            draws = [np.clip((others - right - i) / max(others - i, 1), 0, 1) for i in range(k)]
            out[f"{name}_r{k}"] = float(1 - np.prod(draws, axis=0)[right > 0].mean())
    return out | {"mean_r1": (out["i2t_r1"] + out["t2i_r1"]) / 2}
