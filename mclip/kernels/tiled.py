"""Contrastive, affinity and instance losses in memory linear in the batch: tiles of similarity, made twice.

With S = g A B^T for unit-norm rows A, B (n, d) and teachers T_k = g_k U_k V_k^T,

    CE = (1/2n) sum_i [ lse_j S_ij + lse_j S_ji - 2 S_ii ]
    KL = (1/2nK) sum_k sum_i [ KL(softmax_j T_ij || softmax_j S_ij) + KL(softmax_j T_ji || softmax_j S_ji) ]

Forward: one pass over the tiles keeps a running log-sum-exp for each row and column, and for the KL, since

    KL(softmax T_i || softmax S_i) = E_i[T - S] - lse T_i + lse S_i,

the running mean of T - S under softmax T, rescaled as the maximum moves (online softmax, arXiv 1805.02867).
Backward: the tiles are made again; with all log-sum-exps known each gives its part of the gradient at once.
All sums are float32 or wider, whatever the inputs are. Known before for hard labels (Inf-CLIP, arXiv 2410.17243).
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from mclip.losses.affinity import check_teachers
from mclip.losses.contrastive import check_ids, check_pair
from mclip.losses.instance import cross

TILE = 1024  # rows and columns of a tile: 4 MB a matrix in float32


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor | float, *, ids: Tensor | None = None,
              tile: int = TILE) -> Tensor:
    """`mclip.losses.clip_loss`, the same value and gradients."""
    check_pair(image, text, ("image", "text"))
    check_ids(ids, len(image))
    return _Tiled.apply(image, text, _scalar(logit_scale, image), ids, tile)


def affinity_loss(image: Tensor, text: Tensor, teachers: Sequence[tuple[Tensor, Tensor, Tensor | float]],
                  logit_scale: Tensor | float, *, tile: int = TILE) -> Tensor:
    """`mclip.losses.affinity_loss`, the same value and gradients; teachers get none."""
    check_teachers(image, text, teachers)
    flat = [x for u, v, g in teachers for x in (u.detach(), v.detach(), _scalar(g, u).detach())]
    return _Tiled.apply(image, text, _scalar(logit_scale, image), None, tile, *flat)


def instance_loss(image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor,
                  logit_scale: Tensor | float, beta: float = 0.5, *, ids: Tensor | None = None,
                  tile: int = TILE) -> Tensor:
    """`mclip.losses.instance_loss`, the same value and gradients; the teacher gets none."""
    return cross(clip_loss, image, text, teacher_image, teacher_text, beta, logit_scale, ids=ids, tile=tile)


class Expected:
    """Running log-sum-exp of T along one axis, and the mean of D under its softmax, for n rows."""

    def __init__(self, like: Tensor, n: int):
        self.top = like.new_full((n,), -torch.inf)
        self.sum, self.weighted = like.new_zeros(n), like.new_zeros(n)

    def add(self, at: slice, t: Tensor, d: Tensor, axis: int) -> None:
        top = torch.maximum(self.top[at], t.amax(axis))
        e = torch.exp(t - top.unsqueeze(axis))
        keep = torch.exp(self.top[at] - top)
        self.sum[at] = self.sum[at] * keep + e.sum(axis)
        self.weighted[at] = self.weighted[at] * keep + (e * d).sum(axis)
        self.top[at] = top

    def lse(self) -> Tensor:
        return self.top + self.sum.log()

    def mean(self) -> Tensor:
        return self.weighted / self.sum


class _Tiled(torch.autograd.Function):
    """KL of the module's docstring with the teachers that follow as U, V, g each; CE where there are none."""

    @staticmethod
    def forward(ctx, a, b, scale, ids, tile, *teachers):
        a_, b_, triples = wide(a), wide(b), _triples(teachers)
        g, n = scale.to(a_.dtype), len(a)
        row, column = a_.new_full((n,), -torch.inf), a_.new_full((n,), -torch.inf)
        expected = [(Expected(a_, n), Expected(a_, n)) for _ in triples]
        for i, j in _tiles(n, tile):
            s = _similarity(a_, b_, g, i, j, ids)
            row[i] = torch.logaddexp(row[i], s.logsumexp(1))
            column[j] = torch.logaddexp(column[j], s.logsumexp(0))
            for (u, v, gk), (by_row, by_column) in zip(triples, expected, strict=True):
                t = gk * (u[i] @ v[j].T)
                difference = t - s
                by_row.add(i, t, difference, 1)
                by_column.add(j, t, difference, 0)
        if triples:
            teacher_lse = [x for pair in expected for x in (pair[0].lse(), pair[1].lse())]
            means = sum(x.mean().sum() for pair in expected for x in pair)
            total = (means - sum(x.sum() for x in teacher_lse)) / len(triples) + row.sum() + column.sum()
        else:
            teacher_lse = []
            total = row.sum() + column.sum() - 2 * g * (a_ * b_).sum()
        ctx.save_for_backward(a, b, scale, ids, row, column, *teachers, *teacher_lse)
        ctx.tile, ctx.count = tile, len(teachers)
        return total / (2 * n)

    @staticmethod
    def backward(ctx, upstream):
        a, b, scale, ids, row, column, *rest = ctx.saved_tensors
        a_, b_, triples = wide(a), wide(b), _triples(rest[: ctx.count])
        lse = list(zip(rest[ctx.count :: 2], rest[ctx.count + 1 :: 2], strict=True))
        g, n, weight = scale.to(a_.dtype), len(a), upstream / (2 * len(a))
        da, db, dg = torch.zeros_like(a_), torch.zeros_like(b_), a_.new_zeros(())
        for i, j in _tiles(n, ctx.tile):
            s = _similarity(a_, b_, g, i, j, ids)
            ds = torch.exp(s - row[i, None]) + torch.exp(s - column[None, j])
            for (u, v, gk), (by_row, by_column) in zip(triples, lse, strict=True):
                t = gk * (u[i] @ v[j].T)
                ds -= (torch.exp(t - by_row[i, None]) + torch.exp(t - by_column[None, j])) / len(triples)
            if not triples and i == j:
                ds.diagonal().sub_(2)
            if ctx.needs_input_grad[0]:
                da[i] += ds @ b_[j]
            if ctx.needs_input_grad[1]:
                db[j] += ds.T @ a_[i]
            if ids is not None:  # -inf times a gradient of zero
                s = s.masked_fill(s == -torch.inf, 0)
            dg += (ds * s).sum()
        factor = weight * g
        gradients = ((factor * da).to(a.dtype), (factor * db).to(b.dtype), (weight * dg / g).to(scale.dtype))
        return (*gradients, None, None, *[None] * ctx.count)


def cuts(n: int, tile: int) -> list[slice]:
    """0..n in slices of `tile`."""
    return [slice(at, min(at + tile, n)) for at in range(0, n, tile)]


def _tiles(n: int, tile: int) -> Iterator[tuple[slice, slice]]:
    return product(cuts(n, tile), cuts(n, tile))


def _similarity(a: Tensor, b: Tensor, scale: Tensor, i: slice, j: slice, ids: Tensor | None) -> Tensor:
    """Tile (i, j) of S; -inf where two different samples have the same id."""
    s = scale * (a[i] @ b[j].T)
    if ids is not None:
        same = ids[i, None] == ids[None, j]
        if i == j:
            same.fill_diagonal_(False)
        s.masked_fill_(same, -torch.inf)
    return s


def wide(x: Tensor) -> Tensor:
    """x without its history, in float32 or wider."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _triples(flat: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(wide(flat[k]), wide(flat[k + 1]), wide(flat[k + 2])) for k in range(0, len(flat), 3)]


def _scalar(scale: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return scale
    return torch.tensor(scale, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
