"""A recipe's whole loss (papers.md 1.5 and 2.2), over the batch of all processes."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from mclip.losses.affinity import affinity_loss
from mclip.losses.cluster import ClusterLoss
from mclip.losses.contrastive import clip_loss
from mclip.losses.instance import instance_loss
from mclip.losses.tiled import clusters, torch_tiles
from mclip.losses.tiled import pairs as tiled
from mclip.losses.tiled.tiles import backend
from mclip.params import Recipe

# batch from which tiles take less time than whole matrices (benchmarks/losses.md)
TILED_FROM = 1024


class Objective(nn.Module):
    """A recipe's loss (papers.md 1.5 and 2.2), with the parameters that only training needs: W and
    projections.

        L = sum over true and synthetic captions of [ c L_CLIP + lambda w_affinity L_Distill ]
            + w_cluster L_cluster + w_instance L_inst,    c = (1 - lambda) w_clip with affinity, w_clip without

    Terms of weight zero are not computed. Where the teacher is wider or narrower than the student,
    learned linear maps take the student's embeddings to the teacher's width (reconstruction).

    kernel : "plain" | "tiled" | "triton" (`chosen`). Over several processes plain has each rank
        gather the whole batch and calculate its whole loss; the others share the work and the
        memory between the ranks, W's rows included.
    """

    def __init__(
        self,
        recipe: Recipe,
        student_dim: int,
        *,
        ensemble: list[dict] | None = None,
        centres: torch.Tensor | None = None,
        seed: int = 0,
        kernel: str = "plain",
    ):
        super().__init__()
        self.clip_loss, self.affinity_loss, self.instance_loss = (
            clip_loss,
            affinity_loss,
            instance_loss,
        )
        self.tiles, several = None, dist.is_initialized() and dist.get_world_size() > 1
        if kernel != "plain":
            self.tiles = {"backend": "triton" if kernel == "triton" else "tiled"}
            how = self.tiles | {"group": dist.group.WORLD if several else None}
            self.clip_loss, self.affinity_loss, self.instance_loss = (
                partial(f, **how)
                for f in (tiled.clip_loss, tiled.affinity_loss, tiled.instance_loss)
            )
        self.recipe, self.ensemble = recipe, ensemble or []
        w = recipe.weight
        self.w_affinity = w.affinity * recipe.lambda_
        self.w_clip = w.clip * (1 - recipe.lambda_ if w.affinity else 1.0)
        self.cluster = self.to_image = self.to_text = None
        if w.cluster or w.instance:
            width = centres.shape[1]
            if w.cluster:
                c = recipe.cluster
                self.cluster = ClusterLoss(
                    centres,
                    c.sample_rate,
                    c.alpha,
                    c.reading,
                    c.scale,
                    student_dim=student_dim,
                    seed=seed,
                )
                if self.tiles and several:
                    self.cluster.shard(dist.group.WORLD)
            if w.instance and width != student_dim:
                self.to_image = nn.Linear(student_dim, width, bias=False)
                self.to_text = nn.Linear(student_dim, width, bias=False)

    def forward(
        self, f: dict[str, torch.Tensor], logit_scale: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """This rank's features and side -> the whole batch's weighted terms by name; their sum is
        the loss.

        Gradients are such that their mean over ranks, as DDP takes it, is that of one process with
        the whole batch.

        f : image, text (b, d) unit norm, and as the recipe needs syn_text, ids, syn_ids, label,
            teacher_image, teacher_text, ensemble_image, ensemble_text, ensemble_syn.
        """
        f = gather(f) if self.tiles is None else f
        r, out = self.recipe, {}
        captions = [("text", "ids", "ensemble_text", "")]
        if r.synthetic:
            captions.append(("syn_text", "syn_ids", "ensemble_syn", "_syn"))
        for text, ids, target, suffix in captions:
            if self.w_clip:
                ids_ = f[ids] if r.multi_positive else None
                out[f"clip{suffix}"] = self.w_clip * self.clip_loss(
                    f["image"], f[text], logit_scale, ids=ids_
                )
            if self.w_affinity:
                teachers = [
                    (
                        f["ensemble_image"][:, slice(*t["slice"])],
                        f[target][:, slice(*t["slice"])],
                        t["logit_scale"],
                    )
                    for t in self.ensemble
                ]
                loss = self.affinity_loss(f["image"], f[text], teachers, logit_scale)
                out[f"affinity{suffix}"] = self.w_affinity * loss
        if self.cluster is not None:
            cluster_loss = self.cluster
            if self.tiles is not None:
                cluster_loss = partial(clusters.cluster_loss, self.cluster, **self.tiles)
            out["cluster"] = r.weight.cluster * cluster_loss(
                f["image"], f["teacher_image"], f["label"]
            )
        if r.weight.instance:
            image, text = f["image"], f["text"]
            if self.to_image is not None:
                image = F.normalize(self.to_image(image), dim=-1)
                text = F.normalize(self.to_text(text), dim=-1)
            out["instance"] = r.weight.instance * self.instance_loss(
                image,
                text,
                f["teacher_image"],
                f["teacher_text"],
                logit_scale,
                r.instance.beta,
                ids=f["ids"] if r.multi_positive else None,
            )
        return out


def chosen(kernel: str, batch_size: int, device: torch.device) -> str:
    """What `distill.train.loss_kernel` comes to: auto is plain for a small batch, else triton on
    CUDA, else tiled.
    """
    if kernel != "auto":
        return kernel
    if batch_size < TILED_FROM:
        return "plain"
    return "tiled" if backend("auto", device) is torch_tiles else "triton"


def gather(f: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor of all ranks, concatenated; gradients flow back to the rank that made the row.

    Each rank then computes the whole batch's loss: with DDP's averaging the gradient is that of one
    process.
    """
    if not dist.is_initialized():
        return f
    from torch.distributed.nn.functional import all_gather

    # all_gather's backward adds up the ranks' equal gradients and DDP averages: together a factor
    # of one
    return {
        k: torch.cat(all_gather(v.contiguous())) if v.requires_grad else _gather_plain(v)
        for k, v in f.items()
    }


def _gather_plain(v: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(v) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, v.contiguous())
    return torch.cat(parts)
