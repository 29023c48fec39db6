"""CLIP-CID's cluster loss in memory that does not grow with batch times centres: tiles of logits,
made twice.

With rows x_j = a_i.w_j of the student and y_j = t_i.w_j of the teacher over the sampled centres
Omega,

    L_CD = mean_i [ lse_j(g x_j) - g x_yi ]
    L_KL = mean_i [ E_i[(y - x) / tau] - lse_j(y_j / tau) + lse_j(x_j / tau) ]

(E_i: mean under softmax(y / tau)). Forward keeps the log-sum-exps and the mean of each row online,
backward makes the tiles again (see mclip.losses.tiled.pairs). W's rows are fetched a tile at a
time, so its sample is never copied as a whole.

Over several processes each holds its part of the batch and its part of W (`ClusterLoss.shard`,
PartialFC's model parallelism): the samples go around the ranks with their statistics and gradients,
W stays where it is.
"""

from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mclip.losses.tiled import tiles
from mclip.losses.tiled.pairs import How
from mclip.losses.tiled.ring import Ring
from mclip.losses.tiled.tiles import cuts

if TYPE_CHECKING:
    from mclip.losses.cluster import ClusterLoss

SHARP, SOFT, TEACHER = range(3)  # log-sum-exps of g x, of x / tau, of y / tau


