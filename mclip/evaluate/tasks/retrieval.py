"""Retrieval: a picture's captions among all captions, and a caption's pictures among all pictures.

`captions: each` of an evaluation set (CLIP_benchmark's way) makes every caption an entry of its
own; `distinct` makes one entry of equal captions, which is right for all their pictures.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mclip.data.evalsets import Answer, Split
from mclip.evaluate.metrics import ranks
from mclip.evaluate.tasks import Encode, Scores
from mclip.params import EvalSet

RECALL_AT = (1, 5, 10)

TITLE = "retrieval"
TEXTS = "captions"
METRICS = (*(f"{way}_r{k}" for way in ("i2t", "t2i") for k in RECALL_AT), "mean_r1")
MAIN = "mean_r1"
PROBE = False


def captions(text: str) -> list[str]:
    """One a line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


ANSWER = Answer("txt", captions)


def check(split: Split, path: str) -> None:
    """Every split that could be read can be scored."""


def gallery(split: Split) -> list[str]:
    return caption_pairs(split.answers)[0]


def prompts(split: Split, text: str) -> list[str]:
    return [text]


def right(split: Split) -> list[list[str]]:
    return split.answers


def score(split: Split, spec: EvalSet, images: Sequence[Tensor], encode: Encode) -> Scores:
    entries, pairs = caption_pairs(split.answers, distinct=spec.captions == "distinct")
    embeddings = encode(entries)
    metrics = [recall(x, y, pairs) for x, y in zip(images, embeddings, strict=True)]
    items = []
    if spec.metric == MAIN:
        items = [correct(x, y, pairs) for x, y in zip(images, embeddings, strict=True)]
    return Scores(entries, embeddings, metrics, chance(pairs), items)


def correct(images: Tensor, texts: Tensor, pairs: np.ndarray) -> np.ndarray:
    """Each picture's share of mean_r1: the mean of the shares is the metric.

    A caption's hit at 1 is divided evenly among its pictures, so that both directions count.

    Parameters
    ----------
    images : Tensor, (n, d)
        Unit-norm embeddings of the pictures.
    texts : Tensor, (m, d)
        Unit-norm embeddings of the captions.
    pairs : ndarray of int, (p, 2)
        Rows (picture, caption) that belong together, see `caption_pairs`.

    Returns
    -------
    ndarray of float64, (n,)

    Examples
    --------
    >>> import numpy as np, torch
    >>> from mclip.evaluate.tasks import retrieval
    >>> pairs = np.array([[0, 0], [1, 1]])
    >>> retrieval.correct(torch.eye(2), torch.eye(2)[[0, 0]], pairs).tolist()
    [1.0, 0.0]
    """
    picture, caption = pairs.T
    found = (ranks(images, texts, pairs) == 0).double().numpy()
    back = (ranks(texts, images, pairs[:, ::-1].copy()) == 0).double().numpy()
    each = (back / np.maximum(np.bincount(caption, minlength=len(back)), 1))[caption]
    shared = np.bincount(picture, weights=each, minlength=len(found))
    return (found + shared * len(found) / len(back)) / 2


def caption_pairs(
    captions: Sequence[Sequence[str]], distinct: bool = True
) -> tuple[list[str], np.ndarray]:
    """The captions to search among, and which belong to which picture.

    Parameters
    ----------
    captions : sequence of sequences of str
        Each picture's.
    distinct : bool
        A caption that several pictures share is one entry and right for all of them. Otherwise
        each is an entry of its own that is right for its own picture only, as CLIP_benchmark, and
        so the literature, counts.

    Returns
    -------
    gallery : list of str
        The captions, in order of appearance.
    pairs : ndarray of int64, (p, 2)
        Rows (picture, caption) that belong together.

    Examples
    --------
    >>> from mclip.evaluate.tasks import retrieval
    >>> gallery, pairs = retrieval.caption_pairs([["a cat", "a pet"], ["a pet"]])
    >>> gallery, pairs.tolist()
    (['a cat', 'a pet'], [[0, 0], [0, 1], [1, 1]])
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


def recall(
    images: Tensor, texts: Tensor, pairs: np.ndarray, ks: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Recall at k from pictures to captions and back.

    Parameters
    ----------
    images : Tensor, (n, d)
        Unit-norm embeddings of the pictures.
    texts : Tensor, (m, d)
        Unit-norm embeddings of the captions.
    pairs : ndarray of int, (p, 2)
        Rows (picture, caption) that belong together, see `caption_pairs`.
    ks : sequence of int

    Returns
    -------
    dict of str to float
        i2t_rK, the share of pictures that have a caption of their own among the K nearest; t2i_rK,
        the share of captions that have a picture of their own among the K nearest; mean_r1, the
        mean of both at 1.

    References
    ----------
    LAION-AI/CLIP_benchmark, clip_benchmark/metrics/zeroshot_retrieval.py.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from mclip.evaluate.tasks import retrieval
    >>> pairs = np.array([[0, 0], [1, 1]])
    >>> retrieval.recall(torch.eye(2), torch.eye(2)[[0, 0]], pairs, ks=[1])
    {'i2t_r1': 0.5, 't2i_r1': 0.5, 'mean_r1': 0.5}
    """
    out: dict[str, float] = {}
    for name, rank in (
        ("i2t", ranks(images, texts, pairs)),
        ("t2i", ranks(texts, images, pairs[:, ::-1].copy())),
    ):
        out |= {f"{name}_r{k}": float((rank < k).double().mean()) for k in ks}
    return out | {"mean_r1": (out["i2t_r1"] + out["t2i_r1"]) / 2}


def chance(pairs: np.ndarray, ks: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """What guessing at random scores in each metric of `recall`.

    k draws without replacement from m, of which r are right: 1 - prod_i (m - r - i) / (m - i),
    i < k.

    Parameters
    ----------
    pairs : ndarray of int, (p, 2)
        Rows (picture, caption) that belong together.
    ks : sequence of int

    Returns
    -------
    dict of str to float

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.evaluate.tasks import retrieval
    >>> retrieval.chance(np.array([[0, 0], [1, 1], [2, 2], [3, 3]]), ks=[1])
    {'i2t_r1': 0.25, 't2i_r1': 0.25, 'mean_r1': 0.25}
    """
    out = {}
    for name, query, gallery in (("i2t", 0, 1), ("t2i", 1, 0)):
        right = np.bincount(pairs[:, query])
        others = pairs[:, gallery].max() + 1
        for k in ks:
            draws = [np.clip((others - right - i) / max(others - i, 1), 0, 1) for i in range(k)]
            out[f"{name}_r{k}"] = float(1 - np.prod(draws, axis=0)[right > 0].mean())
    return out | {"mean_r1": (out["i2t_r1"] + out["t2i_r1"]) / 2}
