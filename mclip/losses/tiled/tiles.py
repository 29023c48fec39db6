"""What the tiled losses share, and their back ends: `torch_tiles`, `triton_tiles`.

A back end is a module with `add` (forward) and `softmax` (backward) of one tile of logits. All
matrix products are torch's own: no kernel written here would beat the vendor's at widths of 512 to
1,536, and a fused one would have to make each tile once for its rows and once for its columns. So
the back ends differ in these two functions alone.
"""

import os
from types import ModuleType

import torch
from torch import Tensor

from mclip.losses.tiled import torch_tiles

BACKENDS = ("auto", "tiled", "triton")
HALF = (torch.bfloat16, torch.float16)


def backend(name: str, device: torch.device) -> ModuleType:
    """The module that `name` stands for: "tiled" plain torch's, "triton" Triton's; "auto" Triton's
    on CUDA where the package is, else plain torch's.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {name!r}")
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend 'triton' needs CUDA tensors, found {device.type}; use 'auto' or 'tiled'"
            )
        try:
            from mclip.losses.tiled import triton_tiles
        except ImportError as err:
            if name == "triton":
                raise ValueError(
                    f"backend 'triton': the package triton can't be imported ({err})"
                ) from err
        else:
            return triton_tiles
    return torch_tiles


def running(like: Tensor, *shape: int) -> Tensor:
    """(*shape[:-1], 3, n) statistics of n rows before any tile: maximum, sum of exp, sum of exp
    times difference.
    """
    state = torch.zeros(*shape[:-1], 3, shape[-1], dtype=wide_type(like), device=like.device)
    state[..., 0, :] = -torch.inf
    return state


def lse(state: Tensor) -> Tensor:
    """Log-sum-exp of what was added."""
    return state[..., 0, :] + state[..., 1, :].log()


def mean(state: Tensor) -> Tensor:
    """Mean of t - s under the softmax of t."""
    return state[..., 2, :] / state[..., 1, :]


def logits(x: Tensor, y: Tensor, scale: Tensor | None = None) -> Tensor:
    """scale * x @ y.T, in float32 or wider: at a scale of 100 a bf16 logit has steps of 0.5."""
    if _in_half(x, y):
        out = torch.mm(x, y.T, out_dtype=torch.float32)
        return out if scale is None else out.mul_(scale)
    kind = torch.promote_types(wide_type(x), wide_type(y))
    x = x.to(kind)
    return (x if scale is None else x * scale.to(kind)) @ y.to(kind).T


def accumulate(onto: Tensor, d: Tensor, y: Tensor) -> None:
    """onto += d @ y, in place."""
    if _in_half(y, y):
        onto += torch.mm(d.to(y.dtype), y, out_dtype=torch.float32)
    else:
        onto.addmm_(d, y.to(d.dtype))


def wide_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def cuts(n: int, tile: int) -> list[slice]:
    """0..n in slices of `tile`."""
    return [slice(at, min(at + tile, n)) for at in range(0, n, tile)]


def _in_half(x: Tensor, y: Tensor) -> bool:
    """Whether the device multiplies halves and sums in float32; CPUs that have bf16 units round
    each product's sum.
    """
    return x.is_cuda and x.dtype == y.dtype and x.dtype in HALF
