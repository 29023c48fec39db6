"""All pairs of rows within a distance, without measuring most pairs: exact, in a few bytes a row.

Bounds rule pairs out before their full rows are read:

1. Rows are rotated to the principal axes of a sample and cut to the leading AXES coordinates y and the norm r of what
   is left. For unit rows `|x - x'| >= |z - z'|` with z = (y, r), itself a unit vector: one product of 64 numbers a
   pair instead of the full width.
2. The short rows are sorted into cells, and `mclip.cells` tells which cells, and which rows of them, can have a pair at
   all: one product of 64 numbers for each row and cell, once for all limits.
3. What passes both is held against the coordinates that follow, a thirty-second of the width.
4. Pairs that the caller does not want any more, as both are in one set already, are never measured.

What is left is measured nearest first; where the caller tells sets, by spanning forests of what could join them.
Where the bounds rule out too little to pay (no decaying spectrum, a large limit), full rows are multiplied instead, so
that the worst case is the blocked product of all rows.

Rounding never decides: z is rounded from float64, products of short rows are compared with a margin for float32's
error, and full products that float32 cannot tell from the limit are measured in float64.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mclip import progress
from mclip.cells import assign, extents, kmeans, threads
from mclip.rows import Rows
from mclip.unionfind import minimum_forest

AXES = 63  # with the residual's norm 64 coordinates: a tenth of the bytes of 1,280 fp16 numbers
FEWER = 31  # of narrow rows, where AXES would be many bytes
CELL = 64  # rows a cell, on average
CELLS = 8192  # at most: every row is held against the centres of all cells
GROUP = 256  # rows of neighbouring cells that are multiplied at once where cells rule little out
TILE = 131072  # rows that are gone through at once, about: at most this, and a quarter of all
LEAST = 2048  # rows a tile has at least
CHUNK = 4096  # rows whose full width is held at once
MORE = 32  # the part of the width that the second look takes
SAMPLE = 4096  # rows that the axes are computed from
BATCH = 256  # pairs measured at once
MANY = 1024  # pairs of a block left by short rows: with more it is seen first which of them join the most
CANDIDATES = 32768  # pairs put together before they are measured
BLOCK = 2048  # rows read at once
ROUNDING = 1e-4  # of cells' scores, far above what float32 is off by
MEASURE = 1e-5  # measuring a pair takes as long as this part of a full product's elements, for each column
FAILED = 4  # blocks on end in which short rows ruled out too little: after that full rows are multiplied at once
DENSE = 0.25  # of a tile's rows and cells: above it, cells rule little out

Wanted = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Found = Callable[[np.ndarray, np.ndarray, np.ndarray | None], None]
Labels = Callable[[np.ndarray], np.ndarray]


@dataclass
class Links:
    """Rows prepared for `search`, sorted by cell; tiles of cells.

    order : (n,) row at each place. z : (n, k) float32, the short rows in that order; tail : (n, m) float32, the
    coordinates that follow and the norm of what is left then. starts : (cells + 1,) first place of each cell.
    centres : (cells, k). extent : (cells, cells) fp16, see `cells.extents`. tiles : (tiles + 1,) first cell of each
    tile. inverse : (n,) float64, 1 / norm of each row, in the rows' own order.
    """

    rows: Rows
    order: np.ndarray
    z: torch.Tensor
    tail: torch.Tensor
    starts: np.ndarray
    centres: torch.Tensor
    extent: torch.Tensor
    tiles: np.ndarray
    inverse: np.ndarray

    @property
    def margin(self) -> float:
        """What a float32 product of two unit rows may be off by: rounding of both, and a sum of width products."""
        return (self.rows.width + 8) * 2.0**-24

    @property
    def slack(self) -> float:
        """The same of two short rows."""
        return (self.z.shape[1] + 8) * 2.0**-24

    @property
    def slack_of_second(self) -> float:
        """The same with their tails."""
        return 2 * (self.slack + (self.tail.shape[1] + 8) * 2.0**-24)

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.tiles) - 1


def prepare(rows: Rows, *, axes: int | None = None, tile: int = TILE, cell: int | None = None,
            device: str | None = None) -> Links:
    """Read all rows once: norms, short rows, cells. RowsError names a row without a direction.

    axes : leading coordinates; None: by the width, at most AXES. cell : rows a cell, on average; None: CELL, more where
    that were more than CELLS cells. tile : rows a tile, at most (of TILE: a quarter of all, where that is less).
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    n, width = len(rows), rows.width
    k = min(axes or min(AXES, max(FEWER, width // 16 - 1)), width)
    more = min(width // MORE, width - k)
    basis = _axes(rows, k + more)
    z, tail = torch.empty(n, k + 1), torch.empty(n, more + 1)
    inverse = np.empty(n)

    def shorten(start: int) -> None:
        block, norm = rows.block(start, min(start + BLOCK, n))
        at = slice(start, start + len(block))
        inverse[at] = 1 / norm.numpy()
        y = (block @ basis).div_(norm[:, None])
        for out, part, used in ((z, y[:, :k], k), (tail, y[:, k:], k + more)):
            # in float64: rounding in 1 - |y|^2 would be magnified
            out[at, :-1], out[at, -1] = part, (1 - y[:, :used].square().sum(1)).clamp_min_(0).sqrt_()

    with progress.bar(desc="balance: read", unit="row", total=n) as bar:
        for _ in threads(shorten, range(0, n, BLOCK)):
            bar.update(min(BLOCK, n - bar.n))
    centres = kmeans(z, max(1, n // (cell or max(CELL, n // CELLS))), where)
    label = assign(z, centres)
    order = np.argsort(label, kind="stable")
    starts = np.append(0, np.cumsum(np.bincount(label, minlength=len(centres))))
    for part in (z.numpy(), tail.numpy()):  # a few columns at a time: a second copy of all would double what this takes
        for at in range(0, part.shape[1], 8):
            part[:, at:at + 8] = part[order, at:at + 8]
    # tiles: whole cells, of about `tile` rows together
    number = starts[:-1] // (max(LEAST, min(tile, n // 4)) if tile == TILE else tile)
    tiles = np.append(np.unique(number, return_index=True)[1], len(centres))
    z = z.to(where)
    return Links(rows, order, z, tail.to(where), starts, centres, extents(z, starts, centres), tiles, inverse)


def _axes(rows: Rows, count: int) -> torch.Tensor:
    """(width, count) float64, orthonormal: about the principal axes of a sample, the largest variance first."""
    n = len(rows)
    sample = torch.from_numpy(rows.unit(np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))))
    start = torch.randn(rows.width, min(rows.width, count + 16), generator=torch.Generator().manual_seed(0))
    basis, single = torch.linalg.qr(start.double())[0], sample.float()
    for _ in range(4):  # how near they come decides how much is ruled out, not what is found
        basis = torch.linalg.qr((single.T @ (single @ basis.float())).double())[0]
    seen = sample @ basis
    return (basis @ torch.linalg.eigh(seen.T @ seen)[1].flip(1))[:, :count].contiguous()


_ARRAYS = ("order", "starts", "tiles", "inverse")
_TENSORS = ("z", "tail", "centres", "extent")


def save(links: Links, folder: str | Path) -> None:
    """Write what `prepare` made, so that other processes need not: about a fifth of the embeddings' fp16 bytes."""
    for name in _ARRAYS + _TENSORS:
        value = getattr(links, name)
        np.save(Path(folder) / f"{name}.npy", value.cpu().numpy() if isinstance(value, torch.Tensor) else value)


def load(folder: str | Path, rows: Rows) -> Links:
    """What `save` wrote, memory-mapped, on the CPU."""
    found = {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r", allow_pickle=False)
             for name in _ARRAYS + _TENSORS}
    with warnings.catch_warnings():  # a memmap is read-only: so are its tensors
        warnings.simplefilter("ignore", UserWarning)
        return Links(rows, **{**found, **{name: torch.from_numpy(found[name]) for name in _TENSORS}})


def search(links: Links, limit: float, wanted: Wanted, found: Found, *, labels: Labels | None = None,
           squares: bool = False, tiles: Iterable[int] | None = None, done: Callable[[int], None] | None = None,
           desc: str | None = "balance") -> float:
    """Report all pairs of rows whose squared distance is at most `limit`, but those that are not wanted.

    Parameters
    ----------
    limit : squared L2 distance of unit rows.
    wanted : (a, b, lower) -> bool mask: pairs still of interest; `lower` bounds their squared distance from below.
        It is asked from several threads, and may answer by a state that is behind.
    found : (a, b, square): called by one thread at a time; square is None unless `squares`, else float64.
    labels : rows -> the set of each, as far as is known: pairs within a set are not wanted, and of the others only as
        many are measured as it takes to know the sets. None: there are no sets, all pairs count.
    tiles : which of the tiles, each against itself and all later ones; None: all.
    done : called after each tile's last pair was reported, by one thread at a time.
    desc : of the progress bar; None: no bar.

    Returns
    -------
    the share of all pairs whose full rows were read.
    """
    n = len(links.order)
    task = _Search(links, limit, wanted, found, labels, squares, threading.Lock())
    total, full = max(1, n * (n - 1) / 2), 0

    def one(t: int) -> None:
        nonlocal full
        read = task.tile(t)
        with task.lock:
            full += read
            if done is not None:
                done(t)

    todo = list(range(links.count) if tiles is None else tiles)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32: the margins count on float32
    try:
        with progress.bar(desc=desc or "", unit="tile", total=len(todo), hidden=desc is None) as bar:
            for _ in threads(one, todo):
                bar.set_postfix_str(f"{full:,} pairs measured", refresh=False)
                bar.update()
    finally:
        torch.set_float32_matmul_precision(before)
    return full / total


@dataclass
class _Search:
    links: Links
    limit: float
    wanted: Wanted
    found: Found
    labels: Labels | None
    squares: bool
    lock: threading.Lock
    failed: int = 0  # blocks on end in which short rows ruled out too little

    def tile(self, t: int) -> int:
        """Report the links of tile t with itself and later ones; how many pairs were measured."""
        links, read, waiting, count = self.links, 0, [], 0
        place, cell = _visits(links, links.tiles[t], links.tiles[t + 1], self.limit)
        start, stop = links.starts[links.tiles[t]], links.starts[links.tiles[t + 1]]
        if len(place) > DENSE * (stop - start) * (len(links.centres) - links.tiles[t]):
            parts = self._dense(links.tiles[t], links.tiles[t + 1])
        else:
            parts = self._sparse(place, cell)
        for part, products in parts:
            read += products
            if part is not None:
                waiting.append(part)
                count += len(part[0])
            if count >= CANDIDATES:
                read += self._measure(*map(np.concatenate, zip(*waiting, strict=True)))
                waiting, count = [], 0
        return read + (self._measure(*map(np.concatenate, zip(*waiting, strict=True))) if waiting else 0)

    def _sparse(self, place: np.ndarray, cell: np.ndarray) -> Iterator[tuple]:
        """Candidates of rows with the cells that they visit, a cell at a time."""
        starts = self.links.starts
        order = np.argsort(cell, kind="stable")
        place, cells, first = place[order], *np.unique(cell[order], return_index=True)
        for c, begin, end in zip(cells, first, np.append(first[1:], len(place)), strict=True):
            for at in range(begin, end, CHUNK):
                yield from self._block(place[at:min(at + CHUNK, end)], starts[c], starts[c + 1])

    def _dense(self, first: int, last: int) -> Iterator[tuple]:
        """Candidates of the rows of cells first..last, all of them with groups of neighbouring cells; where short
        rows have ruled out too little a few times, without them."""
        starts = self.links.starts
        group = np.append(np.unique(starts[first:-1] // GROUP, return_index=True)[1] + first, len(starts) - 1)
        for begin in range(starts[first], starts[last], CHUNK):
            rows = np.arange(begin, min(begin + CHUNK, starts[last]))
            held: list = []
            for low, high in zip(starts[group[:-1]], starts[group[1:]], strict=True):
                if high <= begin:
                    continue
                yield from self._block(rows, low, high, held=held)

    def _block(self, rows: np.ndarray, low: int, high: int, *, held: list | None = None) -> Iterator[tuple]:
        """Pairs of places `rows` with those from low to high that the bounds leave, as (rows a and b, lower bounds of
        their squared distances) or None, and how many products of full rows that took.

        held : keeps the full rows of `rows` for the next call, which has the same."""
        links, sets, every = self.links, None, len(rows)
        if self.labels is not None:
            left, right = self.labels(links.order[rows]), self.labels(links.order[low:high])
            if (right == right[0]).all():
                different = left != right[0]
                rows, left = rows[different], left[different]
            sets = left, right
        if not len(rows):
            return
        if held is None or self.failed < FAILED:
            mine = links.z[rows[0]:rows[-1] + 1] if _run(rows) else links.z[torch.from_numpy(rows)]
            product = mine @ links.z[low:high].T
            few = MANY if held is None else None
            a, b, value, measured = self._near(product, rows, low, sets, links.slack, few=few)
            if measured:
                yield None, measured
            a, b, value = self._keep(a, b, value, links.slack)
            if 0 < len(a) <= product.numel() // 16:
                value = _second_look(links, a, b, value)
                near = value >= 1 - self.limit / 2 - links.slack_of_second
                a, b, value = a[near], b[near], value[near]
            # of sets' pairs few are measured, however many are left
            part = 1 / 16 if sets is not None else links.rows.width * MEASURE
            if len(a) <= max(16, product.numel() * part):
                self.failed = 0
                if len(a):
                    yield (links.order[a], links.order[b], 2 - 2 * (value + links.slack_of_second)), 0
                return
            self.failed += held is not None
        if held is None or len(rows) < every:
            full = _unit(links, links.order[rows])
        else:
            held[:] = held or [_unit(links, links.order[rows])]
            full = held[0]
        product = full @ _unit(links, links.order[low:high]).T
        a, b, value, _ = self._near(product, rows, low, sets, links.margin)
        a, b, value = self._keep(a, b, value, links.margin)
        square = 2 - 2 * value
        a, b = links.order[a], links.order[b]
        if not self.squares:
            sure = square <= self.limit - 2 * links.margin
            if sure.any():
                x, y = a[sure], b[sure]
                some = _forest(self.labels, x, y, square[sure])
                with self.lock:
                    self.found(x[some], y[some], None)
            a, b, square = a[~sure], b[~sure], square[~sure]
        yield ((a, b, square - 2 * links.margin) if len(a) else None), product.numel()

    def _near(self, product: torch.Tensor, rows: np.ndarray, low: int, sets: tuple | None, off: float,
              few: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Pairs of different sets that a product of the places `rows` with those from `low` on, right to `off`, does
        not rule out: both places, the product's value, and how many pairs were measured for this: where it leaves more
        than `few`, the nearest of each row and column, which may join the sets of the others."""
        least, order, measured = 1 - self.limit / 2 - off, self.links.order, 0
        some = np.flatnonzero(product.amax(1).cpu().numpy() >= least)  # few rows have any: the rest is read once only
        if len(some) < len(product):
            product = product[torch.from_numpy(some).to(product.device)]
        part, a = product.cpu().numpy(), rows[some]
        hit = part >= least  # numpy's comparison takes a tenth of torch's time
        if sets is not None:
            hit &= sets[0][some][:, None] != sets[1]
        if len(a) and a[-1] >= low:  # a pair once, and no row with itself
            hit &= np.arange(low, low + part.shape[1]) > a[:, None]
        if sets is not None and few is not None:
            for _ in range(3):
                if np.count_nonzero(hit) <= few:
                    break
                value = np.where(hit, part, -np.inf)
                i, j = np.arange(len(a)), np.arange(part.shape[1])
                i, j = np.append(i, value.argmax(0)), np.append(value.argmax(1), j)
                i, j = i[hit[i, j]], j[hit[i, j]]
                x, y = order[a[i]], order[low + j]
                measured += self._measure(x, y, 2 - 2 * (part[i, j].astype(np.float64) + off), once=True)
                hit &= self.labels(order[a])[:, None] != self.labels(order[low:low + part.shape[1]])
        i, j = hit.nonzero()
        return a[i], low + j, part[i, j].astype(np.float64), measured

    def _keep(self, a: np.ndarray, b: np.ndarray, value: np.ndarray, off: float) -> tuple[np.ndarray, ...]:
        if not len(a):
            return a, b, value
        keep = self.wanted(self.links.order[a], self.links.order[b], 2 - 2 * (value + off))
        return a[keep], b[keep], value[keep]

    def _measure(self, a: np.ndarray, b: np.ndarray, lower: np.ndarray, *, once: bool = False) -> int:
        """Decide candidates, the nearest first, as those connect most others; how many were measured. once: only those
        of one forest of the sets that they would join."""
        links, count = self.links, 0
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
                x, y = a[now[at:at + BATCH]], b[now[at:at + BATCH]]
                square = links.rows.squares(x, y) if self.squares else None
                good = square <= self.limit if self.squares else _within(links, x, y, self.limit)
                if good.any():
                    with self.lock:
                        self.found(x[good], y[good], None if square is None else square[good])
            a, b, lower = a[later], b[later], lower[later]
        return count


def _visits(links: Links, first: int, last: int, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of cells first..last may have a neighbour in which later cell, their own among them: (m,) places,
    ascending within a cell, and (m,) cells."""
    mine, centres = links.centres[first:last], links.centres[first:]
    bias = centres.square().sum(1) / -2
    reach = torch.cdist(mine, centres, compute_mode="donot_use_mm_for_euclid_dist").mul_(limit**0.5).add_(ROUNDING)
    reach += links.extent[first:, first:last].T
    may = (reach + links.extent[first:last, first:] >= 0).cpu().numpy()
    places, cells = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for own in range(last - first):
        start, stop = links.starts[first + own], links.starts[first + own + 1]
        if start == stop:
            continue
        others = own + np.flatnonzero(may[own, own:])  # itself the first
        at = torch.from_numpy(others).to(centres.device)
        score = torch.addmm(bias[at], links.z[start:stop], centres[at].T)
        row, column = (score.sub_(score[:, :1].clone()).add_(reach[own, at]).cpu().numpy() >= 0).nonzero()
        places.append(start + row)
        cells.append(first + others[column])
    return np.concatenate(places), np.concatenate(cells)


def _second_look(links: Links, a: np.ndarray, b: np.ndarray, value: np.ndarray) -> np.ndarray:
    """A closer upper bound of the unit rows' product than that of the short rows: with the tails' coordinates for
    the first residual norm."""
    x, y = torch.from_numpy(a).to(links.z.device), torch.from_numpy(b).to(links.z.device)
    found = torch.linalg.vecdot(links.tail[x], links.tail[y]) - links.z[x, -1] * links.z[y, -1]
    return value + found.double().cpu().numpy()


def _forest(labels: Labels | None, a: np.ndarray, b: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Which of the pairs a minimum spanning forest of the sets that they would join consists of; all without sets."""
    if labels is None:
        return np.arange(len(a))
    x, y = np.unique(labels(np.concatenate([a, b])), return_inverse=True)[1].reshape(2, -1)
    by = np.argsort(length, kind="stable")
    by = by[x[by] != y[by]]
    low, high = np.minimum(x, y)[by], np.maximum(x, y)[by]
    first = np.sort(np.unique(low * (2 * len(a)) + high, return_index=True)[1])  # the nearest pair of two sets
    return by[first][minimum_forest(low[first], high[first], 2 * len(a))]


def _within(links: Links, a: np.ndarray, b: np.ndarray, limit: float) -> np.ndarray:
    """Is the squared distance of rows a[k] and b[k] at most the limit? In float32, in float64 where that can't tell."""
    left, right = (links.rows.unit32(x, links.inverse[x]) for x in (a, b))
    square = 2 - 2 * torch.linalg.vecdot(left, right).double().numpy()
    good = square <= limit
    unsure = np.abs(square - limit) <= 2 * links.margin
    if unsure.any():
        good[unsure] = links.rows.squares(a[unsure], b[unsure]) <= limit
    return good


def _unit(links: Links, index: np.ndarray) -> torch.Tensor:
    """Unit rows in float32 on the device."""
    return links.rows.unit32(index, links.inverse[index]).to(links.z.device)


def _run(places: np.ndarray) -> bool:
    return places[-1] - places[0] + 1 == len(places)
