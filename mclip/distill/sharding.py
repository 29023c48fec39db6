"""A training run's checkpoint with W whole, whatever the number of ranks that W's rows lie on.

`whole` and `own` translate between what each rank has of a model's and its optimizer's state and
what a file holds.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mclip.losses.cluster import ClusterLoss, part


def whole(model: nn.Module, optimizer: Optimizer) -> tuple[dict, dict] | None:
    """Both state_dicts as one process would have them; on rank 0, None on others. All ranks must
    call this.
    """
    states = model.state_dict(), optimizer.state_dict()
    for cluster, holder, key in _shards(model, optimizer, *states):
        holder[key] = _gathered(holder[key], cluster)
    return states if not dist.is_initialized() or dist.get_rank() == 0 else None


def own(model: nn.Module, optimizer: Optimizer, model_state: dict, optimizer_state: dict) -> None:
    """Load what `whole` returned; each rank keeps its part."""
    for cluster, holder, key in _shards(model, optimizer, model_state, optimizer_state):
        rows = part(
            cluster.clusters, dist.get_rank(cluster.group), dist.get_world_size(cluster.group)
        )
        holder[key] = holder[key][rows].clone()
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """`nn.utils.clip_grad_norm_` over all parameters, once each, where some lie on several ranks in
    parts.
    """
    sharded = [m for m in model.modules() if isinstance(m, ClusterLoss) and m.group is not None]
    if not sharded:
        return nn.utils.clip_grad_norm_(model.parameters(), most)
    parts = {id(m.weight) for m in sharded}
    norm = nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None and id(p) not in parts]
    )
    for m in sharded:
        square = m.weight.grad.norm() ** 2
        dist.all_reduce(square, group=m.group)
        norm = (norm**2 + square).sqrt()
    nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
    return norm


def sharded_names(model: nn.Module) -> list[str]:
    """Parameters that differ between ranks, which DDP must neither send nor average."""
    return [
        f"{name}.weight".lstrip(".")
        for name, m in model.named_modules()
        if isinstance(m, ClusterLoss) and m.group is not None
    ]


def _shards(
    model: nn.Module, optimizer: Optimizer, model_state: dict, optimizer_state: dict
) -> Iterator[tuple[ClusterLoss, dict, str]]:
    """(loss, dict, key) of each tensor that has W's rows."""
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for name, m in model.named_modules():
        if isinstance(m, ClusterLoss) and m.group is not None:
            yield m, model_state, f"{name}.weight".lstrip(".")
            moments = optimizer_state["state"].get(order.index(id(m.weight)), {})
            for key in [k for k, v in moments.items() if isinstance(v, Tensor) and v.ndim == 2]:
                yield m, moments, key


def _gathered(rows: Tensor, cluster: ClusterLoss) -> Tensor:
    """All rows on rank 0, in main memory; elsewhere this rank's."""
    rank, world = dist.get_rank(cluster.group), dist.get_world_size(cluster.group)
    first = dist.get_global_rank(cluster.group, 0)
    if rank != 0:
        dist.send(rows.contiguous(), first, group=cluster.group)
        return rows
    out = torch.empty(cluster.clusters, rows.shape[1], dtype=rows.dtype)
    out[part(cluster.clusters, 0, world)] = rows.cpu()
    for other in range(1, world):
        where = part(cluster.clusters, other, world)
        theirs = rows.new_empty(where.stop - where.start, rows.shape[1])
        dist.recv(theirs, dist.get_global_rank(cluster.group, other), group=cluster.group)
        out[where] = theirs.cpu()
    return out
