"""Cells of nearby rows, and bounds that rule out pairs of cells farther apart than a distance.

k-means puts n rows into cells with centres c. With `s_C(x) = c_C.x - |c_C|^2 / 2`, the score of x
for cell C, the function `f = s_A - s_B` grows by at most |c_A - c_B| for each unit of distance.
`extents` computes its largest value over the rows of each cell, once for all limits; then a row x
of A can have a neighbour within e in B only if

    s_A(x) - s_B(x) <= max over y in B of (s_A(y) - s_B(y)) + e |c_A - c_B|

This holds however rows are assigned to cells: nothing here relies on exact k-means.
"""

import numpy as np
import torch

from mclip.system.threads import side_by_side

ITERATIONS = 5
PER_CELL = 8  # rows that a centre is trained on
ROWS = 64  # rows held against all centres at once: the scores stay in a core's cache


def assign(z: torch.Tensor, centres: torch.Tensor) -> np.ndarray:
    """Assign each row to the cell of the largest score, the nearest up to rounding: (n,)."""
    label, across, bias = (
        np.empty(len(z), np.int32),
        centres.T.contiguous(),
        centres.square().sum(1) / -2,
    )

    def some(start: int) -> None:
        score = torch.addmm(bias, z[start : start + ROWS].to(centres.device).float(), across)
        # numpy's argmax on the CPU: a fifteenth of torch's time
        label[start : start + ROWS] = (
            score.argmax(1).cpu() if score.is_cuda else score.numpy().argmax(1)
        )

    for _ in side_by_side(some, range(0, len(z), ROWS), ahead=None):
        pass
    return label


def kmeans(z: torch.Tensor, k: int, device: torch.device) -> torch.Tensor:
    """Centres (k, d) of rows z by Lloyd's algorithm on PER_CELL rows each; near ones lie beside
    each other.
    """
    some = np.random.default_rng(0).choice(len(z), min(len(z), PER_CELL * k), replace=False)
    sample = z[torch.from_numpy(some)].float()
    centres = sample[:k].clone()
    for _ in range(ITERATIONS if k > 1 else 1):
        label = torch.from_numpy(assign(sample, centres.to(device))).long()
        size = label.bincount(minlength=k)[:, None]
        mean = torch.zeros_like(centres).index_add_(0, label, sample) / size.clamp_min(1)
        centres = torch.where(size > 0, mean, centres)  # a centre without rows stays where it is
    return centres[torch.from_numpy(kd_order(centres.numpy(), 16))].to(device)


def extents(z: torch.Tensor, starts: np.ndarray, centres: torch.Tensor) -> torch.Tensor:
    """(cells, cells) fp16: [A, B] is the largest s_B(x) - s_A(x) of the rows x of cell A, or a
    little more.

    Rows of cell A are z[starts[A]:starts[A + 1]]; an empty cell has -inf.
    """
    across, bias = centres.T.contiguous(), centres.square().sum(1) / -2
    out = torch.full(
        (len(centres), len(centres)), -torch.inf, dtype=torch.float16, device=centres.device
    )

    def one(a: int) -> None:
        start, stop = starts[a], starts[a + 1]
        if start == stop:
            return
        most = torch.full_like(bias, -torch.inf)
        for at in range(start, stop, ROWS):
            score = z[at : min(at + ROWS, stop)].float() @ across
            torch.maximum(most, score.sub_(score[:, a, None].clone()).amax(0), out=most)
        most += bias - bias[a]
        out[a] = (most + most.abs() * 2**-10 + 1e-7).half()  # never rounded to less

    for _ in side_by_side(one, range(len(centres)), ahead=None):
        pass
    return out


def kd_order(points: np.ndarray, size: int) -> np.ndarray:
    """(n,) places: points sorted by median splits along the coordinate of largest variance, into
    runs of `size`.
    """
    order = np.arange(len(points))
    stack = [(0, len(points))]
    while stack:
        start, stop = stack.pop()
        if stop - start <= size:
            continue
        part = order[start:stop]
        axis = int(points[part].var(axis=0).argmax())
        middle = max(size, (stop - start + size) // (2 * size) * size)  # a whole number of runs
        if middle < stop - start:
            order[start:stop] = part[np.argpartition(points[part, axis], middle)]
            stack += [(start, start + middle), (start + middle, stop)]
    return order
