"""CLIP-CID's instance-level distillation (arXiv 2408.09441; papers.md 1.4): NCE across modalities
and models.

    L_inst = beta NCE(teacher image, student text) + (1 - beta) NCE(student image, teacher text)

The paper gives beta = 0.5; on which of the two terms it stands is a reconstruction (at 0.5 it is
the same).
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from mclip.losses.backends import Backend, gathered, is_plain
from mclip.losses.common import cross
from mclip.losses.contrastive import nce
from mclip.losses.tiled import pairs


def instance_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    logit_scale: Tensor | float,
    beta: float = 0.5,
    *,
    ids: Tensor | None = None,
    check_norm: bool = False,
    backend: Backend = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """CLIP-CID's instance discrimination, L_inst of the module's docstring.

    Parameters
    ----------
    image, text : Tensor, shape (b, d)
        The student's unit-norm rows; row i of both is pair i.
    teacher_image, teacher_text : Tensor, shape (b, d)
        The teacher's unit-norm rows, as wide as the student's; no gradient flows into them.
    logit_scale : Tensor or float
        Scalar, the student's, already exponentiated.
    beta : float, default 0.5
        Weight of the teacher's images against the student's texts, 0 to 1.
    ids : Tensor of int64, shape (b,), optional
        Samples with the same id are not each other's negatives (see `clip_loss`).
    check_norm : bool, default False
        Refuse rows that are not of unit norm.
    backend, group : optional
        As in `clip_loss`.

    Returns
    -------
    Tensor, shape ()
        The mean over the batch, float32 or wider.

    Raises
    ------
    ValueError
        If beta is out of range, the shapes do not fit, the batch is empty, rows are off the unit
        sphere (`check_norm`), or the backend is unknown or can't run here.

    See Also
    --------
    mclip.losses.tiled.pairs.instance_loss : the tiled form by itself, with the size of its tiles.

    References
    ----------
    Yang et al., "CLIP-CID: Efficient CLIP Distillation via Cluster-Instance Discrimination",
    arXiv 2408.09441: instance-level distillation.

    Examples
    --------
    >>> import torch
    >>> from mclip.losses import clip_loss, instance_loss
    >>> student, teacher = torch.eye(4), torch.eye(4)
    >>> loss = instance_loss(student, student, teacher, teacher, 10.0)
    >>> bool(loss == clip_loss(student, teacher, 10.0))
    True
    """
    if is_plain(backend, len(image), group):
        image, text, teacher_image, teacher_text = gathered(
            group, image, text, teacher_image, teacher_text
        )
        (ids,) = gathered(group, ids)
        return cross(
            nce, image, text, teacher_image, teacher_text, beta, check_norm, logit_scale, ids=ids
        )
    options: dict[str, Any] = {"check_norm": check_norm, "backend": backend, "group": group}
    return pairs.instance_loss(
        image, text, teacher_image, teacher_text, logit_scale, beta, ids=ids, **options
    )
