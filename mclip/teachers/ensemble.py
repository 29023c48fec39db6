"""Ensembles of teachers, and how sure a score is, given the pictures that it was measured on.

    both = join([result_of_base, result_of_large])        # of mclip.evaluate.evaluate_many
    estimate(items(both, "cifar10", spec))                # (value, half its 95 % interval)
    difference(items(both, "cifar10", spec), items(result_of_large, "cifar10", spec))

MobileCLIP's ensemble is the concatenation of its members' unit-norm embeddings: its cosine is the
mean of theirs. An interval says how far the score would move on other pictures of the same kind;
teachers are compared on the same pictures, so the interval of a difference is that of the
pictures' differences, and narrower.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from mclip.evaluate import Result
from mclip.evaluate.metrics import ranks
from mclip.evaluate.tasks.retrieval import caption_pairs
from mclip.params import EvalSet

Z = 1.96  # of a normal 95 % interval


class Items(NamedTuple):
    """What a set's main metric is a weighted sum of.

    Parameters
    ----------
    hits : ndarray of float64, shape (n,)
        1 where the nearest is right: a picture's class, or caption; a caption's picture.
    weights : ndarray of float64, shape (n,)
        Sum to 1.
    strata : ndarray of int64, shape (n,)
        Items that the set has a fixed number of: a class, or a direction of retrieval.
    """

    hits: np.ndarray
    weights: np.ndarray
    strata: np.ndarray


def join(results: Sequence[Result]) -> Result:
    """The evaluation of an ensemble from its members'.

    Parameters
    ----------
    results : sequence of Result
        Of one model each, on the same sets.

    Returns
    -------
    Result
        Of one model: pictures and texts are the members' unit-norm embeddings, concatenated, unit
        norm again. It has no metrics: see `items`.

    Examples
    --------
    >>> import torch
    >>> from mclip import evaluate
    >>> from mclip.teachers import ensemble
    >>> empty = dict.fromkeys(evaluate.Result._fields, {})
    >>> rows = {"s": [torch.eye(2)]}
    >>> result = evaluate.Result(**empty | {"images": rows, "texts": rows})
    >>> ensemble.join([result, result]).images["s"][0].shape
    torch.Size([2, 4])
    """

    def joined(which: str) -> dict[str, list[torch.Tensor]]:
        parts = [getattr(result, which) for result in results]
        return {
            name: [torch.cat([part[name][0] for part in parts], 1) / len(parts) ** 0.5]
            for name in parts[0]
        }

    return results[0]._replace(metrics=[{}], images=joined("images"), texts=joined("texts"))


def items(result: Result, name: str, spec: EvalSet) -> Items | None:
    """Take a set's main metric apart into pictures (and captions).

    Parameters
    ----------
    result : Result
        Of `mclip.evaluate.evaluate_many`, one model.
    name : str
        One of its sets.
    spec : EvalSet
        Its entry of `evaluate.sets`.

    Returns
    -------
    Items or None
        None for a metric that is no sum over items.
    """
    split = result.splits[name]
    images, texts = result.images[name][0], result.texts[name][0]
    if spec.metric == "mean_r1":
        _, pairs = caption_pairs(split.answers, distinct=spec.captions == "distinct")
        directions = ranks(images, texts, pairs), ranks(texts, images, pairs[:, ::-1].copy())
        hits = [(rank == 0).numpy().astype(float) for rank in directions]
        weights = [np.full(len(h), 0.5 / len(h)) for h in hits]
        strata = np.repeat([0, 1], [len(h) for h in hits])
        return Items(np.concatenate(hits), np.concatenate(weights), strata)
    if spec.metric not in ("top1", "mean_per_class"):
        return None
    labels = np.asarray(split.answers)
    pairs = np.stack([np.arange(len(labels)), labels], 1)
    hits_of_pictures = (ranks(images, texts, pairs) == 0).numpy().astype(float)
    share = np.full(len(labels), 1 / len(labels))
    if spec.metric == "mean_per_class":
        _, which, count = np.unique(labels, return_inverse=True, return_counts=True)
        share = 1 / (len(count) * count[which])
    return Items(hits_of_pictures, share, labels)


def estimate(found: Items) -> tuple[float, float]:
    """The metric, and half its 95 % interval over items.

    Parameters
    ----------
    found : Items
        Of `items`, or differences of two.

    Returns
    -------
    value, half : float
        Both 0 to 1.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.teachers import ensemble
    >>> hits = np.repeat([1.0, 0.0], [80, 20])
    >>> same = np.zeros(100, int)
    >>> value, half = ensemble.estimate(ensemble.Items(hits, np.full(100, 0.01), same))
    >>> round(value, 3), round(half, 3)
    (0.8, 0.079)
    """
    value, variance = float(found.weights @ found.hits), 0.0
    for stratum in np.unique(found.strata):
        rows = found.strata == stratum
        hits, weights, n = found.hits[rows], found.weights[rows], rows.sum()
        variance += (weights**2).sum() * hits.var() * n / max(n - 1, 1)
    return float(value), float(Z * variance**0.5)


def difference(a: Items, b: Items) -> tuple[float, float]:
    """How much better `a` is than `b` on the same items, and half the 95 % interval of that.

    Parameters
    ----------
    a, b : Items
        Of the same set.

    Returns
    -------
    value, half : float
        -1 to 1.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.teachers import ensemble
    >>> weights, same = np.full(4, 0.25), np.zeros(4, int)
    >>> a = ensemble.Items(np.array([1.0, 1.0, 0.0, 0.0]), weights, same)
    >>> ensemble.difference(a, a)
    (0.0, 0.0)
    """
    return estimate(a._replace(hits=a.hits - b.hits))
