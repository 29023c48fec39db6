"""A recipe's whole loss (papers.md 1.5 and 2.2), over the batch of all processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mclip.distill import terms
from mclip.losses.backends import gathered
from mclip.params import Recipe, Train


class Objective(nn.Module):
    """A recipe's loss, with the parameters that only training needs: W and projections.

        L = sum of w L over the terms and, where one is `per_caption`, true and synthetic captions

    w is the recipe's weight times `Term.factor`; terms of weight zero are neither made nor
    computed.

    Parameters
    ----------
    recipe : Recipe
    student_dim : int
    ensemble, centres, seed
        As in `terms.Given`.
    backend : {"auto", "plain", "tiled", "triton"}, default "plain"
        Of the losses. Over several processes plain has each rank gather the whole batch and
        calculate its whole loss; the others share the work and the memory between the ranks, W's
        rows included.
    """

    def __init__(
        self,
        recipe: Recipe,
        student_dim: int,
        *,
        ensemble: list[dict] | None = None,
        centres: torch.Tensor | None = None,
        seed: int = 0,
        backend: str = "plain",
    ):
        super().__init__()
        several = dist.is_initialized() and dist.get_world_size() > 1
        group, plain = dist.group.WORLD if several else None, backend == "plain"
        self.recipe, self.gather_over = recipe, group if plain else None
        given = terms.Given(
            student_dim, ensemble or [], centres, seed, backend, None if plain else group
        )
        self.terms: dict[str, terms.Term] = {}
        self.weights: dict[str, float] = {}
        self.learned = nn.ModuleDict()
        for name, term in terms.every().items():
            if weight := recipe.weight[name] * term.factor(recipe):
                self.weights[name] = weight
                self.terms[name] = term(getattr(recipe, name, None), given)
                if (learned := self.terms[name].learned) is not None:
                    self.learned[name] = learned

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
        f = dict(zip(f, gathered(self.gather_over, *f.values()), strict=True))
        captions: dict[str, dict[str, Any]] = {"": f}
        if self.recipe.synthetic:
            of_caption = {"text": "syn_text", "ids": "syn_ids", "ensemble_text": "ensemble_syn"}
            captions["_syn"] = f | {name: f[synthetic] for name, synthetic in of_caption.items()}
        if not self.recipe.multi_positive:
            captions = {suffix: batch | {"ids": None} for suffix, batch in captions.items()}
        out = {}
        for suffix, batch in captions.items():
            for name, term in self.terms.items():
                if term.per_caption:
                    out[name + suffix] = self.weights[name] * term.loss(batch, logit_scale)
        for name, term in self.terms.items():
            if not term.per_caption:
                out[name] = self.weights[name] * term.loss(captions[""], logit_scale)
        return out

    def learning_rates(self, train: Train) -> dict[str, float]:
        """Highest learning rates of the parameters that have one of their own, by name."""
        return {
            f"learned.{name}.{parameter}": peak
            for name, term in self.terms.items()
            for parameter, peak in term.learning_rates(train).items()
        }

    def generators(self) -> list[torch.Generator]:
        """The generators that its terms draw random numbers from."""
        return [
            g for m in self.modules() for g in vars(m).values() if isinstance(g, torch.Generator)
        ]
