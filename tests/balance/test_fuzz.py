"""Balancing against the definition on random sizes, spectra, thresholds and tiles."""

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from mclip.balance import balance

pytestmark = pytest.mark.long
DISTANCE = {
    "l2": lambda square: np.sqrt(square),
    "sql2": lambda square: square,
    "cosine": lambda square: square / 2,
}


def random_rows(rng: np.random.Generator) -> np.ndarray:
    n, d = int(rng.integers(1, 600)), int(rng.integers(1, 80))
    rows = rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -rng.uniform(0, 1.5)
    rows = rows[rng.integers(n, size=n)]  # some more than once
    rows += (
        rng.normal(size=(n, d))
        * rng.uniform(0, 0.3, (n, 1))
        * np.linalg.norm(rows, axis=1)[:, None]
        / d**0.5
    )
    dtype = rng.choice([np.float16, np.float32, np.float64])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)


@pytest.mark.parametrize("seed", range(400))
def test_sets_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    rows, metric = random_rows(rng), str(rng.choice(list(DISTANCE)))
    threshold = float(DISTANCE[metric](np.exp(rng.uniform(np.log(1e-3), np.log(3.9)))))
    result = balance(rows, threshold=threshold, metric=metric, tile=int(rng.integers(1, 400)))
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    square = ((unit[:, None] - unit) ** 2).sum(-1)
    _, labels = connected_components(DISTANCE[metric](square) <= threshold, directed=False)
    np.testing.assert_array_equal(
        result.set_id[:, None] == result.set_id, labels[:, None] == labels
    )
    assert (np.bincount(result.set_id[result.keep]) == 1).all()
