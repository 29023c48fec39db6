"""All pairs of rows within a distance, without measuring most pairs: exact, in a few bytes a row.

Bounds (of `mclip.balance.prepared.Prepared`) rule pairs out before their full rows are read:

1. `mclip.balance.cells` finds the cells of short rows (`mclip.balance.prepared`), and the rows in
   them, that can form a pair at all: one product of 64 numbers for each row and cell, once for all
   limits.
2. The short rows of such a row and cell are multiplied.
3. Pairs that pass both are compared on the coordinates that follow, a thirty-second of the width.
4. Pairs that the caller no longer needs, because both are in one set already, are never measured.

The rest is measured nearest first; where the caller asks for sets, by spanning forests of what
could join them. Where the bounds rule out too little to pay off (no decaying spectrum, a large
limit), full rows are multiplied instead, so that the worst case is the blocked product of all rows.

Rounding never decides: products of short rows are compared with a margin for that of fp16 and
float32, and full products that float32 cannot separate from the limit are measured in float64.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from mclip.balance.prepared import SCORED, Prepared
from mclip.balance.unionfind import minimum_forest
from mclip.system import progress
from mclip.system.threads import side_by_side

GROUP = 256  # short rows that are multiplied by a chunk at once where cells rule little out
WIDE = 512  # full rows, the same; also columns of a cell that is larger
# rows that are multiplied by those; where cells rule little out, their full width is held
CHUNK = 4096
PIECE = 1024  # rows whose full width is held at once elsewhere
VISITS = 8_000_000  # rows with cells that they visit, held at once in 4 bytes each
SOME = 8  # cells of a tile that tell whether cells rule little out
BATCH = 256  # pairs measured at once
# pairs of a block left by short rows: with more it is seen first which of them join the most
MANY = 1024
CANDIDATES = 32768  # pairs put together before they are measured
# measuring a pair takes as long as this part of a full product's elements, for each column
MEASURE = 1e-5
# blocks on end in which short rows ruled out too little: after that full rows are multiplied at
# once
FAILED = 4
DENSE = 0.25  # of a tile's rows and cells: above it, cells rule little out

Wanted = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Found = Callable[[np.ndarray, np.ndarray, np.ndarray | None], None]
Labels = Callable[[np.ndarray], np.ndarray]


def search(
    prepared: Prepared,
    limit: float,
    wanted: Wanted,
    found: Found,
    *,
    labels: Labels | None = None,
    squares: bool = False,
    tiles: Iterable[int] | None = None,
    done: Callable[[int], None] | None = None,
    desc: str | None = "balance",
) -> float:
    """Report all wanted pairs of rows whose squared distance is at most `limit`.

    Parameters
    ----------
    limit : squared L2 distance of unit rows.
    wanted : (a, b, lower) -> bool mask: pairs still of interest; `lower` bounds their squared
        distance from below. It is asked from several threads, and may answer by a state that is
        behind.
    found : (a, b, square): called by one thread at a time; square is None unless `squares`, else
        float64.
    labels : rows -> the set of each, as far as is known: pairs within a set are not wanted, and of
        the others only as many are measured as it takes to know the sets. None: there are no sets,
        all pairs count.
    tiles : which of the tiles, each against itself and all later ones; None: all.
    done : called after each tile's last pair was reported, by one thread at a time.
    desc : of the progress bar; None: no bar.

    Returns
    -------
    the share of all pairs whose full rows were read.
    """
    n = len(prepared.order)
    task = _Search(prepared, limit, wanted, found, labels, squares, threading.Lock())
    total, full = max(1, n * (n - 1) / 2), 0

    def one(t: int) -> None:
        nonlocal full
        read = task.tile(t)
        with task.lock:
            full += read
            if done is not None:
                done(t)

    todo = list(range(prepared.count) if tiles is None else tiles)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32: the margins count on float32
    try:
        with progress.bar(
            desc=desc or "", unit="tile", total=len(todo), hidden=desc is None
        ) as bar:
            for _ in side_by_side(one, todo, ahead=None):
                bar.set_postfix_str(f"{full:,} pairs measured", refresh=False)
                bar.update()
    finally:
        torch.set_float32_matmul_precision(before)
    return full / total


@dataclass
class _Search:
    prepared: Prepared
    limit: float
    wanted: Wanted
    found: Found
    labels: Labels | None
    squares: bool
    lock: threading.Lock
    failed: int = 0  # blocks on end in which short rows ruled out too little
    measured: int = 0  # pairs measured alone
    linked: int = 0  # those of them within the limit

    def tile(self, t: int) -> int:
        """Report the links of tile t with itself and later ones; return the number of pairs
        measured.
        """
        first, last = self.prepared.tiles[t : t + 2]
        read, waiting, count = 0, [], 0
        for part, products in (self._dense if self._crowded(first, last) else self._sparse)(
            first, last
        ):
            read += products
            if part is not None:
                waiting.append(part)
                count += len(part[0])
            if count >= CANDIDATES:
                read += self._measure(*map(np.concatenate, zip(*waiting, strict=True)))
                waiting, count = [], 0
        return read + (
            self._measure(*map(np.concatenate, zip(*waiting, strict=True))) if waiting else 0
        )

    def _crowded(self, first: int, last: int) -> bool:
        """Do cells first..last visit so much of what follows that cells need not be asked? By some
        of them.
        """
        starts, cells = (
            self.prepared.starts,
            np.unique(np.linspace(first, last - 1, SOME).astype(np.int64)),
        )
        visits = sum(len(place) for place, _ in self.prepared.visits(cells, self.limit))
        return (
            visits > DENSE * ((starts[cells + 1] - starts[cells]) * (len(starts) - 1 - cells)).sum()
        )

    def _sparse(self, first: int, last: int) -> Iterator[tuple]:
        """Candidates of the rows of cells first..last with the cells that they visit."""
        starts = self.prepared.starts
        here, span = starts[first], starts[last] - starts[first]
        kind = np.min_scalar_type(
            span * (len(starts) - 1 - first)
        )  # one number for a cell and a place: mostly uint32
        keys, count = np.empty(max(VISITS, SCORED * (len(starts) - 1 - first)), kind), 0
        for place, cell in self.prepared.visits(np.arange(first, last), self.limit):
            if count + len(place) > len(keys):
                yield from self._by_cell(keys[:count], first, here, span)
                count = 0
            keys[count : count + len(place)] = (cell - first) * span + (place - here)
            count += len(place)
        yield from self._by_cell(keys[:count], first, here, span)

    def _by_cell(self, keys: np.ndarray, first: int, here: int, span: int) -> Iterator[tuple]:
        """Candidates of visits, a cell that is visited at a time."""
        starts = self.prepared.starts
        keys.sort()
        ends = np.searchsorted(keys, (np.arange(len(starts) - first) * span).astype(keys.dtype))
        for c in np.flatnonzero(np.diff(ends)):
            place = keys[ends[c] : ends[c + 1]].astype(np.int64) + (here - c * span)
            for at in range(0, len(place), CHUNK):
                for low in range(starts[first + c], starts[first + c + 1], WIDE):
                    high = min(low + WIDE, starts[first + c + 1])
                    rows = place[at : at + CHUNK]
                    yield self._block(rows[: np.searchsorted(rows, high)], low, high)

    def _dense(self, first: int, last: int) -> Iterator[tuple]:
        """Candidates of the rows of cells first..last, all of them with all later rows; where short
        rows have ruled out too little a few times, without them.
        """
        starts = self.prepared.starts
        for begin in range(starts[first], starts[last], CHUNK):
            low, end = begin, min(begin + CHUNK, starts[last])
            whole = cache(lambda begin=begin, end=end: self.prepared.unit(np.arange(begin, end)))
            while low < starts[-1]:
                high = min(low + (GROUP if self.failed < FAILED else WIDE), starts[-1])
                yield self._block(np.arange(begin, min(end, high)), low, high, whole=whole)
                low = high

    def _block(
        self, rows: np.ndarray, low: int, high: int, *, whole: Callable | None = None
    ) -> tuple:
        """Pairs of places `rows`, ascending, with later ones from low to high that the bounds
        leave, as (rows a and b, lower bounds of their squared distances) or None, and how many
        pairs were measured for that.

        whole : gives the full rows of a run of places that `rows` begins with; None: cells rule
            much out.
        """
        order, sets, begin, dense = self.prepared.order, None, rows[:1], whole is not None
        if self.labels is not None and len(rows):
            left, right = self.labels(order[rows]), self.labels(order[low:high])
            if (right == right[0]).all():
                different = left != right[0]
                rows, left = rows[different], left[different]
            sets = left, right
        if not len(rows):
            return None, 0
        measured = 0
        if not dense or self.failed < FAILED:
            left, measured = self._short(rows, low, high, sets, few=None if dense else MANY)
            if left is not None:
                self.failed = 0
                return (left if len(left[0]) else None), measured
            self.failed += dense
        full = self.prepared.unit(np.arange(low, high)).T
        if whole is not None:
            product = _some(whole(), rows - begin) @ full
        else:
            parts = np.split(rows, range(PIECE, len(rows), PIECE))
            product = torch.cat([self.prepared.unit(part) @ full for part in parts])
        left, products = self._full(product, rows, low, sets)
        return (left if len(left[0]) else None), measured + products

    def _short(
        self, rows: np.ndarray, low: int, high: int, sets: tuple | None, few: int | None
    ) -> tuple:
        """What short rows leave of a block, or None where it is too much to be measured; how many
        pairs they took.
        """
        prepared = self.prepared
        product = _some(prepared.z, rows).float() @ prepared.z[low:high].float().T
        a, b, value, measured = self._near(product, rows, low, sets, prepared.slack, few=few)
        a, b, value = self._keep(a, b, value, prepared.slack)
        if 0 < len(a) <= product.numel() // 16:
            value = prepared.second_look(a, b, value)
            near = value >= 1 - self.limit / 2 - prepared.slack_of_second
            a, b, value = a[near], b[near], value[near]
        # of sets' pairs few are measured, however many are left, if those that are measured join
        # them
        part = (
            1 / 16
            if sets is not None and 4 * self.linked > self.measured
            else prepared.rows.width * MEASURE
        )
        if len(a) > max(16, product.numel() * part):
            return None, measured
        return (
            prepared.order[a],
            prepared.order[b],
            2 - 2 * (value + prepared.slack_of_second),
        ), measured

    def _full(self, product: torch.Tensor, rows: np.ndarray, low: int, sets: tuple | None) -> tuple:
        """What the full rows' products can't tell of a block; what they can is reported. And their
        number.
        """
        prepared = self.prepared
        a, b, value, _ = self._near(product, rows, low, sets, prepared.margin)
        a, b, value = self._keep(a, b, value, prepared.margin)
        square = 2 - 2 * value
        a, b = prepared.order[a], prepared.order[b]
        if not self.squares:
            sure = square <= self.limit - 2 * prepared.margin
            if sure.any():
                x, y = a[sure], b[sure]
                some = _forest(self.labels, x, y, square[sure])
                with self.lock:
                    self.found(x[some], y[some], None)
            a, b, square = a[~sure], b[~sure], square[~sure]
        return (a, b, square - 2 * prepared.margin), product.numel()

    def _near(
        self,
        product: torch.Tensor,
        rows: np.ndarray,
        low: int,
        sets: tuple | None,
        off: float,
        few: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Pairs of different sets that a product of the places `rows` with those from `low` on,
        right to `off`, does not rule out: both places, the product's value, and how many pairs were
        measured for this: where it leaves more than `few`, the nearest of each row and column,
        which may join the sets of the others.
        """
        least, order, measured = 1 - self.limit / 2 - off, self.prepared.order, 0
        some = np.flatnonzero(
            product.amax(1).cpu().numpy() >= least
        )  # few rows have any: the rest is read once only
        if len(some) < len(product):
            product = product[torch.from_numpy(some).to(product.device)]
        part, a = product.cpu().numpy(), rows[some]
        hit = part >= least  # numpy's comparison takes a tenth of torch's time
        if sets is not None:
            hit &= sets[0][some][:, None] != sets[1]
        if len(a) and a[-1] >= low:  # a pair once, and no row with itself
            hit &= np.arange(low, low + part.shape[1]) > a[:, None]
        if self.labels is not None and sets is not None and few is not None:
            for _ in range(3):
                if np.count_nonzero(hit) <= few:
                    break
                value = np.where(hit, part, -np.inf)
                i, j = np.arange(len(a)), np.arange(part.shape[1])
                i, j = np.append(i, value.argmax(0)), np.append(value.argmax(1), j)
                i, j = i[hit[i, j]], j[hit[i, j]]
                x, y = order[a[i]], order[low + j]
                measured += self._measure(
                    x, y, 2 - 2 * (part[i, j].astype(np.float64) + off), once=True
                )
                hit &= self.labels(order[a])[:, None] != self.labels(
                    order[low : low + part.shape[1]]
                )
        i, j = hit.nonzero()
        return a[i], low + j, part[i, j].astype(np.float64), measured

    def _keep(
        self, a: np.ndarray, b: np.ndarray, value: np.ndarray, off: float
    ) -> tuple[np.ndarray, ...]:
        if not len(a):
            return a, b, value
        keep = self.wanted(self.prepared.order[a], self.prepared.order[b], 2 - 2 * (value + off))
        return a[keep], b[keep], value[keep]

    def _measure(
        self, a: np.ndarray, b: np.ndarray, lower: np.ndarray, *, once: bool = False
    ) -> int:
        """Decide candidates, the nearest first, as those connect most others; how many were
        measured. once: only those of one forest of the sets that they would join.
        """
        prepared, count = self.prepared, 0
        while len(a) and not (once and count):
            keep = self.wanted(a, b, lower)
            a, b, lower = a[keep], b[keep], lower[keep]
            if self.labels is None or (len(a) <= BATCH and not once):
                now = np.argsort(lower, kind="stable")[:BATCH]
            else:
                now = _forest(self.labels, a, b, lower)
            if not len(now):  # joined meanwhile
                break
            later = np.ones(len(a), bool)
            later[now] = False
            count += len(now)
            for at in range(0, len(now), BATCH):
                x, y = a[now[at : at + BATCH]], b[now[at : at + BATCH]]
                square = prepared.rows.squares(x, y) if self.squares else None
                good = prepared.within(x, y, self.limit) if square is None else square <= self.limit
                with self.lock:
                    self.measured += len(good)
                    self.linked += int(np.count_nonzero(good))
                    if good.any():
                        self.found(x[good], y[good], None if square is None else square[good])
            a, b, lower = a[later], b[later], lower[later]
        return count


def _forest(labels: Labels | None, a: np.ndarray, b: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Which of the pairs a minimum spanning forest of the sets that they would join consists of;
    all without sets.
    """
    if labels is None:
        return np.arange(len(a))
    x, y = np.unique(labels(np.concatenate([a, b])), return_inverse=True)[1].reshape(2, -1)
    by = np.argsort(length, kind="stable")
    by = by[x[by] != y[by]]
    low, high = np.minimum(x, y)[by], np.maximum(x, y)[by]
    first = np.sort(
        np.unique(low * (2 * len(a)) + high, return_index=True)[1]
    )  # the nearest pair of two sets
    return by[first][minimum_forest(low[first], high[first], 2 * len(a))]


def _some(matrix: torch.Tensor, places: np.ndarray) -> torch.Tensor:
    """matrix[places], without a copy where they are a run."""
    if places[-1] - places[0] + 1 == len(places):
        return matrix[places[0] : places[-1] + 1]
    return matrix[torch.from_numpy(places)]
