"""CLIP-CID's instance-level distillation (arXiv 2408.09441; papers.md 1.4): NCE across modalities
and models.

    L_inst = beta NCE(teacher image, student text) + (1 - beta) NCE(student image, teacher text)

The paper gives beta = 0.5; on which of the two terms it stands is a reconstruction (at 0.5 it is
the same).
"""

from collections.abc import Callable

from torch import Tensor

from mclip.losses.contrastive import check_pair, nce


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
) -> Tensor:
    """L_inst of the module's docstring.

    Parameters
    ----------
    image, text : (b, d), the student's, unit norm
    teacher_image, teacher_text : (b, d), the teacher's, unit norm, as wide as the student's; no
        gradient
    logit_scale : scalar, already exponentiated: the student's
    beta : 0..1
    ids : (b,) int64 or None; samples with equal ids are not each other's negatives (see
        `clip_loss`)
    check_norm : refuse rows that are not of unit norm (as in `clip_loss`)
    """
    return cross(
        nce, image, text, teacher_image, teacher_text, beta, check_norm, logit_scale, ids=ids
    )


def cross(
    nce: Callable[..., Tensor],
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    beta: float,
    check_norm: bool,
    *args,
    **options,
) -> Tensor:
    """The two terms by whatever calculates NCE(A, B, *args, **options); a weight of 0 calculates
    nothing.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number from 0 to 1, found {beta}")
    check_pair(teacher_image, text, ("teacher_image", "text"), norm=check_norm)
    check_pair(image, teacher_text, ("image", "teacher_text"), norm=check_norm)
    loss = 0.0
    if beta > 0:
        loss = beta * nce(teacher_image.detach(), text, *args, **options)
    if beta < 1:
        loss = loss + (1 - beta) * nce(image, teacher_text.detach(), *args, **options)
    return loss
