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
        return tuple(
            first + np.arange(steps) * (end - first) / steps
            for first, (end, steps) in zip((0.1, 0.1, 0.0), self, strict=True)
        )


class Cache(NamedTuple):
    """What a method adds to the zero-shot logits, but for alpha, beta and gamma."""

    keys: Tensor  # (m, q) unit-norm
    labels: Tensor  # (m,)
    doubt: Tensor  # (m,) D; 0 for Tip-Adapter
    rows: Tensor | None = None  # the coordinates that APE keeps

    def reduce(self, features: Tensor) -> Tensor:
        return features if self.rows is None else F.normalize(features[:, self.rows], dim=-1)


def tip(keys: Tensor, labels: Tensor) -> Cache:
    """Tip-Adapter's cache: (m, d) unit-norm embeddings of the labelled pictures."""
    return Cache(keys, labels, torch.zeros(len(keys)))


def ape(
    keys: Tensor,
    labels: Tensor,
    text: Tensor,
    *,
    keep: float = KEEP,
    weight: Sequence[float] = WEIGHT,
) -> Cache:
    """APE's cache; text: (c, d) unit-norm class embeddings."""
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
    """(n, c) logits of (n, d) unit-norm pictures."""
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
    """(beta, alpha, gamma) of the highest accuracy on a validation split; of equals the smallest.

    gamma is only searched where the cache has doubts, so for APE.
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
    i, j, k = np.unravel_index(right.argmax(), right.shape)
    return float(betas[i]), float(alphas[j]), float(gammas[k])


def draw(
    labels: Sequence[int], shots: Sequence[int] = SHOTS, seed: int = 0
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Rows for validation (20 % of the train split, as the linear probe's) and of the shots: k ->
    (about k a class).

    The shots of a smaller k are among those of a larger one; a class that has fewer than k gives
    what it has.
    """
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    held, rest = np.split(order, [max(1, len(labels) // 5)])
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
    train, test : (n, d) unit-norm embeddings of the pictures.
    text : (c, d) unit-norm class embeddings.
    scale : the model's logit scale.

    Returns
    -------
    columns method, shots, value, beta, alpha, gamma: what the search chose.
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
    """`curve` of every set with a train split and every model that was evaluated; columns set,
    model before it.

    result: of evaluate.evaluate_many; model is a number, in its order.
    """
    parts = [
        curve(
            train,
            labels,
            test,
            result.splits[name].labels,
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
