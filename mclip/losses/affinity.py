"""MobileCLIP's distillation loss (arXiv 2311.17049, equations 2-4): match the teachers' similarity
matrices.

S_g(U, V)  = row-softmax(g U V^T)
L_I2T      = (1/(bK)) sum_k KL( S_gk(teacher_k image, teacher_k text) || S_g(image, text) )
L_Distill  = (L_I2T + L_T2I) / 2,   L_T2I swaps image and text
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from mclip.losses.contrastive import check_pair, similarity


def affinity_loss(
    image: Tensor,
    text: Tensor,
    teachers: Sequence[tuple[Tensor, Tensor, Tensor | float]],
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    check_norm: bool = False,
) -> Tensor:
    """L_Distill of the module's docstring.

    Parameters
    ----------
    image, text : (b, d), the student's, unit norm
    teachers : K tuples (image (b, d_k), text (b, d_k), logit scale g_k); unit norm, any width; no
        gradient
    logit_scale : scalar g, already exponentiated: the student's
    ids : taken so that all losses are called alike, and not used: the targets are soft, and samples
        that share a caption already share its probability in the teacher's matrix.
    check_norm : refuse rows that are not of unit norm, the teachers' too (as in `clip_loss`)

    Each KL is a divergence, so the loss is >= 0 and 0 where the student's matrix equals every
    teacher's.
    """
    check_teachers(image, text, teachers, norm=check_norm)
    logits = similarity(image, text, logit_scale)
    student = F.log_softmax(logits, 1), F.log_softmax(logits.T, 1)
    total = logits.new_zeros(())
    for teacher_image, teacher_text, teacher_scale in teachers:
        target = similarity(teacher_image, teacher_text, teacher_scale).detach()
        for log_student, log_target in zip(student, (target, target.T), strict=True):
            total = total + F.kl_div(
                log_student, F.log_softmax(log_target, 1), reduction="batchmean", log_target=True
            )
    return total / (2 * len(teachers))


def check_teachers(
    image: Tensor,
    text: Tensor,
    teachers: Sequence[tuple[Tensor, Tensor, Tensor | float]],
    *,
    norm: bool = False,
) -> None:
    """ValueError unless image and text are pairs, and each teacher's are pairs of as many rows."""
    if not teachers:
        raise ValueError("teachers: at least one (image, text, logit scale) is needed")
    check_pair(image, text, ("image", "text"), norm=norm)
    for k, (teacher_image, teacher_text, _) in enumerate(teachers):
        check_pair(
            teacher_image, teacher_text, (f"teachers[{k}] image", f"teachers[{k}] text"), norm=norm
        )
        if len(teacher_image) != len(image):
            raise ValueError(
                f"teachers[{k}] has {len(teacher_image)} rows, the student's batch {len(image)}"
            )
