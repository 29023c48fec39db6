"""CLIP-CID's instance discrimination (arXiv 2408.09441; papers.md 1.4)."""

from typing import Annotated

from pydantic import Field, PositiveFloat

from mclip.distill import terms


class Options(terms.Options):
    """Of `mclip.losses.instance_loss`, and the temperature against the teacher.

    scale : the logit scale of the student's similarities to the teacher, fixed; None: the one that
        the student learns for its own similarities.
    """

    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    scale: PositiveFloat | None = None


class Instance(terms.Term):
    title = "CLIP-CID's instance discrimination"
    order = 3
    options = Options
    needs = frozenset({"teacher"})

    def build(self):
        """Where the teacher is wider or narrower than the student, learned linear maps take the
        student's embeddings to the teacher's width (reconstruction).
        """
        from torch import nn

        ours, theirs = self.given.student_dim, self.given.centres.shape[1]
        if ours == theirs:
            return None
        return nn.ModuleDict(
            {name: nn.Linear(ours, theirs, bias=False) for name in ("to_image", "to_text")}
        )

    def loss(self, batch, logit_scale):
        from torch.nn import functional as F

        from mclip.losses import instance_loss

        image, text = batch["image"], batch["text"]
        if self.learned is not None:
            image = F.normalize(self.learned["to_image"](image), dim=-1)
            text = F.normalize(self.learned["to_text"](text), dim=-1)
        return instance_loss(
            image,
            text,
            batch["teacher_image"],
            batch["teacher_text"],
            logit_scale if self.chosen.scale is None else self.chosen.scale,
            self.chosen.beta,
            ids=batch["ids"],
            backend=self.given.backend,
            group=self.given.group,
        )
