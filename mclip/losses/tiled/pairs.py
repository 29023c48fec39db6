"""Contrastive, affinity and instance losses in memory linear in the batch: tiles of similarity,
made twice.

With S = g A B^T for unit-norm rows A, B (n, d) and teachers T_k = g_k U_k V_k^T,

    CE = (1/2n) sum_i [ lse_j S_ij + lse_j S_ji - 2 S_ii ]
    KL = (1/2nK) sum_k sum_i [ KL(softmax_j T_ij || softmax_j S_ij)
                               + KL(softmax_j T_ji || softmax_j S_ji) ]

Forward: one pass over the tiles keeps a running log-sum-exp for each row and column, and for the
KL, since

    KL(softmax T_i || softmax S_i) = E_i[T - S] - lse T_i + lse S_i,

the running mean of T - S under softmax T, rescaled as the maximum moves (online softmax, arXiv
1805.02867). Backward: the tiles are made again; with all log-sum-exps known each gives its part of
the gradient at once. All sums are float32 or wider, whatever the inputs are. Known before for hard
labels (Inf-CLIP, arXiv 2410.17243).

Over several processes each holds its part of the batch. B, V_k and what belongs to their rows
(statistics, gradients) go around the ranks; A and U_k stay. Each rank makes its share of the tiles,
and none has the whole batch's embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mclip.losses.common import check_ids, check_pair, check_teachers, cross
from mclip.losses.tiled import tiles
from mclip.losses.tiled.ring import Ring
from mclip.losses.tiled.tiles import cuts


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    check_norm: bool = False,
    tile: int | None = None,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`mclip.losses.clip_loss` in tiles: the same value and gradients.

    Parameters
    ----------
    image, text, logit_scale, ids, check_norm, group
        As in `mclip.losses.clip_loss`.
    tile : int, optional
        Rows and columns of a tile; None: 1,024 (4 MB a matrix in float32), on CUDA 4,096.
    backend : {"auto", "tiled", "triton"}, default "auto"
        What makes a tile (`tiles.backend`): plain torch or Triton.
    """
    check_pair(image, text, ("image", "text"), norm=check_norm)
    check_ids(ids, len(image))
    return _Pairs.apply(
        image, text, _scalar(logit_scale, image), ids, How.of(image, tile, backend, group)
    )


