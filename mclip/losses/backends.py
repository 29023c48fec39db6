"""How a public loss is calculated: on whole matrices or in tiles, and by how many ranks.

plain    whole (b, b) matrices in plain torch; the fastest for a small batch
tiled    the same values in memory linear in b, in plain torch (mclip.losses.tiled)
triton   as tiled, with Triton's kernels; CUDA only
auto     plain below `TILED_FROM` samples, else triton on CUDA where it can run, else tiled
"""

from typing import Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor

Rows = TypeVar("Rows", Tensor, Tensor | None)
Backend = Literal["auto", "plain", "tiled", "triton"]
NAMES = get_args(Backend)
# samples from which tiles take less time than whole matrices (benchmarks/losses.md)
TILED_FROM = 1024


def is_plain(backend: Backend, samples: int, group: dist.ProcessGroup | None = None) -> bool:
    """Does a loss take whole matrices? Else it takes tiles, of the kind that `backend` says.

    Parameters
    ----------
    backend : {"auto", "plain", "tiled", "triton"}
    samples : int
        Rows that this process has of the batch.
    group : torch.distributed.ProcessGroup, optional
        Its other ranks have as many rows each; None: this process has the whole batch.

    Raises
    ------
    ValueError
        If `backend` is another word.
    """
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, found {backend!r}")
    if backend != "auto":
        return backend == "plain"
    return samples * (1 if group is None else dist.get_world_size(group)) < TILED_FROM


def gathered(group: dist.ProcessGroup | None, *rows: Rows) -> list[Rows]:
    """Each tensor's rows of all ranks, concatenated by rank; gradients flow back to their rank.

    Each rank then calculates the whole batch's loss: with DDP's averaging the gradient is that of
    one process. group None: this process alone, and nothing is sent.
    """
    if group is None:
        return list(rows)
    return [None if x is None else _gathered(group, x.contiguous()) for x in rows]


def _gathered(group: dist.ProcessGroup, rows: Tensor) -> Tensor:
    if rows.requires_grad:
        from torch.distributed.nn.functional import all_gather

        # all_gather's backward adds up the ranks' equal gradients and DDP averages: together a
        # factor of one
        return torch.cat(all_gather(rows, group))
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows, group=group)
    return torch.cat(parts)
