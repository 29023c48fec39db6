"""MobileCLIP's distillation of similarity matrices (arXiv 2311.17049; papers.md 2.2)."""

from mclip.distill import terms


class Affinity(terms.Term):
    title = "MobileCLIP's affinity mimicking"
    order = 4
    needs = frozenset({"ensemble"})
    per_caption = True

    @classmethod
    def factor(cls, recipe):
        """MobileCLIP's mixture: (1 - lambda) CLIP + lambda affinity."""
        return recipe.lambda_

    def loss(self, batch, logit_scale):
        from mclip.losses import affinity_loss

        teachers = []
        for teacher in self.given.ensemble:
            own = slice(*teacher["slice"])
            image, text = batch["ensemble_image"][:, own], batch["ensemble_text"][:, own]
            teachers.append((image, text, teacher["logit_scale"]))
        how = {"backend": self.given.backend, "group": self.given.group}
        return affinity_loss(batch["image"], batch["text"], teachers, logit_scale, **how)