def affinity_loss(
    image: Tensor,
    text: Tensor,
    teachers: Sequence[tuple[Tensor, Tensor, Tensor | float]],
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    check_norm: bool = False,
    tile: int | None = None,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`mclip.losses.affinity_loss` in tiles: the same value and gradients.

    Parameters as there; `tile` and `backend` as in `clip_loss`.
    """
    check_teachers(image, text, teachers, norm=check_norm)
    flat = [x for u, v, g in teachers for x in (u.detach(), v.detach(), _scalar(g, u).detach())]
    return _Pairs.apply(
        image, text, _scalar(logit_scale, image), None, How.of(image, tile, backend, group), *flat
    )


def instance_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    logit_scale: Tensor | float,
    beta: float = 0.5,
    *,
    ids: Tensor | None = None,
    check_norm: bool = False,
    tile: int | None = None,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`mclip.losses.instance_loss` in tiles: the same value and gradients.

    Parameters as there; `tile` and `backend` as in `clip_loss`.
    """
    return cross(
        clip_loss,
        image,
        text,
        teacher_image,
        teacher_text,
        beta,
        check_norm,
        logit_scale,
        ids=ids,
        tile=tile,
        backend=backend,
        group=group,
    )


@dataclass(frozen=True)
class How:
    """The options that change no value."""

    tile: int
    backend: str
    group: dist.ProcessGroup | None

    @classmethod
    def of(
        cls, like: Tensor, tile: int | None, backend: str, group: dist.ProcessGroup | None
    ) -> "How":
        tiles.backend(
            backend, like.device
        )  # an unfit one is refused here, not in the middle of a backward pass
        if tile is not None and tile < 1:
            raise ValueError(f"tile: expected at least 1, found {tile}")
        return cls(tile or (4096 if like.is_cuda else 1024), backend, group)


class _Pairs(torch.autograd.Function):
    """KL of the module's docstring with the teachers that follow as U, V, g each; CE where there
    are none.
    """

    @staticmethod
    def forward(ctx, a, b, scale, ids, how, *teachers):
        ring, ops, n = Ring(how.group), tiles.backend(how.backend, a.device), len(a)
        stay, go, scales = [a, *teachers[::3]], [b, *teachers[1::3]], [scale, *teachers[2::3]]
        rows, columns = (tiles.running(a, len(stay), n) for _ in range(2))
        with torch.autocast(a.device.type, enabled=False):
            for owner, there, (below,) in ring.turn(_some(*go, ids), [columns]):
                for i, j in product(cuts(n, how.tile), repeat=2):
                    s = _similarity(a, there, scale, i, j, ids, owner == ring.rank)
                    ops.add(rows[0][:, i], below[0][:, j], s)
                    for k in range(1, len(stay)):
                        t = tiles.logits(stay[k][i], there[k][j], scales[k])
                        ops.add(rows[k][:, i], below[k][:, j], t, s)
            row, column = tiles.lse(rows), tiles.lse(columns)
            total = row[0].sum() + column[0].sum()
            if teachers:
                divergence = tiles.mean(rows[1:]) + tiles.mean(columns[1:]) - row[1:] - column[1:]
                total = total + divergence.sum() / (len(stay) - 1)
            else:
                own = sum((_wide(a[i]) * _wide(b[i])).sum() for i in cuts(n, how.tile))
                total = total - 2 * scale.to(total.dtype) * own
        ctx.save_for_backward(a, b, scale, ids, row, column, *teachers)
        ctx.how = how
        return ring.sum(total) / (2 * n * ring.world)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        a, b, scale, ids, row, column, *teachers = ctx.saved_tensors
        how = ctx.how
        ring, ops, n = Ring(how.group), tiles.backend(how.backend, a.device), len(a)
        stay, go, scales = [a, *teachers[::3]], [b, *teachers[1::3]], [scale, *teachers[2::3]]
        by_b = ctx.needs_input_grad[1]
        by_a = ctx.needs_input_grad[0] or not by_b  # the scale's gradient is read off either
        da: Any = torch.zeros_like(a, dtype=row.dtype) if by_a else None
        db: Any = torch.zeros_like(b, dtype=row.dtype) if by_b else None
        with torch.autocast(a.device.type, enabled=False):
            for owner, (column_, *there), moving in ring.turn(_some(column, *go, ids), _some(db)):
                for i, j in product(cuts(n, how.tile), repeat=2):
                    own = owner == ring.rank
                    s = _similarity(a, there, scale, i, j, ids, own)
                    ds = ops.softmax(s, row[0, i], column_[0, j])
                    for k in range(1, len(stay)):
                        t = tiles.logits(stay[k][i], there[k][j], scales[k])
                        ops.softmax(
                            t, row[k, i], column_[k, j], onto=ds, weight=-1 / (len(stay) - 1)
                        )
                    if not teachers and own and i == j:
                        ds.diagonal().sub_(2)
                    if by_a:
                        tiles.accumulate(da[i], ds, there[0][j])
                    if by_b:
                        tiles.accumulate(moving[0][j], ds.T, a[i])
            # sum_ij ds_ij S_ij / g, and the mean over ranks that DDP takes is of `world` shares
            dg = sum(
                (d[i] * _wide(x[i])).sum()
                for d, x in [(da, a) if by_a else (db, b)]
                for i in cuts(n, how.tile)
            )
            weight = upstream / (2 * n)
            factor = weight * scale.to(row.dtype)
            da, db = (
                None if d is None else d.mul_(factor).to(x.dtype) for d, x in ((da, a), (db, b))
            )
        return (da, db, (weight * dg).to(scale.dtype), None, None, *[None] * len(teachers))


def _similarity(
    a: Tensor, there: list[Tensor], scale: Tensor, i: slice, j: slice, ids: Tensor | None, own: bool
) -> Tensor:
    """Tile (i, j) of S; -inf where two different samples have the same id (the last of `there`)."""
    s = tiles.logits(a[i], there[0][j], scale)
    if ids is not None:
        same = ids[i, None] == there[-1][None, j]
        if own and i == j:
            same.fill_diagonal_(False)
        s.masked_fill_(same, -torch.inf)
    return s


def _some(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _wide(x: Tensor) -> Tensor:
    return x.to(tiles.wide_type(x))


def _scalar(scale: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return scale
    return torch.tensor(scale, dtype=tiles.wide_type(like), device=like.device)
