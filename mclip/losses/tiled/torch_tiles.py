"""A tile of logits into running statistics, and out of them into softmaxes: plain torch, any
device.
"""

import torch
from torch import Tensor


def add(
    rows: Tensor | None,
    columns: Tensor | None,
    t: Tensor,
    s: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Take a tile into the running statistics, in place.

    Parameters
    ----------
    rows, columns : (3, n), (3, m) parts of what `running` made, or None
    t : (n, m) logits; may hold -inf
    s : (n, m) or None; where given, the mean of t - s under the softmax of t is kept too
    scale : both are multiplied by
    """
    if scale != 1:
        t = t * scale
        s = None if s is None else s * scale
    difference = None if s is None else t - s
    for state, axis in ((rows, 1), (columns, 0)):
        if state is None:
            continue
        top = torch.maximum(state[0], t.amax(axis))
        finite = top.masked_fill(top == -torch.inf, 0)  # nothing but -inf so far
        e = (t - finite.unsqueeze(axis)).exp_()
        keep = torch.exp(state[0] - finite)
        state[1].mul_(keep).add_(e.sum(axis))
        if difference is not None:
            state[2].mul_(keep).add_(e.mul_(difference).sum(axis))
        state[0] = top


def softmax(
    x: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    *,
    onto: Tensor | None = None,
    weight: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """onto + weight * (exp(scale x - row) + exp(scale x - column)), of whichever is given: (n, m).

    row (n,), column (m,) : log-sum-exps. onto : (n, m), changed in place; None: a new matrix.
    """
    if scale != 1:
        x = x * scale
    for lse_, axis in ((row, 1), (column, 0)):
        if lse_ is not None:
            e = (x - lse_.unsqueeze(axis)).exp_()
            onto = (
                (e if weight == 1 else e.mul_(weight))
                if onto is None
                else onto.add_(e, alpha=weight)
            )
    return onto  # type: ignore[return-value]
