"""Rows prepared for the search for links: a few coordinates a row, sorted into cells.

1. Rows are rotated to the principal axes of a sample and cut to the leading AXES coordinates y and
   the norm r of the remainder. For unit rows `|x - x'| >= |z - z'|` with z = (y, r), itself a unit
   vector: one product of 64 numbers a pair instead of the full width.
2. These short rows are sorted into cells, for which `mclip.balance.cells` has bounds.
3. The coordinates that follow, a thirty-second of the width, are kept beside them for a second
   comparison.

Both are fp16, a sixth of the bytes of 1,280 fp16 columns; their rounding is part of the bounds.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mclip.balance.cells import assign, extents, kmeans
from mclip.data.stores.rows import Rows
from mclip.system import progress
from mclip.system.threads import side_by_side

AXES = 63  # with the residual's norm 64 coordinates: a twentieth of the bytes of 1,280 fp16 numbers
FEWER = 31  # of narrow rows, where AXES would be many bytes
CELL = 64  # rows a cell, on average
CELLS = 8192  # at most: every row is held against the centres of all cells
TILE = 131072  # rows that are gone through at once, about: at most this, and a quarter of all
PARTS = 4  # tiles, at least: what several threads or workers share, and a killed run goes on from
LEAST = 2048  # rows a tile has at least
MORE = 32  # the part of the width that the second look takes
SAMPLE = 4096  # rows that the axes are computed from
SCORED = 1024  # rows whose scores for all cells are held at once
STRIP = 32  # cells held against all others at once
ROUNDING = 1e-4  # of cells' scores, far above what float32 is off by
BLOCK = 512  # rows read at once: larger pieces of memory are not given back when they are freed
ROUNDED = 2.0**-10 + 2.0**-17  # what a product of unit rows is off by when both are rounded to fp16


@dataclass
class Prepared:
    """Rows prepared for `mclip.balance.links.search`, sorted by cell; tiles of cells. Its methods
    `visits`, `second_look` and `within` are the bounds that a search rules pairs out by.

    order : (n,) row at each place.
    z : (n, k) fp16, the short rows in that order.
    tail : (n, m) fp16, the coordinates that follow, and the norm of what is left then.
    starts : (cells + 1,) first place of each cell.
    centres : (cells, k).
    extent : (cells, cells) fp16, see `cells.extents`.
    tiles : (tiles + 1,) first cell of each tile.
    inverse : (n,) float64, 1 / norm of each row, in the rows' own order.
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
        """What a float32 product of two unit rows may be off by: rounding of both, and a sum of
        width products.
        """
        return (self.rows.width + 8) * 2.0**-24

    @property
    def slack(self) -> float:
        """The same of two short rows."""
        return ROUNDED + (self.z.shape[1] + 8) * 2.0**-24

    @property
    def slack_of_second(self) -> float:
        """The same with their tails: they and what they follow are parts of unit vectors, so
        rounding counts once.
        """
        return ROUNDED + 2 * (self.z.shape[1] + self.tail.shape[1] + 16) * 2.0**-24

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.tiles) - 1

    def unit(self, places: np.ndarray) -> torch.Tensor:
        """Full unit rows of places, float32, on the device."""
        rows = self.order[places]
        return self.rows.unit32(rows, self.inverse[rows]).to(self.z.device)

    def visits(self, cells: np.ndarray, limit: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Which rows of some cells may have a neighbour in which later cell, their own among them:
        (m,) places and (m,) cells, a piece of a cell at a time.
        """
        starts, extent = self.starts, self.extent
        for own in np.split(cells, range(STRIP, len(cells), STRIP)):
            mine, centres = self.centres[torch.from_numpy(own)], self.centres[own[0] :]
            bias = centres.square().sum(1) / -2
            reach = torch.cdist(mine, centres, compute_mode="donot_use_mm_for_euclid_dist")
            reach.mul_(limit**0.5 + ROUNDED).add_(ROUNDING).add_(extent[own[0] :, own].T)
            may = (reach + extent[own, own[0] :] >= 0).cpu().numpy()
            for k, c in enumerate(own):
                others = c - own[0] + np.flatnonzero(may[k, c - own[0] :])  # itself the first
                at = torch.from_numpy(others).to(centres.device)
                across, offset, far = centres[at].T, bias[at], reach[k, at]
                for low in range(starts[c], starts[c + 1], SCORED):
                    score = torch.addmm(
                        offset, self.z[low : min(low + SCORED, starts[c + 1])].float(), across
                    )
                    row, column = (
                        score.sub_(score[:, :1].clone()).add_(far).cpu().numpy() >= 0
                    ).nonzero()
                    yield low + row, own[0] + others[column]

    def second_look(self, a: np.ndarray, b: np.ndarray, value: np.ndarray) -> np.ndarray:
        """A closer upper bound of the unit rows' product than that of the short rows: with the
        tails' coordinates for the first residual norm.
        """
        z, tail = self.z, self.tail
        x, y = torch.from_numpy(a).to(z.device), torch.from_numpy(b).to(z.device)
        found = (
            torch.linalg.vecdot(tail[x].float(), tail[y].float())
            - z[x, -1].float() * z[y, -1].float()
        )
        return value + found.double().cpu().numpy()

    def within(self, a: np.ndarray, b: np.ndarray, limit: float) -> np.ndarray:
        """Is the squared distance of rows a[k] and b[k] at most the limit? In float64 where float32
        is unsure.
        """
        left, right = (self.rows.unit32(x, self.inverse[x]) for x in (a, b))
        square = 2 - 2 * torch.linalg.vecdot(left, right).double().numpy()
        good = square <= limit
        unsure = np.abs(square - limit) <= 2 * self.margin
        if unsure.any():
            good[unsure] = self.rows.squares(a[unsure], b[unsure]) <= limit
        return good


def prepare(
    rows: Rows,
    *,
    axes: int | None = None,
    tile: int | None = None,
    parts: int = PARTS,
    cell: int | None = None,
    device: str | None = None,
) -> Prepared:
    """Read all rows once: norms, short rows, cells. EmbeddingsError names a row without
    a direction.

    axes : leading coordinates; None: by the width, at most AXES.
    cell : rows a cell, on average; None: CELL, more where that were more than CELLS cells.
    tile : rows a tile, about; None: a part of `parts`, at most TILE.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    n, width = len(rows), rows.width
    k = min(axes or min(AXES, max(FEWER, width // 16 - 1)), width)
    more = min(width // MORE, width - k)
    # on one thread: several would wait by spinning
    (basis,) = side_by_side(lambda count: _axes(rows, count), [k + more])
    z, tail = (
        torch.empty(n, k + 1, dtype=torch.float16),
        torch.empty(n, more + 1, dtype=torch.float16),
    )
    inverse = np.empty(n)

    def shorten(start: int) -> None:
        block, norm = rows.block(start, min(start + BLOCK, n))
        at = slice(start, start + len(block))
        inverse[at] = 1 / norm.numpy()
        y = (block @ basis).div_(norm[:, None])
        for out, part, used in ((z, y[:, :k], k), (tail, y[:, k:], k + more)):
            # in float64: rounding in 1 - |y|^2 would be magnified
            out[at, :-1], out[at, -1] = (
                part,
                (1 - y[:, :used].square().sum(1)).clamp_min_(0).sqrt_(),
            )

    with progress.bar(desc="balance: read", unit="row", total=n) as bar:
        for _ in side_by_side(shorten, range(0, n, BLOCK), ahead=None):
            bar.update(min(BLOCK, n - bar.n))
    centres = kmeans(z, max(1, n // (cell or max(CELL, n // CELLS))), where)
    label = assign(z, centres)
    order = np.argsort(label, kind="stable")
    starts = np.append(0, np.cumsum(np.bincount(label, minlength=len(centres))))
    for part in (
        z.numpy(),
        tail.numpy(),
    ):  # a few columns at a time: a second copy of all would double what this takes
        for at in range(0, part.shape[1], 8):
            part[:, at : at + 8] = part[order, at : at + 8]
    tile = tile or max(LEAST, min(TILE, n // parts))
    tiles = np.append(
        np.unique(starts[:-1] // tile, return_index=True)[1], len(centres)
    )  # of whole cells
    z = z.to(where)
    return Prepared(
        rows, order, z, tail.to(where), starts, centres, extents(z, starts, centres), tiles, inverse
    )


def _axes(rows: Rows, count: int) -> torch.Tensor:
    """(width, count) float64, orthonormal: about the principal axes of a sample, the largest
    variance first.
    """
    n, width = len(rows), rows.width
    sample = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
    second = torch.zeros(
        width, width
    )  # how near the axes come decides how much is ruled out, not what is found
    for at in range(0, len(sample), BLOCK):
        part = torch.from_numpy(rows.unit(sample[at : at + BLOCK])).float()
        second.addmm_(part.T, part)
    start = torch.randn(width, min(width, count + 16), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start.double())[0]
    for _ in range(4):
        basis = torch.linalg.qr((second @ basis.float()).double())[0]
    seen = basis.T @ (second @ basis.float()).double()
    return (basis @ torch.linalg.eigh(seen)[1].flip(1))[:, :count].contiguous()


_ARRAYS = ("order", "starts", "tiles", "inverse")
_TENSORS = ("z", "tail", "centres", "extent")


def save(prepared: Prepared, folder: str | Path) -> None:
    """Write what `prepare` made, so that other processes need not: about a tenth of the embeddings'
    fp16 bytes.
    """
    for name in _ARRAYS + _TENSORS:
        value = getattr(prepared, name)
        np.save(
            Path(folder) / f"{name}.npy",
            value.cpu().numpy() if isinstance(value, torch.Tensor) else value,
        )


def load(folder: str | Path, rows: Rows) -> Prepared:
    """Load what `save` wrote, memory-mapped, on the CPU."""
    found = {
        name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in _ARRAYS + _TENSORS
    }
    with warnings.catch_warnings():  # a memmap is read-only: so are its tensors
        warnings.simplefilter("ignore", UserWarning)
        return Prepared(
            rows, **{**found, **{name: torch.from_numpy(found[name]) for name in _TENSORS}}
        )
