"""What each of test_distributed.py's processes does: alone, as one of two ranks and of three."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mclip import losses
from mclip.distill import sharding
from mclip.losses import ClusterLoss
from mclip.losses.common import part
from mclip.losses.tiled import clusters
from mclip.losses.tiled import pairs as tiled

from .reference import unit

B, D, CLUSTERS, TILE = 12, 5, 43, 4
WORLDS = (1, 2, 3)  # numbers of ranks


def results(
    rank: int, world: int, group: dist.ProcessGroup | None
) -> dict[str, list[torch.Tensor]]:
    """By case: the loss, the gradients of this rank's rows, the scale's, and those of modules."""
    own = part(B, rank, world)
    whole = [unit(B, D, seed=s) for s in (1, 2, 3, 4)]
    ids_whole = torch.tensor(
        [0, 1, 2, 0, 4, 5, 1, 7, 8, 9, 0, 11]
    )  # shared within ranks and between them
    teachers = [
        (unit(B, w, seed=10 + w)[own], unit(B, w, seed=20 + w)[own], s)
        for w, s in ((3, 18.0), (9, 100.0))
    ]
    out = {}

    def rows():
        return [x[own].clone().requires_grad_() for x in whole] + [
            torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
        ]

    def note(name, loss, inputs):
        out[name] = [loss.detach(), *torch.autograd.grad(3 * loss, inputs)]

    tiles = {"tile": TILE, "group": group}
    for shared in (False, True):
        ids = ids_whole[own] if shared else None
        image, text, u, v, scale = rows()
        note(
            f"clip {shared}",
            tiled.clip_loss(image, text, scale, ids=ids, **tiles),
            [image, text, scale],
        )
        image, text, u, v, scale = rows()
        note(
            f"instance {shared}",
            tiled.instance_loss(image, text, u, v, scale, 0.3, ids=ids, **tiles),
            [image, text, scale],
        )
        # by the public name: so few rows are gathered
        image, text, u, v, scale = rows()
        note(
            f"public clip {shared}",
            losses.clip_loss(image, text, scale, ids=ids, group=group),
            [image, text, scale],
        )
        image, text, u, v, scale = rows()
        note(
            f"public instance {shared}",
            losses.instance_loss(image, text, u, v, scale, 0.3, ids=ids, group=group),
            [image, text, scale],
        )
    image, text, u, v, _ = rows()
    note("feature", losses.feature_loss(image, text, u, v, group=group), [image, text])
    for k in (1, 2):
        image, text, _, _, scale = rows()
        note(
            f"affinity {k}",
            tiled.affinity_loss(image, text, teachers[:k], scale, **tiles),
            [image, text, scale],
        )
    for backend in ("auto", "tiled"):
        image, text, _, _, scale = rows()
        how = {"backend": backend, "group": group}
        loss = losses.affinity_loss(image, text, teachers, scale, **how)
        note(f"public affinity {backend}", loss, [image, text, scale])
    labels = ((11 * torch.arange(B)) % CLUSTERS)[own]
    for name, options in {
        "cluster": {"sample_rate": 0.2},
        "cluster all": {"sample_rate": 1.0, "tau": 0.2},
        "cluster projected": {"sample_rate": 0.5, "student_dim": D, "reading": "additive"},
        "cluster options": {"normalise": True, "teacher_grad": True, "tau": 0.2},
    }.items():
        width = 7 if "student_dim" in options else D
        torch.manual_seed(0)
        module = ClusterLoss(
            1.3 * unit(CLUSTERS, width, seed=5), alpha=0.6, seed=8, **options
        ).double()
        module = module if group is None else module.shard(group)
        image = rows()[0]
        loss = clusters.cluster_loss(module, image, unit(B, width, seed=2)[own], labels, tile=TILE)
        note(
            name,
            loss,
            [image, *(p for n, p in module.named_parameters() if n != "weight"), module.weight],
        )
    return out


class Small(torch.nn.Module):
    """A student of one matrix and the cluster loss."""

    def __init__(self, group: dist.ProcessGroup | None):
        super().__init__()
        torch.manual_seed(0)
        self.student = torch.nn.Linear(D, D)
        self.cluster = ClusterLoss(unit(CLUSTERS, D, seed=5), 0.3, alpha=0.6, seed=8)
        self.double()
        if group is not None:
            self.cluster.shard(group)

    def forward(self, x, teacher, labels):
        return self.cluster(torch.nn.functional.normalize(self.student(x)), teacher, labels)


def trained(
    rank: int, world: int, group: dist.ProcessGroup | None, steps: range, state=None
) -> tuple[dict, dict] | None:
    """The whole state after AdamW's steps from `state`, gradients clipped hard."""
    own = part(B, rank, world)
    model = wrapped = Small(group)
    if group is not None:
        ddp = torch.nn.parallel.DistributedDataParallel
        spread = [one.name for one in sharding.spread(model)]
        ddp._set_params_and_buffers_to_ignore_for_model(model, spread)
        wrapped = ddp(model, process_group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    if state is not None:
        sharding.own(model, optimizer, *state)
    for step in steps:
        labels = (torch.arange(B) * 11 + step) % CLUSTERS
        wrapped(unit(B, D, seed=step)[own], unit(B, D, seed=50 + step)[own], labels[own]).backward()
        sharding.clip_gradients(model, 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sharding.whole(model, optimizer)


def main(folder: Path, rank: int) -> None:
    """Everything, for each number of ranks that this one belongs to."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=max(WORLDS))
    groups = {w: dist.new_group(list(range(w))) if w > 1 else None for w in WORLDS}
    groups = {world: group for world, group in groups.items() if rank < world}
    for world, group in groups.items():
        torch.save(results(rank, world, group), folder / f"{world}-{rank}.pt")
        if (state := trained(rank, world, group, range(2))) is not None:
            torch.save(state, folder / f"checkpoint-{world}.pt")
    dist.barrier()
    for world, group in groups.items():  # two more steps, from the checkpoint of each number
        for origin in WORLDS:
            state = torch.load(folder / f"checkpoint-{origin}.pt", weights_only=True)
            if (state := trained(rank, world, group, range(2, 4), state)) is not None:
                torch.save(state, folder / f"{origin}-then-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
