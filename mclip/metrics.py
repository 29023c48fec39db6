"""Ranks, zero-shot accuracy, retrieval recall, linear probe: arrays in, numbers in 0..1 out.

A tie with a wrong answer counts as a miss, so that a collapsed model scores 0 and not 1.
"""

import warnings
from collections.abc import Sequence

import joblib
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

RECALL_AT = (1, 5, 10)


def ranks(queries: Tensor, gallery: Tensor, pairs: np.ndarray, *, chunk: int = 1024) -> Tensor:
    """(n,) how many wrong gallery rows lie at least as near as the nearest right one; 0 hits at 1.

    queries (n, d), gallery (m, d) unit-norm; pairs (p, 2) rows (query, gallery) that belong together, at least
    one a query. Never more than chunk x m similarities at once.
    """
    pairs = torch.as_tensor(pairs)[torch.as_tensor(pairs)[:, 0].argsort(stable=True)]
    bounds = torch.searchsorted(pairs[:, 0].contiguous(), torch.arange(0, len(queries) + chunk, chunk))
    out = []
    for number, start in enumerate(range(0, len(queries), chunk)):
        similarity = queries[start : start + chunk] @ gallery.T
        here = pairs[bounds[number] : bounds[number + 1]]
        right = torch.zeros_like(similarity, dtype=torch.bool)
        right[here[:, 0] - start, here[:, 1]] = True
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        out.append(((similarity >= best) & ~right).sum(1))
    return torch.cat(out)


def classification(images: Tensor, classes: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Zero-shot top-1, top-5 (with more than five classes) and the mean of the classes' own accuracies."""
    labels = np.asarray(labels)
    rank = ranks(images, classes, np.stack([np.arange(len(labels)), labels], 1)).numpy()
    hit = rank == 0
    out = {"top1": hit.mean()}
    if len(classes) > 5:
        out["top5"] = (rank < 5).mean()
    out["mean_per_class"] = np.mean([hit[labels == c].mean() for c in np.unique(labels)])
    return {name: float(value) for name, value in out.items()}


def caption_pairs(captions: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """The distinct captions in order of appearance, and (p, 2) rows (picture, distinct caption)."""
    ids: dict[str, int] = {}
    pairs = [(i, ids.setdefault(text, len(ids))) for i, texts in enumerate(captions) for text in texts]
    return list(ids), np.unique(np.asarray(pairs, dtype=np.int64).reshape(-1, 2), axis=0)


def retrieval(images: Tensor, texts: Tensor, pairs: np.ndarray, ks: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """R@k from pictures to distinct captions (i2t) and back (t2i), and `mean_r1` of the two R@1."""
    out = {}
    for name, rank in (("i2t", ranks(images, texts, pairs)), ("t2i", ranks(texts, images, pairs[:, ::-1].copy()))):
        out |= {f"{name}_r{k}": float((rank < k).double().mean()) for k in ks}
    return out | {"mean_r1": (out["i2t_r1"] + out["t2i_r1"]) / 2}


def probes(
    train: Sequence[Tensor],
    train_labels: Sequence[int],
    test: Sequence[Tensor],
    test_labels: Sequence[int],
    *,
    c: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0),
    seed: int = 0,
    max_iter: int = 200,
) -> list[tuple[float, float]]:
    """Linear probe of several models' (n, d) features: top-1 and the C that was chosen, a pair a model.

    Multinomial logistic regression on frozen features as in CLIP (Radford et al., 2021, section 3.2 and appendix
    A.3): L-BFGS, the strength of the L2 penalty found on a validation split (20 % of the train split, drawn with
    `seed`), then a fit on the whole train split. Features are the unit-norm embeddings times sqrt(d), so that a
    coordinate's mean square is 1 and one grid of C suits every width; they are not standardised one by one, and
    nor are CLIP's. Each fit of the search starts from the solution for the C before.
    """
    y, y_test = np.asarray(train_labels), np.asarray(test_labels)
    if len(np.unique(y)) < 2:
        raise ValueError("linear probe: the train split holds one class only")
    order = np.random.default_rng(seed).permutation(len(y))
    held, rest = np.split(order, [max(1, len(y) // 5)])

    def one(x: np.ndarray, x_test: np.ndarray) -> tuple[float, float]:
        x, x_test = x * x.shape[1] ** 0.5, x_test * x.shape[1] ** 0.5  # float32 still: half the time
        regression = LogisticRegression(solver="lbfgs", max_iter=max_iter, warm_start=True)
        scores = [regression.set_params(C=value).fit(x[rest], y[rest]).score(x[held], y[held]) for value in sorted(c)]
        best = sorted(c)[int(np.argmax(scores))]  # of equals the first, so the strongest penalty
        final = LogisticRegression(solver="lbfgs", max_iter=max_iter, C=best).fit(x, y)
        return float(final.score(x_test, y_test)), best

    # One BLAS thread a fit: the products are small, and two threads that wait for each other took ten times as long.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # bounded on purpose; accuracy is flat by then
        return joblib.Parallel(n_jobs=-1, prefer="threads")(
            joblib.delayed(one)(a.numpy(), b.numpy()) for a, b in zip(train, test, strict=True)
        )


def classification_chance(classes: int, probe: bool = False) -> dict[str, float]:
    """What guessing at random scores in each metric of `classification` (and of the probe)."""
    out = {"top1": 1 / classes, "mean_per_class": 1 / classes}
    return out | ({"top5": 5 / classes} if classes > 5 else {}) | ({"probe_top1": 1 / classes} if probe else {})


def retrieval_chance(pairs: np.ndarray, ks: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """What guessing at random scores in each metric of `retrieval`.

    k draws without replacement from m, of which r are right: 1 - prod_i (m - r - i) / (m - i), i < k.
    """
    out = {}
    for name, query, gallery in (("i2t", 0, 1), ("t2i", 1, 0)):
        right = np.bincount(pairs[:, query])
        others = pairs[:, gallery].max() + 1
        for k in ks:
            draws = [np.clip((others - right - i) / max(others - i, 1), 0, 1) for i in range(k)]
            out[f"{name}_r{k}"] = float(1 - np.prod(draws, axis=0)[right > 0].mean())
    return out | {"mean_r1": (out["i2t_r1"] + out["t2i_r1"]) / 2}
