"""Few-shot classification without training: Tip-Adapter and APE on cached features.

Both add to the zero-shot logits a cache of k labelled pictures a class, with f a picture's
embedding, W the classes', F and L the cache's embeddings and one-hot labels, all embeddings
unit-norm:

    Tip-Adapter (arXiv 2111.03930):  100 f W' + alpha exp(-beta (1 - f F')) L
    APE (arXiv 2304.01195):          100 f W' + alpha exp(-beta (1 - f_Q F_Q')) (exp(gamma D) * L)

APE keeps the Q coordinates that tell classes apart (`refined`), normalised again, and weighs each
cached picture by D = log2(1 / p), p what softmax(F_Q W_Q') gives its own class: pictures that the
text is unsure of count more. (That the softmax has no scale is the authors' code; the paper leaves
it open.) alpha, beta and gamma are searched on a validation split over the papers' ranges. 100 is
CLIP's logit scale: another model's own takes its place, or the ranges for alpha would not fit.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mclip.evaluate.probe import validation
from mclip.evaluate.scores import Result
from mclip.system.progress import bar

SHOTS = (1, 2, 4, 8, 16)
SCALE = 100.0
KEEP = 0.5  # share of the coordinates that APE keeps (500 of 1,024 for ImageNet)
WEIGHT = (0.7, 0.3)  # of similarity and variance in APE's criterion (ImageNet's)


class Grid(NamedTuple):
    """Values to search: from 0.1 (gamma: 0) up to, without, the end. Both papers take 7 and 7; 200
    x 20 steps, APE 0.5 in 5 steps for gamma. Here beta and alpha take fewer steps, for speed.
    """

    beta: tuple[float, int] = (7.0, 10)
    alpha: tuple[float, int] = (7.0, 10)
    gamma: tuple[float, int] = (0.5, 5)

    def values(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        beta, alpha, gamma = (
            first + np.arange(steps) * (end - first) / steps
            for first, (end, steps) in zip((0.1, 0.1, 0.0), self, strict=True)
        )
        return beta, alpha, gamma


class Cache(NamedTuple):
    """What a method adds to the zero-shot logits, without alpha, beta and gamma."""

    keys: Tensor  # (m, q) unit-norm
    labels: Tensor  # (m,)
    doubt: Tensor  # (m,) D; 0 for Tip-Adapter
    rows: Tensor | None = None  # the coordinates that APE keeps

    def reduce(self, features: Tensor) -> Tensor:
        return features if self.rows is None else F.normalize(features[:, self.rows], dim=-1)


def tip(keys: Tensor, labels: Tensor) -> Cache:
    """Tip-Adapter's cache.

    Parameters
    ----------
    keys : Tensor, (m, d)
        Unit-norm embeddings of the labelled pictures.
    labels : Tensor of int64, (m,)

    Returns
    -------
    Cache

    References
    ----------
    Zhang et al., 2022: Tip-Adapter (arXiv 2111.03930).

    Examples
    --------
    >>> import torch
    >>> from mclip.evaluate import fewshot
    >>> cache = fewshot.tip(torch.eye(3), torch.tensor([0, 1, 1]))
    >>> fewshot.logits(cache, torch.eye(3), torch.eye(3)[:2], beta=1.0, alpha=100.0).argmax(1)
    tensor([0, 1, 1])
    """
    return Cache(keys, labels, torch.zeros(len(keys)))


def ape(
    keys: Tensor,
    labels: Tensor,
    text: Tensor,
    *,
    keep: float = KEEP,
    weight: Sequence[float] = WEIGHT,
) -> Cache:
    """APE's cache.

    Parameters
    ----------
    keys : Tensor, (m, d)
        Unit-norm embeddings of the labelled pictures.
    labels : Tensor of int64, (m,)
    text : Tensor, (c, d)
        Unit-norm class embeddings.
    keep : float
        Share of the coordinates to keep.
    weight : (float, float)
        Of similarity and variance, see `refined`.

    Returns
    -------
    Cache

    References
    ----------
    Zhu et al., 2023: Not All Features Matter (arXiv 2304.01195).

    Examples
    --------
    >>> import torch
    >>> from mclip.evaluate import fewshot
    >>> fewshot.ape(torch.eye(4), torch.tensor([0, 1, 1, 0]), torch.eye(4)[:2]).keys.shape
    torch.Size([4, 2])
    """
    rows = refined(keys, labels, text, keep, weight)
    small, classes = (F.normalize(x[:, rows], dim=-1) for x in (keys, text))
    p = (small @ classes.T).softmax(1)[torch.arange(len(labels)), labels]
    return Cache(small, labels, ((1 + 1e-6) / (p + 1e-6)).log2(), rows)


def refined(
    keys: Tensor, labels: Tensor, text: Tensor, keep: float = KEEP, weight: Sequence[float] = WEIGHT
) -> Tensor:
    """The coordinates with the highest w1 Var - w0 S (APE, section 3.1), the best first.

    S: the mean product, in a coordinate, of embeddings of different classes (their text and their
    pictures), which sums to their mean similarity; Var: the variance of the class embeddings.

    Returns
    -------
    Tensor of int64, (max(1, round(keep * d)),)
    """
    classes = len(text)
    total = text.index_add(0, labels, keys)  # (c, d): a class's sum
    count = torch.bincount(labels, minlength=classes).to(text.dtype) + 1
    pairs = count.sum() ** 2 - (count**2).sum()
    similarity = (total.sum(0) ** 2 - (total**2).sum(0)) / pairs.clamp(min=1)
    merit = weight[1] * text.var(0, correction=1 if classes > 1 else 0) - weight[0] * similarity
    return merit.argsort(descending=True, stable=True)[: max(1, round(keep * text.shape[1]))]


def logits(
    cache: Cache,
    features: Tensor,
    text: Tensor,
    beta: float,
    alpha: float,
    gamma: float = 0.0,
    *,
    scale: float = SCALE,
) -> Tensor:
    """Logits of a cache and the zero-shot classifier.

    Parameters
    ----------
    cache : Cache
        Of `tip` or `ape`.
    features : Tensor, (n, d)
        Unit-norm embeddings of the pictures.
    text : Tensor, (c, d)
        Unit-norm class embeddings.
    beta, alpha, gamma : float
        See the module's formulas.
    scale : float
        The model's logit scale.

    Returns
    -------
    Tensor, (n, c)
    """
    near = (
        torch.exp(-beta * (1 - cache.reduce(features) @ cache.keys.T)) * (gamma * cache.doubt).exp()
    )
    plain = scale * features @ text.T
    return plain + alpha * torch.zeros_like(plain).index_add_(1, cache.labels, near)


def search(
    cache: Cache,
    features: Tensor,
    labels: Tensor,
    text: Tensor,
    grid: Grid | None = None,
    *,
    scale: float = SCALE,
) -> tuple[float, ...]:
    """The numbers of the highest accuracy on a validation split; of equals the smallest.

    gamma is only searched where the cache has doubts, so for APE.

    Parameters
    ----------
    cache : Cache
        Of `tip` or `ape`.
    features : Tensor, (n, d)
        Unit-norm embeddings of the validation split.
    labels : Tensor of int64, (n,)
    text : Tensor, (c, d)
        Unit-norm class embeddings.
    grid : Grid, optional
        The values to try.
    scale : float
        The model's logit scale.

    Returns
    -------
    (float, float, float)
        beta, alpha, gamma.
    """
    betas, alphas, gammas = (grid or Grid()).values()
    gammas = gammas if cache.doubt.any() else gammas[:1]
    plain, near = scale * features @ text.T, cache.reduce(features) @ cache.keys.T
    right = np.zeros((len(betas), len(alphas), len(gammas)))
    values = [
        F.one_hot(cache.labels, len(text)) * (gamma * cache.doubt).exp()[:, None]
        for gamma in gammas
    ]
    for i, beta in enumerate(betas):
        affinity = torch.exp(-beta * (1 - near))
        for k, weighted in enumerate(values):
            added = affinity @ weighted
            for j, alpha in enumerate(alphas):
                right[i, j, k] = ((plain + alpha * added).argmax(1) == labels).sum()
    best = np.unravel_index(right.argmax(), right.shape)
    return float(betas[best[0]]), float(alphas[best[1]]), float(gammas[best[2]])


def draw(
    labels: Sequence[int] | np.ndarray, shots: Sequence[int] = SHOTS, seed: int = 0
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Draw the validation split (20 % of the train split, as the linear probe's) and the shots.

    The shots of a smaller k are among those of a larger one; a class that has fewer than k gives
    what it has.

    Parameters
    ----------
    labels : sequence of int, (n,)
        Of the train split.
    shots : sequence of int
        Numbers of pictures a class.
    seed : int

    Returns
    -------
    held : ndarray of int64
        Rows for validation.
    rows : dict of int to ndarray of int64
        k -> the rows of about k pictures a class.

    Examples
    --------
    >>> from mclip.evaluate import fewshot
    >>> held, rows = fewshot.draw([0, 1] * 50, shots=(1, 4))
    >>> len(held), len(rows[1]), len(rows[4])
    (20, 2, 8)
    """
    labels = np.asarray(labels)
    held, rest = validation(len(labels), seed)
    own = [rest[labels[rest] == c] for c in np.unique(labels)]
    return held, {k: np.concatenate([rows[:k] for rows in own]) for k in shots}


