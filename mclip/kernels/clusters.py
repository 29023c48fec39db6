"""CLIP-CID's cluster loss in memory that does not grow with batch times centres: tiles of logits, made twice.

With rows x_j = a_i.w_j of the student and y_j = t_i.w_j of the teacher over the sampled centres Omega,

    L_CD = mean_i [ lse_j(g x_j) - g x_yi ]
    L_KL = mean_i [ E_i[(y - x) / tau] - lse_j(y_j / tau) + lse_j(x_j / tau) ]

(E_i: mean under softmax(y / tau)). Forward keeps the log-sum-exps and the mean of each row online, backward makes the
tiles again (see mclip.kernels.tiled). W's rows are fetched a tile at a time, so its sample is never copied as a whole.
"""

from itertools import product

import torch
from torch import Tensor

from mclip.kernels.tiled import TILE, Expected, cuts, wide
from mclip.losses.cluster import ClusterLoss


def cluster_loss(loss: ClusterLoss, image: Tensor, teacher_image: Tensor, labels: Tensor, *,
                 tile: int = TILE) -> Tensor:
    """`loss(image, teacher_image, labels)`, the same value and gradients; draws the same sample of centres.

    Parameters
    ----------
    loss : holds W, the projection and all options.
    image (b, d or student_dim), teacher_image (b, d) : unit norm. labels : (b,) int64.
    """
    image = loss.projected(image, teacher_image, labels)
    return _Clusters.apply(image, loss.weight, teacher_image.detach(), labels, loss.sample(labels), loss,
                           loss.weights, tile)


class _Clusters(torch.autograd.Function):
    """discrimination * L_CD + distribution * L_KL."""

    @staticmethod
    def forward(ctx, a, w, t, labels, omega, loss, weights, tile):
        a_, t_, b = wide(a), wide(t), len(a)
        one = abs(loss.scale * loss.tau - 1) < 1e-12  # both terms look at the same logits: one log-sum-exp
        sharp, soft = a_.new_full((b,), -torch.inf), a_.new_full((b,), -torch.inf)
        teacher = Expected(a_, b)
        for j, i in product(cuts(len(w) if omega is None else len(omega), tile), cuts(b, tile)):
            if i.start == 0:
                rows, _ = _centres(w, omega, j, loss.normalise)
            x = a_[i] @ rows.T
            if weights[0] or (weights[1] and one):
                sharp[i] = torch.logaddexp(sharp[i], (loss.scale * x).logsumexp(1))
            if weights[1]:
                y = (t_[i] @ rows.T) / loss.tau
                x = x / loss.tau
                if not one:
                    soft[i] = torch.logaddexp(soft[i], x.logsumexp(1))
                teacher.add(i, y, y - x, 1)
        soft = sharp if one else soft
        total = a_.new_zeros(())
        if weights[0]:
            own = loss.scale * sum((a_[i] * _centres(w, labels, i, loss.normalise)[0]).sum() for i in cuts(b, tile))
            total = total + weights[0] * (sharp.sum() - own)
        if weights[1]:
            total = total + weights[1] * (teacher.mean() - teacher.lse() + soft).sum()
        ctx.save_for_backward(a, w, t, labels, omega, sharp, soft, teacher.lse(), teacher.mean())
        ctx.options = loss.scale, loss.tau, loss.normalise, loss.teacher_grad, weights, tile
        return total / b

    @staticmethod
    def backward(ctx, upstream):
        a, w, t, labels, omega, sharp, soft, teacher, mean = ctx.saved_tensors
        scale, tau, normalise, teacher_grad, weights, tile = ctx.options
        a_, t_, b = wide(a), wide(t), len(a)
        position = labels if omega is None else torch.searchsorted(omega, labels)
        da, dw = torch.zeros_like(a_), torch.zeros_like(w)
        for j in cuts(len(w) if omega is None else len(omega), tile):
            rows, norm = _centres(w, omega, j, normalise)
            drows = torch.zeros_like(rows)
            for i in cuts(b, tile):
                x = a_[i] @ rows.T
                dx = torch.zeros_like(x)
                if weights[0]:
                    dx += weights[0] * scale * torch.exp(scale * x - sharp[i, None])
                    here = ((position[i] >= j.start) & (position[i] < j.stop)).nonzero()[:, 0]
                    dx[here, position[i][here] - j.start] -= weights[0] * scale
                if weights[1]:
                    y = (t_[i] @ rows.T) / tau
                    target = torch.exp(y - teacher[i, None])
                    dx += weights[1] / tau * (torch.exp(x / tau - soft[i, None]) - target)
                    if teacher_grad:
                        dy = weights[1] / tau * target * (y - x / tau - mean[i, None])
                        drows += dy.T @ t_[i]
                da[i] += dx @ rows
                drows += dx.T @ a_[i]
            if normalise:
                drows = (drows - (drows * rows).sum(1, keepdim=True) * rows) / norm
            drows = (drows * (upstream / b)).to(w.dtype)
            if omega is None:
                dw[j] = drows
            else:
                dw[omega[j]] = drows
        return (da * (upstream / b)).to(a.dtype), dw, None, None, None, None, None, None


def _centres(w: Tensor, which: Tensor | None, j: slice, normalise: bool) -> tuple[Tensor, Tensor | None]:
    """Some rows of W in float32 or wider, and what they were divided by."""
    rows = wide(w[j] if which is None else w[which[j]])
    if not normalise:
        return rows, None
    norm = rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return rows / norm, norm
