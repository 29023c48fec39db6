"""Zero-shot classification: a picture's class is the one whose text is nearest to it.

A class's embedding is the mean of the unit-norm embeddings of its prompts, normalised again (CLIP's
prompt ensemble). Of equal similarities the earlier class counts, as in argmax.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from mclip.data.evalsets import Answer, EvalError, Split
from mclip.evaluate.features import class_features
from mclip.evaluate.features import prompts as class_prompts
from mclip.evaluate.metrics import nearest, ranks
from mclip.evaluate.scores import Result
from mclip.evaluate.tasks import Encode, Scores
from mclip.params import EvalSet

TITLE = "zero-shot classification"
TEXTS = "classes"
METRICS = ("top1", "top5", "mean_per_class", "f1_macro", "worst_group_top1", "worst_group_top5")
MAIN = "top1"
PROBE = True


def class_number(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("not a class number")
    return int(text)


ANSWER = Answer("cls", class_number)


def check(split: Split, path: str) -> None:
    top = max(split.answers, default=-1)
    if top >= len(split.classes):
        raise EvalError(
            f"{path}/classnames.txt: {len(split.classes)} classes, but labels go up to {top}"
        )


def gallery(split: Split) -> list[str]:
    return split.classes


def prompts(split: Split, text: str) -> list[str]:
    return class_prompts(split._replace(classes=[text]))


def right(split: Split) -> list[list[str]]:
    return [[split.classes[label]] for label in split.answers]


def score(split: Split, spec: EvalSet, images: Sequence[Tensor], encode: Encode) -> Scores:
    classes = [class_features(own, len(split.classes)) for own in encode(class_prompts(split))]
    metrics = [
        accuracy(x, y, split.answers, groups=split.groups, f1=spec.metric == "f1_macro")
        for x, y in zip(images, classes, strict=True)
    ]
    items = [
        correct(x, y, split.answers, spec.metric) for x, y in zip(images, classes, strict=True)
    ]
    shares = [each for each in items if each is not None]
    return Scores(split.classes, classes, metrics, chance(len(split.classes)), shares)


def correct(
    images: Tensor, classes: Tensor, labels: Sequence[int] | np.ndarray, metric: str
) -> np.ndarray | None:
    """Each picture's share of a metric: the mean of the shares is the metric.

    Parameters
    ----------
    images : Tensor, (n, d)
        Unit-norm embeddings of the pictures.
    classes : Tensor, (c, d)
        Unit-norm embeddings of the classes.
    labels : sequence of int, (n,)
        Each picture's row of `classes`.
    metric : str
        One of `METRICS`.

    Returns
    -------
    ndarray of float64, (n,), or None
        For top1 and top5, 1 where the picture is right, else 0; for mean_per_class the same,
        weighted by n / (classes * pictures of its class). None for the other metrics, which are no
        mean over pictures.

    Examples
    --------
    >>> import torch
    >>> from mclip.evaluate.tasks import classification
    >>> images, classes = torch.eye(4)[[0, 1, 1, 0]], torch.eye(4)[:2]
    >>> classification.correct(images, classes, [0, 1, 0, 0], "top1").tolist()
    [1.0, 1.0, 0.0, 1.0]
    """
    if metric not in ("top1", "top5", "mean_per_class"):
        return None
    labels = np.asarray(labels)
    rank = ranks(images, classes, np.stack([np.arange(len(labels)), labels], 1)).numpy()
    right = (rank < (5 if metric == "top5" else 1)).astype(float)
    if metric == "mean_per_class":
        counts = np.bincount(labels)
        right *= len(labels) / ((counts > 0).sum() * counts[labels])
    return right


def accuracy(
    images: Tensor,
    classes: Tensor,
    labels: Sequence[int] | np.ndarray,
    *,
    groups: Sequence[int] = (),
    f1: bool = False,
) -> dict[str, float]:
    """Zero-shot accuracy of pictures against classes.

    Parameters
    ----------
    images : Tensor, (n, d)
        Unit-norm embeddings of the pictures.
    classes : Tensor, (c, d)
        Unit-norm embeddings of the classes.
    labels : sequence of int, (n,)
        Each picture's row of `classes`.
    groups : sequence of int, (n,) or empty
        A number a picture, such as its region.
    f1 : bool
        Give f1_macro, too.

    Returns
    -------
    dict of str to float
        top1; top5 with more than five classes; mean_per_class, the mean of the classes' own
        accuracies, of those that have a picture (balanced accuracy); with `groups`,
        worst_group_top1 and worst_group_top5, the accuracy in the group where it is lowest; with
        `f1`, f1_macro, the mean of the F1 of those classes.

    References
    ----------
    Radford et al., 2021: Learning Transferable Visual Models From Natural Language Supervision,
    section 3.1 (arXiv 2103.00020).

    Examples
    --------
    >>> import torch
    >>> from mclip.evaluate.tasks import classification
    >>> classification.accuracy(torch.eye(4)[[0, 1, 1, 0]], torch.eye(4)[:2], [0, 1, 0, 0])
    {'top1': 0.75, 'mean_per_class': 0.8333333333333333}
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
        correct = np.array([hit[1][labels == c].sum() for c in there])
        predicted = np.bincount(nearest(images, classes), minlength=len(classes))[there]
        out["f1_macro"] = np.mean(2 * correct / (predicted + np.bincount(labels)[there]))
    return {name: float(value) for name, value in out.items()}


def chance(classes: int) -> dict[str, float]:
    """What guessing at random scores in each metric of `accuracy`, and in a linear probe.

    For worst_group and f1_macro this is the accuracy of guessing. The lowest of several groups
    stays a little below it, and so does the F1 of uneven classes.

    Parameters
    ----------
    classes : int
        How many there are.

    Returns
    -------
    dict of str to float

    Examples
    --------
    >>> from mclip.evaluate.tasks import classification
    >>> classification.chance(10)["top5"]
    0.5
    """
    top = {"top1": 1 / classes} | ({"top5": 5 / classes} if classes > 5 else {})
    worst = {f"worst_group_{name}": value for name, value in top.items()}
    others = dict.fromkeys(("mean_per_class", "f1_macro", "probe_top1"), 1 / classes)
    return top | worst | others


def confusion(result: Result, name: str) -> pd.DataFrame:
    """Count which classes are taken for which, as the mean over the models.

    Parameters
    ----------
    result : Result
        Of `mclip.evaluate.evaluate_many`.
    name : str
        One of its sets.

    Returns
    -------
    DataFrame, shape (classes, classes)
        Share of each true class (row) that is taken for each class (column), 0 to 1.

    Examples
    --------
    >>> import torch
    >>> from mclip import evaluate
    >>> from mclip.data.evalsets import Split
    >>> split = Split([], [], [0, 1], ["cat", "dog"], [], [], [])
    >>> empty = dict.fromkeys(evaluate.Result._fields, {})
    >>> rows = {"s": [torch.eye(2)]}
    >>> found = {"images": rows, "texts": rows, "splits": {"s": split}}
    >>> evaluate.confusion(evaluate.Result(**empty | found), "s")
         cat  dog
    cat  1.0  0.0
    dog  0.0  1.0
    """
    split = result.splits[name]
    labels, n = np.asarray(split.answers), len(split.classes)
    counts = sum(
        (
            np.bincount(labels * n + nearest(images, classes), minlength=n * n)
            for images, classes in zip(result.images[name], result.texts[name], strict=True)
        ),
        start=np.zeros(n * n, np.int64),
    ).reshape(n, n)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return pd.DataFrame(share, index=split.classes, columns=split.classes)
