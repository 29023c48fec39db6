"""MobileCLIP's distillation of similarity matrices (arXiv 2311.17049; papers.md 2.2)."""

from pydantic import PositiveFloat

from mclip.distill import terms


class Options(terms.Options):
    """The teachers' logit scales g_k, by which the targets are sharper or softer (papers.md 2.8).

    scale : one for every teacher of the ensemble, or one for each that is named; a teacher without
        one has its own, which it was trained with.
    """

    scale: PositiveFloat | dict[str, PositiveFloat] | None = None


class Affinity(terms.Term):
    title = "MobileCLIP's affinity mimicking"
    order = 4
    options = Options
    needs = frozenset({"ensemble"})
    per_caption = True

    @classmethod
    def factor(cls, recipe):
        """MobileCLIP's mixture: (1 - lambda) CLIP + lambda affinity."""
        return recipe.lambda_

    def scale(self, teacher: dict) -> float:
        """The logit scale of one of the ensemble."""
        chosen = self.chosen.scale
        if isinstance(chosen, dict):
            chosen = chosen.get(teacher["name"])
        return teacher["logit_scale"] if chosen is None else chosen

    def loss(self, batch, logit_scale):
        from mclip.losses import affinity_loss

        teachers = []
        for teacher in self.given.ensemble:
            own = slice(*teacher["slice"])
            image, text = batch["ensemble_image"][:, own], batch["ensemble_text"][:, own]
            teachers.append((image, text, self.scale(teacher)))
        how = {"backend": self.given.backend, "group": self.given.group}
        return affinity_loss(batch["image"], batch["text"], teachers, logit_scale, **how)
