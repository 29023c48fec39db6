"""All pairs of rows within a distance, without measuring most pairs: exact, in a few bytes a row.

Bounds rule pairs out before their full rows are read:

1. Rows are rotated to the principal axes of a sample and cut to the leading AXES coordinates y and the norm r of what
   is left. For unit rows `|x - x'| >= |z - z'|` with z = (y, r), itself a unit vector: one product of 64 numbers a
   pair instead of the full width.
2. The short rows are sorted into the cells of k-means. A row x of cell A can have a neighbour within e in cell B only
   if `s_A(x) - s_B(x) <= e |c_A - c_B|` with s_C(x) = c_C.x - |c_C|^2 / 2: the plane between the two centres is no
   farther from x than e. One product of 64 numbers for CELL pairs.
3. What passes both is held against the coordinates that follow, a thirty-second of the width.
4. Pairs that the caller does not want any more, as both are in one set already, are never measured.

What is left is measured nearest first. Where the bounds rule out too little to pay (no decaying spectrum, a large
limit), full rows are multiplied instead, so that the worst case is the blocked product of all rows.

Rounding never decides: z is rounded from float64, products of short rows are compared with a margin for float32's
error, and full products that float32 cannot tell from the limit are measured in float64.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import scipy.linalg
import torch
from threadpoolctl import threadpool_limits

from mclip import progress
from mclip.rows import Rows

AXES = 63  # with the residual's norm 64 coordinates
CELL = 64  # rows a cell, on average
CELLS = 8192  # at most: every row is held against the centres of all cells
GROUP = 256  # rows a group of cells, about: they are multiplied together
TILE = 8192  # rows that are gone through at once, about
MORE = 32  # the part of the width that the second look takes
SAMPLE = 8192  # rows that the axes are computed from
BATCH = 2048  # pairs measured at once
BLOCK = 2048  # rows read at once
ROWS = 512  # rows held against all centres at once
ROUNDING = 1e-4  # of cells' scores, far above what float32 is off by
MEASURE = 1e-5  # measuring a pair takes as long as this part of a full product's elements, for each column

Wanted = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Found = Callable[[np.ndarray, np.ndarray, np.ndarray | None], None]


@dataclass
class Links:
    """Rows prepared for `search`, sorted by cell; groups of cells, and tiles of groups.

    order : (n,) row at each place. z : (n, k) float32, the short rows in that order; tail : (n, m) float32, the
    coordinates that follow and the norm of what is left then. cell : (n,) each one's cell.
    centres : (cells, k). together : cells a group. groups : (groups + 1,) first place of each group. tiles :
    (tiles + 1,) first group of each tile. inverse : (n,) float64, 1 / norm of each row, in the rows' own order.
    """

    rows: Rows
    order: np.ndarray
    z: torch.Tensor
    tail: torch.Tensor
    cell: torch.Tensor
    centres: torch.Tensor
    together: int
    groups: np.ndarray
    tiles: np.ndarray
    inverse: np.ndarray

    @property
    def margin(self) -> float:
        """What a float32 product of two unit rows may be off by: rounding of both, and a sum of width products."""
        return (self.rows.width + 8) * 2.0**-24

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.tiles) - 1


def prepare(rows: Rows, *, axes: int = AXES, tile: int = TILE, cell: int | None = None,
            device: str | None = None) -> Links:
    """Read all rows once: norms, short rows, cells. RowsError names a row without a direction.

    cell : rows a cell, on average; None: CELL, more where that were more than CELLS cells.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    n, width = len(rows), rows.width
    k = min(axes, width)
    more = min(width // MORE, width - k)
    sample = rows.unit(np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64)))
    moment = sample.T @ sample
    with threadpool_limits(1, "blas"):  # OpenBLAS's threads wait by spinning: 20 x slower beside any other process
        vectors = scipy.linalg.eigh(moment, subset_by_index=[width - k - more, width - 1])[1]
    basis = torch.from_numpy(vectors[:, ::-1].copy())
    z, tail = np.empty((n, k + 1), np.float32), np.empty((n, more + 1), np.float32)
    inverse = np.empty(n)

    def shorten(start: int) -> None:
        block, norm = rows.block(start, min(start + BLOCK, n))
        at = slice(start, start + len(block))
        inverse[at] = 1 / norm.numpy()
        y = (block @ basis) / norm[:, None]
        for out, part, used in ((z, y[:, :k], k), (tail, y[:, k:], k + more)):
            # in float64: rounding in 1 - |y|^2 would be magnified
            rest = (1 - y[:, :used].square().sum(1)).clamp_min_(0).sqrt_()
            out[at] = torch.cat([part, rest[:, None]], 1).float().numpy()

    with progress.bar(desc="balance: read", unit="row", total=n) as bar:
        for _ in threads(shorten, range(0, n, BLOCK)):
            bar.update(min(BLOCK, n - bar.n))
    cell = cell or max(CELL, n // CELLS)
    together = max(1, GROUP // cell)
    centres, label = _cells(z, max(1, n // cell), together)
    order = np.argsort(label, kind="stable")
    for part in (z, tail):  # a few columns at a time: a second copy of all would double what this takes
        for at in range(0, part.shape[1], 8):
            part[:, at:at + 8] = part[order, at:at + 8]
    size = np.bincount(label, minlength=len(centres))
    groups = np.append(np.cumsum(size) - size, n)[np.append(np.arange(0, len(centres), together), len(centres))]
    # tiles: whole groups, of about `tile` rows together
    number = np.minimum(groups[:-1] // tile, n)
    tiles = np.append(np.unique(number, return_index=True)[1], len(groups) - 1)
    return Links(rows, order, torch.from_numpy(z).to(where), torch.from_numpy(tail).to(where),
                 torch.from_numpy(label[order]).to(where),
                 torch.from_numpy(centres).to(where), together, groups, tiles, inverse)


_ARRAYS = ("order", "z", "tail", "cell", "centres", "groups", "tiles", "inverse")


def save(links: Links, folder: str | Path) -> None:
    """Write what `prepare` made, so that other processes need not: about a fifth of the embeddings' fp16 bytes."""
    for name in _ARRAYS:
        value = getattr(links, name)
        np.save(Path(folder) / f"{name}.npy", value.cpu().numpy() if isinstance(value, torch.Tensor) else value)
    np.save(Path(folder) / "together.npy", links.together)


def load(folder: str | Path, rows: Rows) -> Links:
    """What `save` wrote, memory-mapped, on the CPU."""
    found = {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
    with warnings.catch_warnings():  # a memmap is read-only: so are its tensors
        warnings.simplefilter("ignore", UserWarning)
        tensors = {name: torch.from_numpy(found[name]) for name in ("z", "tail", "cell", "centres")}
    together = int(np.load(Path(folder) / "together.npy", allow_pickle=False))
    return Links(rows, together=together, **{**found, **tensors})


def _cells(z: np.ndarray, k: int, together: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres (k, d) of the short rows, near ones beside each other, and each row's cell (n,)."""
    kmeans = faiss.Kmeans(z.shape[1], k, niter=5, seed=0, min_points_per_centroid=1, max_points_per_centroid=16)
    kmeans.train(z)
    centres = kmeans.centroids[kd_order(kmeans.centroids, together)]
    to, label = torch.from_numpy(centres), np.empty(len(z), np.int64)
    bias = to.square().sum(1) / -2

    def assign(start: int) -> None:  # a flat index takes two to three times as long for a single neighbour
        own = torch.from_numpy(z[start:start + ROWS])
        label[start:start + ROWS] = torch.addmm(bias, own, to.T).argmax(1).numpy()

    for _ in threads(assign, range(0, len(z), ROWS)):
        pass
    return centres, label


def kd_order(points: np.ndarray, size: int) -> np.ndarray:
    """(n,) places: points sorted by median splits along the coordinate of largest variance, into runs of `size`."""
    order = np.arange(len(points))
    stack = [(0, len(points))]
    while stack:
        start, stop = stack.pop()
        if stop - start <= size:
            continue
        part = order[start:stop]
        axis = int(points[part].var(axis=0).argmax())
        middle = max(size, (stop - start + size) // (2 * size) * size)  # a whole number of runs
        order[start:stop] = part[np.argpartition(points[part, axis], middle)]
        stack += [(start, start + middle), (start + middle, stop)]
    return order


def search(links: Links, limit: float, wanted: Wanted, found: Found, *, squares: bool = False,
           tiles: Iterable[int] | None = None, done: Callable[[int], None] | None = None,
           desc: str | None = "balance") -> float:
    """Report all pairs of rows whose squared distance is at most `limit`, but those that are not wanted.

    Parameters
    ----------
    limit : squared L2 distance of unit rows.
    wanted : (a, b, lower) -> bool mask: pairs still of interest; `lower` bounds their squared distance from below.
        It is asked from several threads, and may answer by a state that is behind.
    found : (a, b, square): called by one thread at a time; square is None unless `squares`, else float64.
    tiles : which of the tiles, each against itself and all later ones; None: all.
    done : called after each tile's last pair was reported, by one thread at a time.
    desc : of the progress bar; None: no bar.

    Returns
    -------
    the share of all pairs whose full rows were read.
    """
    n = len(links.order)
    lock, total, full = threading.Lock(), max(1, n * (n - 1) / 2), 0

    def one(t: int) -> None:
        nonlocal full
        read = 0
        for a, b, lower, upper, products in _batched(_candidates(links, t, limit, wanted)):
            read += products + _measure(links, a, b, lower, upper, limit, wanted, found, lock, squares)
        with lock:
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


def _candidates(links: Links, t: int, limit: float, wanted: Wanted) -> Iterator[tuple]:
    """Pairs of tile t with itself and later ones that the bounds leave, a group at a time: rows a and b, lower and
    upper bounds of their squared distances (upper: None where only short rows were multiplied), and how many products
    of full rows that took."""
    g, stop_g = links.tiles[t], links.tiles[t + 1]
    start, stop = links.groups[g], links.groups[stop_g]
    if start == stop:
        return
    left, full_left = links.z[start:stop], None
    slack = (left.shape[1] + 8) * 2.0**-24
    slack2 = slack + (links.tail.shape[1] + 8) * 2.0**-24
    visits = _visits(links, start, stop, g, limit)
    for which in range(visits.shape[0]):
        first, last = links.groups[g + which], links.groups[g + which + 1]
        if first == last or not len(rows := visits[which].nonzero()[:, 0]):
            continue
        everything = len(rows) == len(left)
        product = (left if everything else left[rows]) @ links.z[first:last].T
        left_over = _near(links, product, start + rows, first, limit, slack, wanted, most=product.numel() / 8)
        if left_over is not None:
            a, b, value = left_over
            if 0 < len(a) <= product.numel() // 16:
                value = _second_look(links, a, b, value)
                near = value >= 1 - limit / 2 - 2 * slack2
                a, b, value = a[near], b[near], value[near]
            if len(a) <= product.numel() * links.rows.width * MEASURE:
                if len(a):
                    yield links.order[a], links.order[b], 2 - 2 * (value + 2 * slack2), None, 0
                continue
        if full_left is None:
            full_left = _unit(links, links.order[start:stop])
        product = (full_left if everything else full_left[rows]) @ _unit(links, links.order[first:last]).T
        a, b, value = _near(links, product, start + rows, first, limit, links.margin, wanted, most=product.numel())
        yield (links.order[a], links.order[b], 2 - 2 * (value + links.margin), 2 - 2 * (value - links.margin),
               product.numel())


def _near(links: Links, product: torch.Tensor, rows: torch.Tensor, first: int, limit: float, off: float,
          wanted: Wanted, *, most: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Wanted pairs that a product of the places `rows` with those from `first` on, right to `off`, does not rule out:
    both places and the product's value; None where it leaves more than `most` pairs."""
    least = 1 - limit / 2 - off
    some = (product.amax(1) >= least).nonzero()[:, 0]  # few rows have any: the rest is read once only
    part = product[some] if len(some) < len(product) else product
    hit = part >= least
    if int(hit.count_nonzero()) > most:
        return None
    i, j = hit.nonzero(as_tuple=True)
    a, b = rows[some[i]], first + j
    new = (b > a).nonzero()[:, 0]  # a pair once, and no row with itself
    value = part[i[new], j[new]].double().cpu().numpy()
    a, b = a[new].cpu().numpy(), b[new].cpu().numpy()
    if len(a):
        keep = wanted(links.order[a], links.order[b], 2 - 2 * (value + off))
        a, b, value = a[keep], b[keep], value[keep]
    return a, b, value


def _second_look(links: Links, a: np.ndarray, b: np.ndarray, value: np.ndarray) -> np.ndarray:
    """A closer upper bound of the unit rows' product than that of the short rows: with the tails' coordinates for
    the first residual norm."""
    x, y = torch.from_numpy(a).to(links.z.device), torch.from_numpy(b).to(links.z.device)
    found = torch.linalg.vecdot(links.tail[x], links.tail[y]) - links.z[x, -1] * links.z[y, -1]
    return value + found.double().cpu().numpy()


def _visits(links: Links, start: int, stop: int, group: int, limit: float) -> torch.Tensor:
    """(groups from `group` on, rows of the tile) bool: which rows may have a neighbour in which group."""
    first = group * links.together
    centres = links.centres[first:]
    bias = (centres * centres).sum(1) / -2
    mine = centres[:int(links.cell[stop - 1]) + 1 - first]  # the tile's own cells come first
    reach = torch.cdist(mine, centres, compute_mode="donot_use_mm_for_euclid_dist").mul_(limit**0.5).add_(ROUNDING)
    groups = -(-len(centres) // links.together)
    out = torch.zeros(groups, stop - start, dtype=torch.bool, device=centres.device)
    for at in range(start, stop, ROWS):
        until = min(at + ROWS, stop)
        own = links.cell[at:until]
        score = torch.addmm(bias, links.z[at:until], centres.T)
        own = own - first
        least = score.gather(1, own[:, None])
        may = score.add_(reach[own]) >= least
        may = torch.nn.functional.pad(may, (0, groups * links.together - len(centres)))
        out[:, at - start:until - start] = may.view(len(may), groups, links.together).any(2).T
    return out


def _batched(parts: Iterable[tuple]) -> Iterator[tuple]:
    """Candidates of short rows put together, as a group has few; those with upper bounds go as they come."""
    waiting, count = [], 0
    for part in parts:
        if part[3] is not None:
            yield part
            continue
        waiting.append(part[:3])
        count += len(part[0])
        if count >= 4 * BATCH:
            yield *map(np.concatenate, zip(*waiting, strict=True)), None, 0
            waiting, count = [], 0
    if waiting:
        yield *map(np.concatenate, zip(*waiting, strict=True)), None, 0


def _measure(links: Links, a, b, lower, upper, limit: float, wanted: Wanted, found: Found, lock, squares: bool) -> int:
    """Decide candidates, the nearest first, as those connect most others; how many were measured."""
    if upper is not None and not squares:
        sure = upper <= limit
        if sure.any():
            with lock:
                found(a[sure], b[sure], None)
        a, b, lower = a[~sure], b[~sure], lower[~sure]
    by = np.argsort(lower, kind="stable")
    a, b, lower, count = a[by], b[by], lower[by], 0
    while len(a):
        keep = wanted(a, b, lower)
        a, b, lower = a[keep], b[keep], lower[keep]
        now, later = slice(None, BATCH), slice(BATCH, None)
        count += len(a[now])
        if squares:
            square = links.rows.squares(a[now], b[now])
            good = square <= limit
        else:
            square, good = None, _within(links, a[now], b[now], limit)
        if good.any():
            with lock:
                found(a[now][good], b[now][good], None if square is None else square[good])
        a, b, lower = a[later], b[later], lower[later]
    return count


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


def threads(work: Callable, items: Iterable) -> Iterator:
    """work(item) of every item, on as many threads as torch has, each with one: the items are too small to be cut."""
    count = torch.get_num_threads()
    if count == 1:
        yield from map(work, items)
        return
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()
    finally:
        torch.set_num_threads(count)
