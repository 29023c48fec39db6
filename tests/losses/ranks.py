"""What each process of test_distributed.py does; with world 1 what it is compared with."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from mclip import losses
from mclip.distill import sharding
from mclip.distill.objective import gather
from mclip.losses import ClusterLoss
from mclip.losses.cluster import part
from mclip.losses.tiled import clusters
from mclip.losses.tiled import pairs as tiled

from .reference import unit

B, D, CLUSTERS, TILE = 12, 5, 43, 4


def results(rank: int, world: int) -> dict[str, list[torch.Tensor]]:
    """By case: the loss, the gradients of this rank's rows, the scale's, and those of modules."""
    group = dist.group.WORLD if world > 1 else None
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
        # what the trainer does with the plain losses
        image, text, u, v, scale = rows()
        f = {"image": image, "text": text} | ({"ids": ids} if shared else {})
        f = gather(f) if world > 1 else f
        note(
            f"gathered {shared}",
            losses.clip_loss(f["image"], f["text"], scale, ids=f.get("ids")),
            [image, text, scale],
        )
    for k in (1, 2):
        image, text, _, _, scale = rows()
        note(
            f"affinity {k}",
            tiled.affinity_loss(image, text, teachers[:k], scale, **tiles),
            [image, text, scale],
        )
    image, text, u, _, scale = rows()
    f = {"image": image, "text": text, "u": teachers[0][0], "v": teachers[0][1]}
    f = gather(f) if world > 1 else f
    note(
        "gathered affinity",
        losses.affinity_loss(f["image"], f["text"], [(f["u"], f["v"], 18.0)], scale),
        [image, text, scale],
    )
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
        module = module.shard(group) if world > 1 else module
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

    def __init__(self, world: int):
        super().__init__()
        torch.manual_seed(0)
        self.student = torch.nn.Linear(D, D)
        self.cluster = ClusterLoss(unit(CLUSTERS, D, seed=5), 0.3, alpha=0.6, seed=8)
        self.double()
        if world > 1:
            self.cluster.shard(dist.group.WORLD)

    def forward(self, x, teacher, labels):
        return clusters.cluster_loss(
            self.cluster, torch.nn.functional.normalize(self.student(x)), teacher, labels
        )


def trained(rank: int, world: int, steps: range, state=None) -> tuple[dict, dict] | None:
    """The whole state after AdamW's steps from `state`, gradients clipped hard."""
    own = part(B, rank, world)
    model = wrapped = Small(world)
    if world > 1:
        ddp = torch.nn.parallel.DistributedDataParallel
        ddp._set_params_and_buffers_to_ignore_for_model(model, sharding.sharded_names(model))
        wrapped = ddp(model)
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


def resumed(folder: Path, rank: int, world: int) -> None:
    """Two steps into a checkpoint; then two more from the checkpoint of each number of ranks."""
    if (state := trained(rank, world, range(2))) is not None:
        torch.save(state, folder / "draft" / str(world))
        (folder / "draft" / str(world)).rename(folder / f"checkpoint-{world}.pt")
    for origin in (1, 2, 4):
        file = folder / f"checkpoint-{origin}.pt"
        while not file.exists():  # its processes run beside these
            time.sleep(0.05)
        state = trained(rank, world, range(2, 4), torch.load(file, weights_only=True))
        if state is not None:
            torch.save(state, folder / f"{origin}-then-{world}.pt")


def main(folder: str, rank: int, world: int) -> None:
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world
        )
    torch.save(results(rank, world), Path(folder) / f"{world}-{rank}.pt")
    resumed(Path(folder), rank, world)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
