"""mclip.evaluate.fewshot against plain float64 loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mclip.evaluate import fewshot

from .sets import unit


@pytest.fixture
def task():
    """Three of seven classes have fewer cached pictures than the others; one has none."""
    rng = np.random.default_rng(0)
    text = unit(rng, 7, 13)
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 6, 6, 6])
    keys = F.normalize(text[labels] + 0.4 * unit(rng, len(labels), 13), dim=-1)
    y = torch.tensor(rng.integers(0, 7, 41))
    return keys, labels, text, F.normalize(text[y] + 0.9 * unit(rng, 41, 13), dim=-1), y


def reference(keys, labels, text, features, beta, alpha, gamma=0.0, rows=None, scale=100):
    """A picture, a class and a cached picture at a time, in float64."""
    keys, text, features = (x.double().numpy() for x in (keys, text, features))

    def cut(x):
        x = x if rows is None else x[rows]
        return x / np.sqrt((x**2).sum())

    out = np.zeros((len(features), len(text)))
    for i, f in enumerate(features):
        for c, w in enumerate(text):
            out[i, c] = scale * f @ w
        for key, label in zip(keys, labels.tolist(), strict=True):
            doubt = 0.0
            if rows is not None:
                scores = np.array([math.exp(cut(key) @ cut(w)) for w in text])
                doubt = math.log2((1 + 1e-6) / (scores[label] / scores.sum() + 1e-6))
            out[i, label] += (
                alpha * math.exp(-beta * (1 - cut(f) @ cut(key))) * math.exp(gamma * doubt)
            )
    return out


def criterion(keys, labels, text, weight):
    """APE's per-coordinate merit by its definition: all pairs of embeddings of different classes."""
    own = [[w, *keys[labels == c].double().numpy()] for c, w in enumerate(text.double().numpy())]
    total, count = np.zeros(text.shape[1]), 0
    for i, j in itertools.permutations(range(len(own)), 2):
        for a, b in itertools.product(own[i], own[j]):
            total, count = total + a * b, count + 1
    return weight[1] * text.double().numpy().var(0, ddof=1) - weight[0] * total / count


def test_tip_adapter_against_loops(task):
    keys, labels, text, features, _ = task
    got = fewshot.logits(fewshot.tip(keys, labels), features, text, 3.5, 1.7)
    assert np.allclose(got.numpy(), reference(keys, labels, text, features, 3.5, 1.7), atol=1e-4)
    got = fewshot.logits(fewshot.tip(keys, labels), features, text, 3.5, 1.7, scale=20.0)
    assert np.allclose(
        got.numpy(), reference(keys, labels, text, features, 3.5, 1.7, scale=20), atol=1e-4
    )


@pytest.mark.parametrize(
    ("keep", "weight"), [(0.5, (0.7, 0.3)), (0.31, (0.2, 0.8)), (1.0, (0.7, 0.3))]
)
def test_ape_against_loops(task, keep, weight):
    keys, labels, text, features, _ = task
    merit = criterion(keys, labels, text, weight)
    rows = np.argsort(-merit)[: round(keep * 13)]
    cache = fewshot.ape(keys, labels, text, keep=keep, weight=weight)
    assert cache.rows.tolist() == rows.tolist()
    got = fewshot.logits(cache, features, text, 2.0, 1.3, 0.4)
    assert np.allclose(
        got.numpy(), reference(keys, labels, text, features, 2.0, 1.3, 0.4, rows), atol=1e-3
    )


@pytest.mark.slow
def test_search_finds_the_best_of_the_whole_grid(task):
    keys, labels, text, features, y = task
    grid = fewshot.Grid((7.0, 3), (7.0, 3), (0.5, 2))
    betas, alphas, gammas = grid.values()
    assert betas.tolist() == pytest.approx([0.1, 2.4, 4.7]) and gammas[0] == 0
    text = F.normalize(
        text + 1.1 * text.roll(1, 0), dim=-1
    )  # the text is often wrong: the cache helps
    for cache, searched in (
        (fewshot.tip(keys, labels), gammas[:1]),
        (fewshot.ape(keys, labels, text), gammas),
    ):
        rows = None if cache.rows is None else cache.rows.numpy()
        best = (-1, None)
        for b, a, g in itertools.product(betas, alphas, searched):
            right = (
                reference(keys, labels, text, features, b, a, g, rows).argmax(1) == y.numpy()
            ).sum()
            best = max(best, (right, (-b, -a, -g)))  # of equals the smallest
        assert fewshot.search(cache, features, y, text, grid) == pytest.approx(
            [-v for v in best[1]]
        )
        assert best[0] > (features @ text.T).argmax(1).eq(y).sum()


def test_shots_are_nested_apart_from_validation_and_repeatable():
    labels = [0] * 40 + [1] * 9 + [2] * 30
    held, rows = fewshot.draw(labels, (1, 4, 16), seed=3)
    assert len(held) == 15 and not set(held) & set(rows[16])
    assert set(rows[1]) < set(rows[4]) < set(rows[16])
    count = np.bincount(np.asarray(labels)[rows[16]])
    assert count[0] == count[2] == 16 and 4 <= count[1] <= 9  # all that class 1 has
    assert all(
        (a == b).all()
        for a, b in zip(
            rows.values(), fewshot.draw(labels, (1, 4, 16), seed=3)[1].values(), strict=True
        )
    )
    assert (fewshot.draw(labels, (1,), seed=4)[0] != held).any()


def test_curve_beats_a_wrong_text_with_more_shots():
    rng = np.random.default_rng(5)
    centres = unit(rng, 6, 24)
    text = F.normalize(centres + 1.5 * unit(rng, 6, 24), dim=-1)
    y, y_test = rng.integers(0, 6, 240), rng.integers(0, 6, 300)
    train, test = (
        F.normalize(centres[v] + 1.5 * unit(rng, len(v), 24), dim=-1) for v in (y, y_test)
    )
    found = fewshot.curve(train, y.tolist(), test, y_test.tolist(), text, shots=(1, 16))
    value = found.set_index(["method", "shots"])["value"]
    assert value["zero-shot", 0] == float(
        (test @ text.T).argmax(1).eq(torch.tensor(y_test)).double().mean()
    )
    for method in ("Tip-Adapter", "APE"):
        assert value[method, 16] > value["zero-shot", 0] + 0.02
    again = fewshot.curve(train, y.tolist(), test, y_test.tolist(), text, shots=(1, 16))
    assert again.equals(found)
