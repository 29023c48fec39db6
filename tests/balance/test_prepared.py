"""Rows prepared for the search: short rows in fp16 bound every distance, tiles hold all rows, files
give them back.
"""

import numpy as np
import pytest
import torch

from mclip.balance.prepared import LEAST, load, prepare, save
from mclip.data.stores.rows import Rows


def power_law(n=700, d=128, exponent=1.0, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, d)) * np.arange(1, d + 1) ** (-exponent / 2)
    rows[n // 2 :] = rows[: n - n // 2] + 0.01 * rng.normal(size=(n - n // 2, d))
    return rows * rng.uniform(0.5, 2, (n, 1))


@pytest.mark.parametrize("exponent", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("axes", [1, None, 128])
def test_short_rows_and_their_tails_bound_every_product(exponent, axes):
    rows = power_law(exponent=exponent)
    p = prepare(Rows(rows), axes=axes)
    assert p.z.dtype == p.tail.dtype == torch.float16
    unit = rows[p.order] / np.linalg.norm(rows[p.order], axis=1, keepdims=True)
    exact = unit @ unit.T
    z, tail = p.z.double().numpy(), p.tail.double().numpy()
    assert (z @ z.T + p.slack >= exact).all()
    second = z @ z.T + tail @ tail.T - np.outer(z[:, -1], z[:, -1])
    assert (second + p.slack_of_second >= exact).all()
    assert p.slack < 1.1e-3 and p.slack_of_second < 1.1e-3
    if axes == 128:  # and by no more, where nothing is left out
        assert np.abs(second - exact).max() < p.slack_of_second
    np.testing.assert_allclose(p.inverse, 1 / np.linalg.norm(rows, axis=1))
    np.testing.assert_allclose(p.unit(np.array([5, 0])).numpy(), unit[[5, 0]], atol=1e-6)


def test_axes_are_the_principal_ones():
    rows = power_law(exponent=2.0, n=3000)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    best = np.linalg.eigvalsh(unit.T @ unit)[::-1][:31].sum() / len(rows)
    assert np.square(prepare(Rows(rows)).z[:, :-1].double().numpy()).sum(1).mean() > 0.999 * best


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 4),
        ({"parts": 2}, 2),
        ({"parts": 100}, 9750 // LEAST + 1),
        ({"tile": 20_000}, 1),
        ({"tile": 1000}, 10),
    ],
)
def test_tiles_hold_all_cells(options, count):
    p = prepare(Rows(np.random.default_rng(0).normal(size=(9750, 8))), **options)
    assert p.tiles[0] == 0 and p.tiles[-1] == len(p.starts) - 1 and (np.diff(p.tiles) > 0).all()
    assert abs(p.count - count) <= 1 and sorted(p.order) == list(range(9750))


def test_files_give_back_what_was_prepared(tmp_path):
    rows = Rows(power_law())
    p = prepare(rows, tile=100)
    save(p, tmp_path)
    back = load(tmp_path, rows)
    for name in ("order", "starts", "tiles", "inverse", "z", "tail", "centres", "extent"):
        np.testing.assert_array_equal(getattr(back, name), getattr(p, name))
    assert (back.margin, back.slack, back.slack_of_second) == (p.margin, p.slack, p.slack_of_second)
