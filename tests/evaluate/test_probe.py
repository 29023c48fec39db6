"""mclip.evaluate.probe: CLIP's search for C, and that its range is wide enough."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mclip.evaluate import probe

from .sets import unit


def test_probe_separable_and_repeatable():
    rng = np.random.default_rng(4)
    centres, labels = unit(rng, 5, 32), rng.integers(0, 5, 300)
    noise = torch.tensor(rng.normal(scale=0.05, size=(300, 32)), dtype=torch.float32)
    x = F.normalize(centres[labels] + noise, dim=-1)
    arguments = ([x[:200], -x[:200]], labels[:200], [x[200:], -x[200:]], labels[200:])
    first = probe.probes(*arguments, c=(0.001, 1.0), halvings=0)
    assert all(score > 0.97 and c in (0.001, 1.0) for score, c in first)
    assert probe.probes(*arguments, c=(1.0, 0.001), halvings=0) == first
    with pytest.raises(ValueError, match="one class"):
        probe.probes([x[:10]], [0] * 10, [x], labels)


def test_a_strong_penalty_is_found_where_labels_are_noisy():
    """A third of the labels are wrong: a weak penalty learns them by heart, the search goes far
    below 1.
    """
    rng = np.random.default_rng(0)
    centres = unit(rng, 4, 100)
    y, y_test = rng.integers(0, 4, 300), rng.integers(0, 4, 500)
    x, x_test = (F.normalize(centres[v] + 3 * unit(rng, len(v), 100), dim=-1) for v in (y, y_test))
    noisy = np.where(rng.random(300) < 1 / 3, rng.integers(0, 4, 300), y)
    ((score, c),) = probe.probes([x], noisy, [x_test], y_test, halvings=1)
    ((weak, _),) = probe.probes([x], noisy, [x_test], y_test, c=(10.0,), halvings=0)
    assert c < 0.1 and score > weak + 0.05


@pytest.mark.parametrize("peak", [-6, -5.125, -0.5, 2.25, 6])
def test_search_finds_a_peak_to_an_eighth_of_a_decade(peak):
    asked = []

    def score(c):
        asked.append(c)
        return -abs(np.log10(c) - peak)

    assert np.log10(probe.search(score)) == pytest.approx(peak, abs=1 / 16 + 1e-9)
    assert len(asked) <= len(probe.GRID) + 2 * probe.HALVINGS
    if peak < 0:
        assert max(asked) < 1e6  # the slow end of the grid is left out


def test_search_takes_the_strongest_penalty_of_equals():
    assert probe.search(lambda c: 0.5, (1.0, 0.01), halvings=0) == 0.01
    assert probe.search(lambda c: float(c >= 0.1), (0.01, 1.0), halvings=1) == pytest.approx(0.1)
