"""The search for links against all pairs in float64: same links, whatever the bounds, tiles and
threads.
"""

import contextlib
import threading

import numpy as np
import pytest
import torch

from mclip.balance import links
from mclip.balance.prepared import prepare
from mclip.data.stores.rows import Rows


def spectrum(n=900, d=48, seed=0, exponent=1.0, dtype=np.float16):
    """Rows of a power-law spectrum, a third of them near copies of others at all distances around
    the limits.
    """
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, d)) * np.arange(1, d + 1) ** (-exponent / 2)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    copies = rng.permutation(n)[: n // 3]
    noise = rng.normal(size=(len(copies), d))
    noise *= rng.uniform(0, 0.6, (len(copies), 1)) / np.linalg.norm(noise, axis=1, keepdims=True)
    rows[copies] = rows[rng.integers(n, size=len(copies))] + noise
    return (rows * rng.uniform(0.5, 2, (n, 1))).astype(dtype)


def all_links(rows, limit):
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    a, b = np.triu_indices(len(rows), 1)
    square = ((unit[a] - unit[b]) ** 2).sum(1)
    return {(int(i), int(j)): s for i, j, s in zip(a, b, square, strict=True) if s <= limit}


def searched(rows, limit, squares=True, **options):
    prepared = prepare(Rows(rows), **options)
    out, finished = {}, []

    def found(a, b, square):
        for k in range(len(a)):
            pair = (int(min(a[k], b[k])), int(max(a[k], b[k])))
            assert pair not in out  # each link once
            out[pair] = None if square is None else float(square[k])

    full = links.search(
        prepared,
        limit,
        lambda a, b, lower: np.ones(len(a), bool),
        found,
        squares=squares,
        done=finished.append,
    )
    assert sorted(finished) == list(range(prepared.count))
    return out, full


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("limit", [1e-3, 0.07, 0.6])
@pytest.mark.parametrize("squares", [True, False])
def test_every_link_once(exponent, limit, squares):
    rows = spectrum(exponent=exponent)
    expected = all_links(rows, limit)
    assert expected
    out, _ = searched(rows, limit, squares=squares, tile=64)
    assert out.keys() == expected.keys()
    if squares:
        np.testing.assert_allclose([out[p] for p in expected], list(expected.values()), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"axes": 1},
        {"axes": 48},
        {"axes": 500},
        {"tile": 1},
        {"tile": 899},
        {"tile": 901},
        {"tile": 7, "axes": 3},
        {"cell": 1},
        {"cell": 3, "tile": 10},
        {"cell": 1000},
    ],
)
def test_axes_and_tiles_do_not_matter(options):
    rows = spectrum()
    assert searched(rows, 0.1, **options)[0].keys() == all_links(rows, 0.1).keys()


def codes_of_all_links(rows, limit):
    """Sorted i * n + j, i < j, of all pairs within the limit, by blocks in float64."""
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    parts = []
    for start in range(0, len(unit), 1000):
        a, b = np.nonzero(2 - 2 * (unit[start : start + 1000] @ unit.T) <= limit)
        a += start
        parts.append((a * len(unit) + b)[a < b])
    return np.sort(np.concatenate(parts))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "limit", "most"),
    [
        (spectrum(n=12_000), 0.1, 0.1),
        (spectrum(n=12_000), 0.6, 1.1),  # so many links that little is ruled out
        (spectrum(n=12_000, exponent=0.0), 0.1, 0.1),
        # uniform on the sphere: nothing is ruled out, yet no pair is multiplied twice
        (np.random.default_rng(0).normal(size=(12_000, 96)).astype(np.float32), 1.3, 1.1),
    ],
    ids=["decaying spectrum", "many links", "flat spectrum", "sphere"],
)
def test_every_link_of_more_rows_than_are_held_at_once(rows, limit, most):
    parts = []
    full = links.search(
        prepare(Rows(rows)),
        limit,
        lambda a, b, lower: np.ones(len(a), bool),
        lambda a, b, square: parts.append(np.minimum(a, b) * len(rows) + np.maximum(a, b)),
    )
    expected = codes_of_all_links(rows, limit)
    assert len(expected) > 1000
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), expected)
    assert full < most


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_rows(n):
    rows = np.ones((n, 1), np.float32)
    assert len(searched(rows, 0.1)[0]) == n * (n - 1) // 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_and_lengths_of_rows(dtype):
    rows = spectrum(dtype=np.float64)
    if dtype == np.float64:
        rows *= 1e100
    rows = rows.astype(dtype)
    assert (
        searched(rows, 0.1)[0].keys()
        == all_links(rows / (1e100 if dtype == np.float64 else 1), 0.1).keys()
    )


def test_most_pairs_are_never_measured_where_the_spectrum_decays():
    rows = spectrum(n=3000, d=96, exponent=1.5)
    out, full = searched(rows, 0.05)
    assert len(out) / (3000 * 2999 / 2) < full < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("squares", [True, False])
def test_full_products_where_nothing_can_be_ruled_out(squares):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(700, 200)).astype(
        np.float32
    )  # uniform on the sphere: squared distances about 2
    for limit in (1.7, 2.0, 2.6):
        out, full = searched(rows, limit, squares=squares, tile=100)
        assert out.keys() == all_links(rows, limit).keys()
        assert full > 0.5


def test_unwanted_pairs_are_not_measured():
    rows = np.repeat(np.eye(16, dtype=np.float32), 250, axis=0)
    prepared, seen = prepare(Rows(rows)), []
    full = links.search(
        prepared,
        0.1,
        lambda a, b, lower: (a // 250 == 2) & (lower < 0.1),
        lambda a, b, square: seen.extend(zip(a.tolist(), b.tolist(), strict=True)),
    )
    assert len(seen) == len(set(seen)) == 250 * 249 / 2
    assert full <= 250 * 250 / (4000 * 3999 / 2)  # that block and nothing else


@pytest.mark.slow
def test_only_some_tiles():
    rows, parts = spectrum(), []
    prepared = prepare(Rows(rows), tile=64)
    for some in (range(0, prepared.count, 2), range(1, prepared.count, 2)):
        links.search(
            prepared,
            0.1,
            lambda a, b, lower: np.ones(len(a), bool),
            lambda a, b, square: parts.extend(zip(a.tolist(), b.tolist(), strict=True)),
            tiles=some,
        )
    assert {(min(p), max(p)) for p in parts} == all_links(rows, 0.1).keys() and len(parts) == len(
        set(parts)
    )


@pytest.mark.parametrize("fails", [False, True])
def test_products_are_float32_whatever_the_process_has_chosen(fails):
    prepared, seen = prepare(Rows(spectrum())), []
    torch.set_float32_matmul_precision("medium")

    def found(a, b, square):
        seen.append(torch.get_float32_matmul_precision())
        if fails:
            raise RuntimeError("stop")

    try:
        with pytest.raises(RuntimeError, match="stop") if fails else contextlib.nullcontext():
            links.search(prepared, 0.1, lambda a, b, lower: np.ones(len(a), bool), found)
        assert (
            seen and set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "medium"
        )
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_error_in_a_thread_ends_the_search():
    prepared = prepare(Rows(spectrum()), tile=64)
    before, threads = torch.get_num_threads(), threading.active_count()

    def broken(a, b, square):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        links.search(prepared, 0.1, lambda a, b, lower: np.ones(len(a), bool), broken)
    assert torch.get_num_threads() == before and threading.active_count() == threads
