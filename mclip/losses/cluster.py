"""CLIP-CID's cluster-level distillation (arXiv 2408.09441; papers.md 1.3).

W (k, d) is a fully connected layer that starts as the cluster centres. Omega is the batch's
positive centres plus a random fraction r of the others (PartialFC, arXiv 2203.15565). With s_i, t_i
the student's and the teacher's unit-norm image embeddings and y_i the sample's cluster:

    L_CD      = -(1/b) sum_i log( exp(g w_yi.s_i) / sum_{j in Omega} exp(g w_j.s_i) )
    L_KL      = (1/b) sum_i KL( softmax_Omega(W t_i / tau) || softmax_Omega(W s_i / tau) )
    L_cluster = (1 - alpha) L_CD + alpha L_KL      reading "convex"   (reconstruction)
              =             L_CD + alpha L_KL      reading "additive" (reconstruction)

The paper gives alpha = 0.999; L_KL's form, g, tau and r are reconstructions or not known.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mclip.losses.backends import Backend, is_plain
from mclip.losses.common import check_pair, check_unit, part
from mclip.losses.contrastive import similarity
from mclip.losses.tiled import clusters


class ClusterLoss(nn.Module):
    """CLIP-CID's cluster discrimination, L_cluster of the module's docstring.

    Owns W and, where the student's width is not d, the student's projection.

    Parameters
    ----------
    centres : Tensor, shape (k, d)
        Unit-norm rows; W's first value. Anything else makes training collapse, says the paper.
    sample_rate : float, default 0.1
        Fraction r of the other centres, in (0, 1]; 1 uses all. In `eval()` all centres are
        used and nothing is drawn.
    alpha : float, default 0.999
        Weight of L_KL, 0 to 1.
    reading : {"convex", "additive"}, default "convex"
        Where alpha stands.
    scale : float, default 20
        Factor g of L_CD.
    tau : float, optional
        Temperature of L_KL; None: 1 / scale, so that both terms look at the same logits.
    student_dim : int, optional
        The student's width; where it differs from d a learned linear map (no bias) takes the
        student's embedding to d, and the result is normalised again.
    normalise : bool, default False
        Keep W's rows at unit norm in the product (PartialFC does); False takes the formula by the
        letter: rows start at unit norm and may then grow.
    teacher_grad : bool, default False
        Let L_KL's target W t_i carry gradient into W; False: it is a fixed target, so that
        flattening W is no way to make both sides alike.
    check_norm : bool, default False
        Refuse samples, student's or teacher's, that are not of unit norm.
    seed : int, default 0
        Of the generator that draws Omega; its state is part of `state_dict()`: a resumed run draws
        the same.
    backend : {"auto", "plain", "tiled", "triton"}, default "auto"
        "plain" holds whole (b, r k) matrices and a copy of the sampled rows of W; "tiled" and
        "triton" (CUDA) take memory linear in b, for the same value, gradients and draws. "auto" as
        in `clip_loss`; where W is spread over ranks (`shard`) never plain.

    Attributes
    ----------
    weight : nn.Parameter, shape (k, d)
        W; after `shard` this rank's rows.

    Raises
    ------
    ValueError
        If an option is out of range or `centres` is no (k, d) matrix; by a call, if the shapes do
        not fit, the batch is empty, a label is none of the clusters, rows are off the unit sphere
        (`check_norm`) or the backend can't run here.

    See Also
    --------
    mclip.losses.tiled.clusters.cluster_loss : the tiled form by itself, with the size of its tiles.

    References
    ----------
    Yang et al., "CLIP-CID: Efficient CLIP Distillation via Cluster-Instance Discrimination",
    arXiv 2408.09441: cluster-level distillation. An et al., "Killing Two Birds with One Stone:
    Efficient and Robust Training of Face Recognition CNNs by Partial FC", arXiv 2203.15565.

    Examples
    --------
    >>> import torch
    >>> from mclip.losses import ClusterLoss
    >>> centres = torch.eye(3)
    >>> loss = ClusterLoss(centres, sample_rate=1.0, alpha=0.5)
    >>> right, wrong = torch.tensor([0, 1]), torch.tensor([1, 2])
    >>> bool(loss(centres[:2], centres[:2], right) < loss(centres[:2], centres[:2], wrong))
    True
    """

    def __init__(
        self,
        centres: Tensor,
        sample_rate: float = 0.1,
        alpha: float = 0.999,
        reading: str = "convex",
        scale: float = 20.0,
        *,
        tau: float | None = None,
        student_dim: int | None = None,
        normalise: bool = False,
        teacher_grad: bool = False,
        check_norm: bool = False,
        seed: int = 0,
        backend: Backend = "auto",
    ):
        super().__init__()
        centres = torch.as_tensor(centres)
        if centres.ndim != 2 or 0 in centres.shape:
            raise ValueError(
                f"centres: expected shape (clusters, width), found {tuple(centres.shape)}"
            )
        if not 0 < sample_rate <= 1:
            raise ValueError(
                f"sample_rate: expected a number above 0 and at most 1, found {sample_rate}"
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, found {alpha}")
        if reading not in ("convex", "additive"):
            raise ValueError(f"reading: expected 'convex' or 'additive', found {reading!r}")
        if scale <= 0 or (tau is not None and tau <= 0):
            raise ValueError(f"scale and tau must be above 0, found scale {scale}, tau {tau}")
        is_plain(backend, 0)  # refuses an unknown one
        self.weight = nn.Parameter(centres.detach().clone())
        self.clusters, self.first = len(centres), 0
        self.group: dist.ProcessGroup | None = None  # until `shard`: all rows are here
        width = centres.shape[1]
        self.project = (
            None if student_dim in (None, width) else nn.Linear(student_dim, width, bias=False)
        )
        self.sample_rate, self.alpha, self.reading = sample_rate, alpha, reading
        self.scale, self.tau = scale, 1 / scale if tau is None else tau
        self.normalise, self.teacher_grad, self.check_norm = normalise, teacher_grad, check_norm
        self.generator, self.backend = torch.Generator().manual_seed(seed), backend

    def shard(self, group: dist.ProcessGroup) -> "ClusterLoss":
        """Keep this rank's part of W only: rows `first` to `first + len(weight)`, contiguous, by
        rank.

        Each rank then gives its rows of the batch, all equally many, and gets the whole batch's
        loss; gradients are as in `clip_loss`, but that of W's part, which has no other rank to be
        averaged with, is that of one process as it stands. Omega does not depend on the number of
        ranks. `weight` is a new parameter, for an optimizer made after this call. DDP must leave it
        alone.
        """
        if self.backend == "plain":
            raise ValueError("backend 'plain' has all of W: W can't be spread over ranks")
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        self.first = part(self.clusters, rank, world).start
        self.weight = nn.Parameter(self.weight.detach()[part(self.clusters, rank, world)].clone())
        self.group = group
        return self

    def forward(self, image: Tensor, teacher_image: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Parameters
        ----------
        image : Tensor, shape (b, d or student_dim)
            The student's unit-norm rows.
        teacher_image : Tensor, shape (b, d)
            The teacher's unit-norm rows; no gradient flows into them.
        labels : Tensor of int64, shape (b,)
            Each sample's cluster, 0 to k - 1.

        Returns
        -------
        Tensor, shape ()
            The mean over the batch, float32 or wider.
        """
        if self.group is None and is_plain(self.backend, len(image)):
            return self._plain(image, teacher_image, labels)
        return clusters.cluster_loss(self, image, teacher_image, labels, backend=self.backend)

    def _plain(self, image: Tensor, teacher_image: Tensor, labels: Tensor) -> Tensor:
        """On whole matrices."""
        image = self.projected(image, teacher_image, labels)
        omega = self.sample(labels)
        w = self.weight if omega is None else self.weight[omega]
        w = F.normalize(w, dim=1) if self.normalise else w
        position = labels if omega is None else torch.searchsorted(omega, labels)

        student = similarity(image, w, 1.0)
        teacher = similarity(teacher_image.detach(), w if self.teacher_grad else w.detach(), 1.0)
        discrimination = F.cross_entropy(self.scale * student, position)
        distribution = F.kl_div(
            F.log_softmax(student / self.tau, 1),
            F.log_softmax(teacher / self.tau, 1),
            reduction="batchmean",
            log_target=True,
        )
        return self.weights[0] * discrimination + self.weights[1] * distribution

    @property
    def weights(self) -> tuple[float, float]:
        """Of L_CD and of L_KL."""
        return (1 - self.alpha if self.reading == "convex" else 1.0), self.alpha

    def projected(self, image: Tensor, teacher_image: Tensor, labels: Tensor) -> Tensor:
        """The student's rows as wide as the centres, once all arguments of `forward` are found to
        fit.
        """
        self._check_labels(labels, len(image))
        if self.project is not None:
            if image.ndim != 2 or image.shape[1] != self.project.in_features:
                raise ValueError(
                    f"image: expected width student_dim = {self.project.in_features}, "
                    f"found {tuple(image.shape)}"
                )
            if self.check_norm:
                check_unit(image, "image")
            image = F.normalize(self.project(image), dim=1)
        check_pair(image, teacher_image, ("image", "teacher_image"), norm=self.check_norm)
        if image.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"image is {image.shape[1]} wide, the cluster centres {self.weight.shape[1]}: "
                "give student_dim so that the student is projected"
            )
        return image

    def sample(self, labels: Tensor) -> Tensor | None:
        """Omega as sorted cluster indices: every positive, and round(r * others) of the others.

        None: all centres.
        """
        if self.sample_rate == 1 or not self.training:
            return None
        positive = labels.unique().cpu()
        # every cluster draws a number; positives are always in, of the others the largest numbers
        # win
        draw = torch.rand(self.clusters, generator=self.generator)
        draw[positive] = 2.0
        count = len(positive) + round(self.sample_rate * (self.clusters - len(positive)))
        return draw.topk(count).indices.sort().values.to(labels.device)

    @property
    def sharded(self) -> dict[str, int]:
        """Parameters of which this rank has a `part` of the rows only, with the number of all."""
        return {} if self.group is None else {"weight": self.clusters}

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())

    def _check_labels(self, labels: Tensor, size: int) -> None:
        if size == 0:
            raise ValueError("image: the batch is empty")
        if labels.shape != (size,) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels: expected shape ({size},) int64, "
                f"found {tuple(labels.shape)} {labels.dtype}"
            )
        low, high = (int(v) for v in labels.aminmax())
        if low < 0 or high >= self.clusters:
            bad = low if low < 0 else high
            raise ValueError(
                f"labels: cluster {bad} is out of range, there are {self.clusters} centres "
                f"(0 to {self.clusters - 1}); are labels and centres of one `cluster` run?"
            )
