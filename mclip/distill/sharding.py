"""A training run's checkpoint with every parameter whole, however its rows are spread over ranks.

A module whose parameter's rows are spread over the ranks of its `group` (each has a `part` of them)
says so by `sharded`: {parameter's name: number of rows in all}, as `mclip.losses.ClusterLoss` does.
`whole` and `own` translate between each rank's part of a model's and its optimizer's state and the
content of a file.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mclip.losses.common import part


@dataclass(frozen=True)
class Spread:
    """A parameter of which this rank has some rows; `name` as in the model's state_dict."""

    name: str
    parameter: nn.Parameter
    rows: int
    group: dist.ProcessGroup

    def part(self, rank: int) -> slice:
        """The rows of a rank of the group."""
        return part(self.rows, rank, dist.get_world_size(self.group))


def spread(model: nn.Module) -> list[Spread]:
    """The parameters that are spread over ranks."""
    return [
        Spread(f"{prefix}.{name}".lstrip("."), getattr(m, name), rows, m.group)
        for prefix, m in model.named_modules()
        for name, rows in getattr(m, "sharded", {}).items()
    ]


def whole(model: nn.Module, optimizer: Optimizer) -> tuple[dict, dict] | None:
    """Both state_dicts as one process would have them; on rank 0, None on others. All ranks must
    call this.
    """
    states = model.state_dict(), optimizer.state_dict()
    for one, holder, key in _shards(model, optimizer, *states):
        holder[key] = _gathered(holder[key], one)
    return states if not dist.is_initialized() or dist.get_rank() == 0 else None


def own(model: nn.Module, optimizer: Optimizer, model_state: dict, optimizer_state: dict) -> None:
    """Load what `whole` returned; each rank keeps its part."""
    for one, holder, key in _shards(model, optimizer, model_state, optimizer_state):
        holder[key] = holder[key][one.part(dist.get_rank(one.group))].clone()
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """`nn.utils.clip_grad_norm_` over all parameters, once each, where some lie on several ranks in
    parts.
    """
    parts = spread(model)
    if not parts:
        return nn.utils.clip_grad_norm_(model.parameters(), most)
    apart = {id(one.parameter) for one in parts}
    norm = nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None and id(p) not in apart]
    )
    for one in parts:
        square = one.parameter.grad.norm() ** 2
        dist.all_reduce(square, group=one.group)
        norm = (norm**2 + square).sqrt()
    nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
    return norm


def _shards(
    model: nn.Module, optimizer: Optimizer, model_state: dict, optimizer_state: dict
) -> Iterator[tuple[Spread, dict, str]]:
    """(parameter, dict, key) of each tensor that has a spread parameter's rows."""
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for one in spread(model):
        yield one, model_state, one.name
        moments = optimizer_state["state"].get(order.index(id(one.parameter)), {})
        for key, value in list(moments.items()):
            if isinstance(value, Tensor) and value.ndim == one.parameter.ndim:  # no count of steps
                yield one, moments, key


def _gathered(rows: Tensor, one: Spread) -> Tensor:
    """All rows on rank 0, in main memory; elsewhere this rank's."""
    rank, world = dist.get_rank(one.group), dist.get_world_size(one.group)
    first = dist.get_global_rank(one.group, 0)
    if rank != 0:
        dist.send(rows.contiguous(), first, group=one.group)
        return rows
    out = torch.empty(one.rows, *rows.shape[1:], dtype=rows.dtype)
    out[one.part(0)] = rows.cpu()
    for other in range(1, world):
        where = one.part(other)
        theirs = rows.new_empty(where.stop - where.start, *rows.shape[1:])
        dist.recv(theirs, dist.get_global_rank(one.group, other), group=one.group)
        out[where] = theirs.cpu()
    return out
