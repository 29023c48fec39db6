"""CLIP-KD's feature distillation (arXiv 2307.12732): the student's embeddings become the teacher's.

    L_FD = mean((image - teacher image)^2) + mean((text - teacher text)^2)

over the samples and the d numbers of unit-norm rows, as the authors' code has it. So it is
(2 - 2 cos) / d for each modality, which is why its weight in their runs is 2000.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mclip.losses.backends import gathered
from mclip.losses.common import check_pair


def feature_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    check_norm: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """CLIP-KD's feature distillation, L_FD of the module's docstring.

    Parameters
    ----------
    image, text : Tensor, shape (b, d)
        The student's unit-norm rows.
    teacher_image, teacher_text : Tensor, shape (b, d)
        The teacher's unit-norm rows, as wide as the student's; no gradient flows into them.
    check_norm : bool, default False
        Refuse rows that are not of unit norm.
    group : optional
        As in `clip_loss`.

    Returns
    -------
    Tensor, shape ()
        The mean over the batch, float32 or wider; from 0 (the same embeddings) to 8 / d.

    Raises
    ------
    ValueError
        If the shapes do not fit, the batch is empty, or rows are off the unit sphere
        (`check_norm`).

    References
    ----------
    Yang et al., "CLIP-KD: An Empirical Study of CLIP Model Distillation", arXiv 2307.12732:
    feature distillation.

    Examples
    --------
    >>> import torch
    >>> from mclip.losses import feature_loss
    >>> student = teacher = torch.eye(4)
    >>> feature_loss(student, student, teacher, teacher)
    tensor(0.)
    >>> feature_loss(-student, student, teacher, teacher)
    tensor(1.)
    """
    check_pair(image, teacher_image, ("image", "teacher_image"), norm=check_norm)
    check_pair(text, teacher_text, ("text", "teacher_text"), norm=check_norm)
    check_pair(image, text, ("image", "text"))
    rows = gathered(group, image, text, teacher_image.detach(), teacher_text.detach())
    wide = torch.promote_types(image.dtype, torch.float32)
    image, text, teacher_image, teacher_text = (x.to(wide) for x in rows)
    return F.mse_loss(image, teacher_image) + F.mse_loss(text, teacher_text)