def curve(
    train: Tensor,
    train_labels: Sequence[int],
    test: Tensor,
    test_labels: Sequence[int],
    text: Tensor,
    *,
    shots: Sequence[int] = SHOTS,
    seed: int = 0,
    grid: Grid | None = None,
    scale: float = SCALE,
) -> pd.DataFrame:
    """Accuracy of zero-shot (0 shots), Tip-Adapter and APE for each number of shots.

    Parameters
    ----------
    train : Tensor, (n, d)
        Unit-norm embeddings of the train split.
    train_labels : sequence of int, (n,)
    test : Tensor, (m, d)
        Unit-norm embeddings of the test split.
    test_labels : sequence of int, (m,)
    text : Tensor, (c, d)
        Unit-norm class embeddings.
    shots : sequence of int
        Numbers of labelled pictures a class.
    seed : int
        Of `draw`.
    grid : Grid, optional
        The values that are searched.
    scale : float
        The model's logit scale.

    Returns
    -------
    DataFrame
        Columns method, shots, value (top-1, 0 to 1), and beta, alpha, gamma: what the search chose.

    References
    ----------
    Tip-Adapter (arXiv 2111.03930), APE (arXiv 2304.01195).

    Examples
    --------
    >>> import torch
    >>> from mclip.evaluate import fewshot
    >>> labels = [0, 1] * 20
    >>> features = torch.eye(4)[labels]
    >>> table = fewshot.curve(features, labels, features, labels, torch.eye(4)[:2], shots=[1])
    >>> table["value"].tolist()
    [1.0, 1.0, 1.0]
    """
    y, y_test = torch.as_tensor(train_labels), torch.as_tensor(test_labels)
    held, rows = draw(train_labels, shots, seed)
    hit = lambda scores: float((scores.argmax(1) == y_test).double().mean())  # noqa: E731
    out = [("zero-shot", 0, hit(test @ text.T), None, None, None)]
    caches = {"Tip-Adapter": tip, "APE": lambda keys, labels: ape(keys, labels, text)}
    for (method, make), k in bar(
        list(itertools.product(caches.items(), shots)), desc="few-shot", unit="fit"
    ):
        cache = make(train[rows[k]], y[rows[k]])
        chosen = search(cache, train[held], y[held], text, grid, scale=scale)
        out.append((method, k, hit(logits(cache, test, text, *chosen, scale=scale)), *chosen))
    return pd.DataFrame(out, columns=["method", "shots", "value", "beta", "alpha", "gamma"])


def curves(
    result: Result, *, shots: Sequence[int] = SHOTS, seed: int = 0, grid: Grid | None = None
) -> pd.DataFrame:
    """`curve` of every set with a train split and every model that was evaluated.

    Parameters
    ----------
    result : Result
        Of `mclip.evaluate.evaluate_many`, of sets with `probe: true`.
    shots, seed, grid
        See `curve`.

    Returns
    -------
    DataFrame
        Columns set, model (a number, in the result's order), then those of `curve`.
    """
    parts = [
        curve(
            train,
            labels,
            test,
            result.splits[name].answers,
            text,
            shots=shots,
            seed=seed,
            grid=grid,
            scale=result.scale[i],
        ).assign(set=name, model=i)
        for name, (labels, features) in result.train.items()
        for i, (train, test, text) in enumerate(
            zip(features, result.images[name], result.texts[name], strict=True)
        )
    ]
    columns = ["set", "model", "method", "shots", "value", "beta", "alpha", "gamma"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
