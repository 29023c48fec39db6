"""CLIP-CID's cluster discrimination and distribution (arXiv 2408.09441; papers.md 1.3)."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from mclip.distill import terms


class Options(terms.Options):
    """Of `mclip.losses.ClusterLoss`."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.999
    reading: Literal["convex", "additive"] = "convex"
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    scale: PositiveFloat = 20.0


class Cluster(terms.Term):
    title = "CLIP-CID's cluster discrimination"
    order = 2
    options = Options
    needs = frozenset({"teacher", "label"})

    def build(self):
        from mclip.losses import ClusterLoss

        given = self.given
        loss = ClusterLoss(
            given.centres,
            **self.chosen.model_dump(),
            student_dim=given.student_dim,
            seed=given.seed,
            backend=given.backend,
        )
        return loss if given.group is None else loss.shard(given.group)

    def learning_rates(self, train):
        """W has a learning rate of its own (papers.md 1.3)."""
        return {"weight": train.lr_centres}

    def loss(self, batch, logit_scale):
        return self.learned(batch["image"], batch["teacher_image"], batch["label"])  # type: ignore[misc]
