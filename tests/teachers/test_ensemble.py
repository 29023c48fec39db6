"""mclip.teachers.ensemble: joined scores, and intervals that are as wide as scores scatter."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mclip import evaluate
from mclip.data.evalsets import Split
from mclip.evaluate.tasks import classification, retrieval
from mclip.params import EvalSet
from mclip.teachers import ensemble


def unit(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def result(images, texts, answers, classes=()):
    empty = {field: {} for field in evaluate.Result._fields}
    split = Split([], [], answers, list(classes), [], [], [])
    here = {"splits": {"s": split}, "images": {"s": [images]}, "texts": {"s": [texts]}}
    return evaluate.Result(**empty | here)


def test_items_sum_to_the_metric():
    images, texts, labels = unit(50, 4, 0), unit(3, 4, 1), [0] * 30 + [1] * 15 + [2] * 5
    expected = classification.accuracy(images, texts, labels)
    for metric in ("top1", "mean_per_class"):
        spec = EvalSet(path="-", metric=metric)
        found = ensemble.items(result(images, texts, labels, "abc"), "s", spec)
        assert ensemble.estimate(found)[0] == pytest.approx(expected[metric])
    spec = EvalSet(path="-", task="retrieval", captions="distinct")
    captions = [[f"caption {i % 20}"] for i in range(50)]
    gallery, pairs = retrieval.caption_pairs(captions)
    texts = unit(len(gallery), 4, 2)
    found = ensemble.items(result(images, texts, captions), "s", spec)
    expected = retrieval.recall(images, texts, pairs)["mean_r1"]
    assert ensemble.estimate(found)[0] == pytest.approx(expected)
    assert (
        ensemble.items(result(images, texts, labels), "s", EvalSet(path="-", metric="f1_macro"))
        is None
    )


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    strata = np.repeat([0, 1], [300, 100])
    weights = np.where(strata == 0, 0.5 / 300, 0.5 / 100)
    for _ in range(400):
        hits = (rng.random(400) < np.where(strata == 0, 0.9, 0.5)).astype(float)
        value, half = ensemble.estimate(ensemble.Items(hits, weights, strata))
        covered += abs(value - 0.7) < half
    assert 0.92 < covered / 400 < 0.98


def test_a_difference_on_the_same_pictures_is_surer_than_two_scores():
    rng = np.random.default_rng(0)
    hits = (rng.random(1000) < 0.6).astype(float)
    better = hits.copy()
    better[np.flatnonzero(hits == 0)[:40]] = 1
    common = np.full(1000, 1e-3), np.zeros(1000, int)
    a, b = ensemble.Items(better, *common), ensemble.Items(hits, *common)
    value, half = ensemble.difference(a, b)
    assert value == pytest.approx(0.04) and half < value
    assert half < ensemble.estimate(a)[1] / 2


def test_an_ensemble_has_the_mean_of_its_members_cosines():
    a = result(unit(5, 4, 0), unit(3, 4, 1), [0] * 5, "abc")
    b = result(unit(5, 6, 2), unit(3, 6, 3), [0] * 5, "abc")
    both = ensemble.join([a, b])
    cosine = both.images["s"][0] @ both.texts["s"][0].T
    mean = sum(r.images["s"][0] @ r.texts["s"][0].T for r in (a, b)) / 2
    assert torch.allclose(cosine, mean, atol=1e-6)
