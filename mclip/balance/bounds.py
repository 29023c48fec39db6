"""What `mclip.balance.links` decides pairs by: which rows and cells can have any, a bound from a
few coordinates more, and the distance itself, in float64 where float32 can't tell.
"""

from collections.abc import Iterator

import numpy as np
import torch

from mclip.balance.prepared import ROUNDED, Prepared

PIECE = 1024  # rows whose scores for all cells are held at once
STRIP = 32  # cells held against all others at once
ROUNDING = 1e-4  # of cells' scores, far above what float32 is off by


def visits(
    prepared: Prepared, cells: np.ndarray, limit: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Which rows of some cells may have a neighbour in which later cell, their own among them: (m,)
    places and (m,) cells, a piece of a cell at a time.
    """
    starts, extent = prepared.starts, prepared.extent
    for own in np.split(cells, range(STRIP, len(cells), STRIP)):
        mine, centres = prepared.centres[torch.from_numpy(own)], prepared.centres[own[0] :]
        bias = centres.square().sum(1) / -2
        reach = torch.cdist(mine, centres, compute_mode="donot_use_mm_for_euclid_dist")
        reach.mul_(limit**0.5 + ROUNDED).add_(ROUNDING).add_(extent[own[0] :, own].T)
        may = (reach + extent[own, own[0] :] >= 0).cpu().numpy()
        for k, c in enumerate(own):
            others = c - own[0] + np.flatnonzero(may[k, c - own[0] :])  # itself the first
            at = torch.from_numpy(others).to(centres.device)
            across, offset, far = centres[at].T, bias[at], reach[k, at]
            for low in range(starts[c], starts[c + 1], PIECE):
                score = torch.addmm(
                    offset, prepared.z[low : min(low + PIECE, starts[c + 1])].float(), across
                )
                row, column = (
                    score.sub_(score[:, :1].clone()).add_(far).cpu().numpy() >= 0
                ).nonzero()
                yield low + row, own[0] + others[column]


def second_look(prepared: Prepared, a: np.ndarray, b: np.ndarray, value: np.ndarray) -> np.ndarray:
    """A closer upper bound of the unit rows' product than that of the short rows: with the tails'
    coordinates for the first residual norm.
    """
    z, tail = prepared.z, prepared.tail
    x, y = torch.from_numpy(a).to(z.device), torch.from_numpy(b).to(z.device)
    found = (
        torch.linalg.vecdot(tail[x].float(), tail[y].float()) - z[x, -1].float() * z[y, -1].float()
    )
    return value + found.double().cpu().numpy()


def within(prepared: Prepared, a: np.ndarray, b: np.ndarray, limit: float) -> np.ndarray:
    """Is the squared distance of rows a[k] and b[k] at most the limit? In float32, in float64 where
    that can't tell.
    """
    left, right = (prepared.rows.unit32(x, prepared.inverse[x]) for x in (a, b))
    square = 2 - 2 * torch.linalg.vecdot(left, right).double().numpy()
    good = square <= limit
    unsure = np.abs(square - limit) <= 2 * prepared.margin
    if unsure.any():
        good[unsure] = prepared.rows.squares(a[unsure], b[unsure]) <= limit
    return good
