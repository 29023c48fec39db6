"""A recipe's whole loss (papers.md 1.5 and 2.2), over the batch of all processes."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from ..params import Recipe
from .affinity import affinity_loss
from .cluster import ClusterLoss
from .contrastive import clip_loss
from .instance import instance_loss


class Objective(nn.Module):
    """A recipe's loss (papers.md 1.5 and 2.2), with the parameters that only training needs: W and projections.

        L = sum over true and synthetic captions of [ c L_CLIP + lambda w_affinity L_Distill ]
            + w_cluster L_cluster + w_instance L_inst,    c = (1 - lambda) w_clip with affinity, w_clip without

    Terms of weight zero are not computed. Where the teacher is wider or narrower than the student, learned linear
    maps take the student's embeddings to the teacher's width (reconstruction).
    """

    def __init__(self, recipe: Recipe, student_dim: int, *, ensemble: list[dict] | None = None,
                 centres: torch.Tensor | None = None, seed: int = 0):
        super().__init__()
        self.recipe, self.ensemble = recipe, ensemble or []
        w = recipe.weight
        self.w_affinity = w.affinity * recipe.lambda_
        self.w_clip = w.clip * (1 - recipe.lambda_ if w.affinity else 1.0)
        self.cluster = self.to_image = self.to_text = None
        if w.cluster or w.instance:
            width = centres.shape[1]
            if w.cluster:
                c = recipe.cluster
                self.cluster = ClusterLoss(centres, c.sample_rate, c.alpha, c.reading, c.scale,
                                           student_dim=student_dim, seed=seed)
            if w.instance and width != student_dim:
                self.to_image = nn.Linear(student_dim, width, bias=False)
                self.to_text = nn.Linear(student_dim, width, bias=False)

    def forward(self, f: dict[str, torch.Tensor], logit_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features and side of the whole batch -> the weighted terms by name; their sum is the loss.

        f : image, text (b, d) unit norm, and as the recipe needs syn_text, ids, syn_ids, label, teacher_image,
            teacher_text, ensemble_image, ensemble_text, ensemble_syn.
        """
        r, out = self.recipe, {}
        captions = [("text", "ids", "ensemble_text", "")]
        if r.synthetic:
            captions.append(("syn_text", "syn_ids", "ensemble_syn", "_syn"))
        for text, ids, target, suffix in captions:
            if self.w_clip:
                ids_ = f[ids] if r.multi_positive else None
                out[f"clip{suffix}"] = self.w_clip * clip_loss(f["image"], f[text], logit_scale, ids=ids_)
            if self.w_affinity:
                teachers = [(f["ensemble_image"][:, slice(*t["slice"])], f[target][:, slice(*t["slice"])],
                             t["logit_scale"]) for t in self.ensemble]
                loss = affinity_loss(f["image"], f[text], teachers, logit_scale)
                out[f"affinity{suffix}"] = self.w_affinity * loss
        if self.cluster is not None:
            out["cluster"] = r.weight.cluster * self.cluster(f["image"], f["teacher_image"], f["label"])
        if r.weight.instance:
            image, text = f["image"], f["text"]
            if self.to_image is not None:
                image = F.normalize(self.to_image(image), dim=-1)
                text = F.normalize(self.to_text(text), dim=-1)
            out["instance"] = r.weight.instance * instance_loss(
                image, text, f["teacher_image"], f["teacher_text"], logit_scale, r.instance.beta,
                ids=f["ids"] if r.multi_positive else None)
        return out


def gather(f: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor of all ranks, concatenated; gradients flow back to the rank that made the row.

    Each rank then computes the whole batch's loss: with DDP's averaging the gradient is that of one process.
    """
    if not dist.is_initialized():
        return f
    from torch.distributed.nn.functional import all_gather

    # all_gather's backward adds up the ranks' equal gradients and DDP averages: together a factor of one
    return {k: torch.cat(all_gather(v.contiguous())) if v.requires_grad else _gather_plain(v) for k, v in f.items()}


def _gather_plain(v: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(v) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, v.contiguous())
    return torch.cat(parts)
