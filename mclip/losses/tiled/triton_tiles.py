"""`torch_tiles` as Triton kernels: each reads a tile of logits once and writes no other.

Values are worked on in the tile's own type, float32 or wider. Each output element has one program
that writes it, in one order: no atomics, the same bytes every run. Tested by Triton's interpreter
(TRITON_INTERPRET=1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def add(
    rows: Tensor | None,
    columns: Tensor | None,
    t: Tensor,
    s: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """`torch_tiles.add`."""
    for state, axis in ((rows, 0), (columns, 1)):
        if state is not None and t.numel():
            n, m = t.shape[axis], t.shape[1 - axis]
            same = s if s is not None else t
            if same.stride() != t.stride():
                raise ValueError(f"s: expected t's strides {t.stride()}, found {same.stride()}")
            _add[(triton.cdiv(n, 32),)](
                t,
                same,
                state,
                n,
                m,
                t.stride(axis),
                t.stride(1 - axis),
                state.stride(0),
                state.stride(1),
                scale,
                s is not None,
                32,
                128,
            )


def softmax(
    x: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    *,
    onto: Tensor | None = None,
    weight: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """`torch_tiles.softmax`."""
    out = torch.empty_like(x) if onto is None else onto
    n, m = x.shape
    if out.numel():
        _softmax[(triton.cdiv(n, 32), triton.cdiv(m, 128))](
            out,
            x,
            x if row is None else row,
            x if column is None else column,
            n,
            m,
            out.stride(0),
            out.stride(1),
            x.stride(0),
            x.stride(1),
            weight,
            scale,
            row is not None,
            column is not None,
            onto is not None,
            32,
            128,
        )
    return out


# weights and scales are constants of the compiled kernel: as arguments they would be rounded to
# float32


@triton.jit
def _add(
    t,
    s,
    state,
    n,
    m,
    stride_n,
    stride_m,
    state_stride,
    state_step,
    scale: tl.constexpr,
    difference: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
):
    """One program: N rows, over all columns."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    inside = i < n
    at = state + i * state_step
    top = tl.load(at, mask=inside, other=-float("inf"))
    total = tl.load(at + state_stride, mask=inside, other=0.0)
    weighted = tl.load(at + 2 * state_stride, mask=inside, other=0.0)
    for start in range(0, m, M):
        j = start + tl.arange(0, M)
        valid = inside[:, None] & (j < m)[None, :]
        where = i[:, None] * stride_n + j[None, :] * stride_m
        x = tl.load(t + where, mask=valid, other=-float("inf")) * scale
        new = tl.maximum(top, tl.max(x, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)
        e = tl.exp(x - finite[:, None])
        keep = tl.exp(top - finite)
        total = total * keep + tl.sum(e, 1)
        if difference:
            d = tl.where(valid, x - tl.load(s + where, mask=valid, other=0.0) * scale, 0.0)
            weighted = weighted * keep + tl.sum(e * d, 1)
        top = new
    tl.store(at, top, mask=inside)
    tl.store(at + state_stride, total, mask=inside)
    if difference:
        tl.store(at + 2 * state_stride, weighted, mask=inside)


@triton.jit
def _softmax(
    out,
    x,
    row,
    column,
    n,
    m,
    out_n,
    out_m,
    stride_n,
    stride_m,
    weight: tl.constexpr,
    scale: tl.constexpr,
    has_row: tl.constexpr,
    has_column: tl.constexpr,
    onto: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
):
    """One program: N rows, M columns."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    j = tl.program_id(1) * M + tl.arange(0, M)
    valid = (i < n)[:, None] & (j < m)[None, :]
    v = tl.load(x + i[:, None] * stride_n + j[None, :] * stride_m, mask=valid, other=0.0) * scale
    p = tl.zeros_like(v)
    if has_row:
        p += tl.exp(v - tl.load(row + i, mask=i < n, other=0.0)[:, None])
    if has_column:
        p += tl.exp(v - tl.load(column + j, mask=j < m, other=0.0)[None, :])
    p *= weight
    to = out + i[:, None] * out_n + j[None, :] * out_m
    if onto:
        p += tl.load(to, mask=valid, other=0.0)
    tl.store(to, p, mask=valid)
