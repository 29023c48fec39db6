"""CLIP's contrastive loss between pictures and captions (arXiv 2103.00020)."""

from mclip.distill import terms


class Clip(terms.Term):
    title = "CLIP's contrastive loss"
    order = 1
    per_caption = True

    @classmethod
    def factor(cls, recipe):
        """MobileCLIP's mixture: (1 - lambda) CLIP + lambda affinity."""
        return 1 - recipe.lambda_ if recipe.weight["affinity"] else 1.0

    def loss(self, batch, logit_scale):
        from mclip.losses import clip_loss

        how = {"backend": self.given.backend, "group": self.given.group}
        return clip_loss(batch["image"], batch["text"], logit_scale, ids=batch["ids"], **how)