def cluster_loss(
    loss: "ClusterLoss",
    image: Tensor,
    teacher_image: Tensor,
    labels: Tensor,
    *,
    tile: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The value and gradients of `mclip.losses.ClusterLoss`, which calls this; the same draws.

    Parameters
    ----------
    loss : mclip.losses.ClusterLoss
        Holds W, the projection and all options but `backend`.
    image : Tensor, shape (b, d or student_dim)
    teacher_image : Tensor, shape (b, d)
    labels : Tensor of int64, shape (b,)
        As in `ClusterLoss.forward`; where W is spread over ranks (`ClusterLoss.shard`) each rank's
        part of the batch.
    tile, backend
        As in `mclip.losses.tiled.pairs.clip_loss`.
    """
    image = loss.projected(image, teacher_image, labels)
    omega = loss.sample(Ring(loss.group).all(labels))
    if omega is not None:  # those of this rank's part
        low, high = torch.searchsorted(
            omega, omega.new_tensor([loss.first, loss.first + len(loss.weight)])
        ).tolist()
        omega = omega[low:high] - loss.first
    return _Clusters.apply(
        image,
        loss.weight,
        teacher_image.detach(),
        labels,
        omega,
        loss,
        How.of(image, tile, backend, loss.group),
    )


class _Clusters(torch.autograd.Function):
    """weights[0] * L_CD + weights[1] * L_KL."""

    @staticmethod
    def forward(ctx, a, w, t, labels, omega, loss, how):
        ring, ops, n = Ring(how.group), tiles.backend(how.backend, a.device), len(a)
        one = (
            abs(loss.scale * loss.tau - 1) < 1e-12
        )  # both terms look at the same logits: one log-sum-exp
        discrimination, distribution = loss.weights
        state = tiles.running(a, 3, n)
        total = state.new_zeros(())
        with torch.autocast(a.device.type, enabled=False):
            for _, (a_, t_, labels_), (rows,) in ring.turn([a, t, labels], [state]):
                for j, i in product(cuts(_count(w, omega), how.tile), cuts(n, how.tile)):
                    if i.start == 0:
                        centres, _ = _centres(w, omega, j, loss.normalise)
                    x = tiles.logits(a_[i], centres)
                    if discrimination or (distribution and one):
                        ops.add(rows[SHARP][:, i], None, x, scale=loss.scale)
                    if distribution and not one:
                        ops.add(rows[SOFT][:, i], None, x, scale=1 / loss.tau)
                    if distribution:
                        ops.add(
                            rows[TEACHER][:, i],
                            None,
                            tiles.logits(t_[i], centres),
                            x,
                            scale=1 / loss.tau,
                        )
                if discrimination:
                    mine = ((labels_ >= loss.first) & (labels_ < loss.first + len(w))).nonzero()[
                        :, 0
                    ]
                    for i in cuts(len(mine), how.tile):
                        centres, _ = _centres(
                            w, labels_[mine[i]] - loss.first, slice(None), loss.normalise
                        )
                        total -= (
                            discrimination
                            * loss.scale
                            * (a_[mine[i]].to(centres.dtype) * centres).sum()
                        )
            lse = tiles.lse(state)
            if one:
                lse[SOFT] = lse[SHARP]
            if discrimination:
                total += discrimination * lse[SHARP].sum()
            if distribution:
                total += (
                    distribution * (tiles.mean(state[TEACHER]) - lse[TEACHER] + lse[SOFT]).sum()
                )
        mean = tiles.mean(state[TEACHER]) if loss.teacher_grad else None
        ctx.save_for_backward(a, w, t, labels, omega, lse, mean)
        ctx.loss, ctx.how = loss, how
        return ring.sum(total) / (n * ring.world)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        a, w, t, labels, omega, lse, mean = ctx.saved_tensors
        loss, how = ctx.loss, ctx.how
        ring, ops, n = Ring(how.group), tiles.backend(how.backend, a.device), len(a)
        discrimination, distribution = loss.weights
        da = torch.zeros_like(a, dtype=lse.dtype)
        dw = torch.zeros_like(w, dtype=lse.dtype)
        fixed = [a, t, labels, lse] + ([] if mean is None else [mean])
        with torch.autocast(a.device.type, enabled=False):
            for _, (a_, t_, labels_, lse_, *mean_), (da_,) in ring.turn(fixed, [da]):
                position = labels_ - loss.first
                if omega is not None:
                    position = torch.searchsorted(omega, position)
                here = (labels_ >= loss.first) & (labels_ < loss.first + len(w))
                for j in cuts(_count(w, omega), how.tile):
                    norm: Any
                    centres, norm = _centres(w, omega, j, loss.normalise)
                    dcentres = torch.zeros_like(centres, dtype=lse.dtype)
                    for i in cuts(n, how.tile):
                        x = tiles.logits(a_[i], centres)
                        dx: Any = None
                        if distribution:
                            factor = distribution / loss.tau
                            y = tiles.logits(t_[i], centres)
                            dx = ops.softmax(
                                x, lse_[SOFT, i], None, weight=factor, scale=1 / loss.tau
                            )
                            dx = ops.softmax(
                                y,
                                lse_[TEACHER, i],
                                None,
                                onto=dx,
                                weight=-factor,
                                scale=1 / loss.tau,
                            )
                            if mean_:
                                target = ops.softmax(
                                    y, lse_[TEACHER, i], None, weight=factor, scale=1 / loss.tau
                                )
                                dy = target.mul_((y - x) / loss.tau - mean_[0][i, None])
                                tiles.accumulate(dcentres, dy.T, t_[i])
                        if discrimination:
                            factor = discrimination * loss.scale
                            dx = ops.softmax(
                                x, lse_[SHARP, i], None, onto=dx, weight=factor, scale=loss.scale
                            )
                            at = position[i]
                            at = (here[i] & (at >= j.start) & (at < j.stop)).nonzero()[:, 0]
                            dx[at, position[i][at] - j.start] -= factor
                        tiles.accumulate(da_[i], dx, centres)
                        tiles.accumulate(dcentres, dx.T, a_[i])
                    if loss.normalise:
                        dcentres = (
                            dcentres - (dcentres * centres).sum(1, keepdim=True) * centres
                        ) / norm
                    dw[j if omega is None else omega[j]] += dcentres.mul_(
                        upstream / (n * ring.world)
                    )
        # da: the mean over ranks that DDP takes is of `world` shares
        return da.mul_(upstream / n).to(a.dtype), dw.to(w.dtype), *[None] * 5


def _count(w: Tensor, omega: Tensor | None) -> int:
    return len(w) if omega is None else len(omega)


def _centres(
    w: Tensor, which: Tensor | None, j: slice, normalise: bool
) -> tuple[Tensor, Tensor | None]:
    """Some rows of W, and what they were divided by."""
    rows = (w[j] if which is None else w[which[j]]).detach()
    if not normalise:
        return rows, None
    rows = rows.to(tiles.wide_type(rows))
    norm = rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return rows / norm, norm
