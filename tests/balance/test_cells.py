"""Cells: near rows together, and bounds that hold for every pair of them."""

import numpy as np
import torch

from mclip.balance import cells


def test_runs_are_neighbours():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1003, 3)).astype(np.float32) * [5, 1, 0.1]
    order = cells.kd_order(z, 50)
    assert sorted(order) == list(range(1003))
    spread = np.mean([z[order[i : i + 50], 0].std() for i in range(0, 1000, 50)])
    assert spread < 0.3 * z[:, 0].std()


def test_extents_hold_for_every_row_and_are_not_loose():
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.normal(size=(400, 6)).astype(np.float32))
    centres = cells.kmeans(z, 30, torch.device("cpu"))
    centres[3] = 100  # an empty cell
    label = cells.assign(z, centres)
    distance = np.linalg.norm(z.double().numpy()[:, None] - centres.double().numpy(), axis=2)
    np.testing.assert_allclose(distance[np.arange(400), label], distance.min(1), rtol=1e-5)
    order = np.argsort(label, kind="stable")
    starts = np.append(0, np.cumsum(np.bincount(label, minlength=30)))
    found = cells.extents(z[torch.from_numpy(order)], starts, centres).double().numpy()
    score = -(distance**2) / 2
    for a in range(30):
        mine = score[label == a]
        if a == 3:
            assert np.isneginf(found[a]).all()
            continue
        exact = (mine - mine[:, a, None]).max(0)
        assert (found[a] >= exact - 1e-5).all() and (
            found[a] <= exact + 0.01 * np.abs(exact) + 1e-4
        ).all()


def test_more_cells_than_rows_and_equal_rows():
    z = torch.ones(5, 3)
    centres = cells.kmeans(z, 4, torch.device("cpu"))
    assert set(cells.assign(z, centres)) == {0} and centres.isfinite().all()
