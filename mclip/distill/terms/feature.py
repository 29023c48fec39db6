"""CLIP-KD's feature distillation (arXiv 2307.12732; papers.md 4), whose weight there is 2000."""

from mclip.distill import terms


class Feature(terms.Term):
    title = "CLIP-KD's feature distillation"
    order = 5
    needs = frozenset({"teacher"})

    def build(self):
        """Where the teacher is wider or narrower than the student, learned linear maps take the
        student's embeddings to the teacher's width.
        """
        from torch import nn

        ours, theirs = self.given.student_dim, self.given.centres.shape[1]
        if ours == theirs:
            return None
        return nn.ModuleDict({name: nn.Linear(ours, theirs) for name in ("to_image", "to_text")})

    def loss(self, batch, logit_scale):
        from torch.nn import functional as F

        from mclip.losses import feature_loss

        image, text = batch["image"], batch["text"]
        if self.learned is not None:
            image = F.normalize(self.learned["to_image"](image), dim=-1)
            text = F.normalize(self.learned["to_text"](text), dim=-1)
        teacher = batch["teacher_image"], batch["teacher_text"]
        return feature_loss(image, text, *teacher, group=self.given.group)
