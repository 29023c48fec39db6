"""MobileCLIP's distillation loss: match the teachers' similarity matrices.

arXiv 2311.17049, equations 2-4:

S_g(U, V)  = row-softmax(g U V^T)
L_I2T      = (1/(bK)) sum_k KL( S_gk(teacher_k image, teacher_k text) || S_g(image, text) )
L_Distill  = (L_I2T + L_T2I) / 2,   L_T2I swaps image and text
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mclip.losses.backends import Backend, gathered, is_plain
from mclip.losses.common import check_teachers
from mclip.losses.contrastive import similarity
from mclip.losses.tiled import pairs


def affinity_loss(
    image: Tensor,
    text: Tensor,
    teachers: Sequence[tuple[Tensor, Tensor, Tensor | float]],
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    check_norm: bool = False,
    backend: Backend = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """MobileCLIP's affinity mimicking, L_Distill of the module's docstring.

    Parameters
    ----------
    image, text : Tensor, shape (b, d)
        The student's unit-norm rows; row i of both is pair i.
    teachers : sequence of (Tensor, Tensor, float)
        K tuples: image rows (b, d_k), text rows (b, d_k), logit scale g_k. Rows of unit norm, of
        any width; no gradient flows into them.
    logit_scale : Tensor or float
        Scalar g, the student's, already exponentiated.
    ids : Tensor of int64, shape (b,), optional
        Taken so that all losses are called alike, and not used: the targets are soft, and samples
        that share a caption already share its probability in the teacher's matrix.
    check_norm : bool, default False
        Refuse rows that are not of unit norm, the teachers' too.
    backend, group : optional
        As in `clip_loss`.

    Returns
    -------
    Tensor, shape ()
        Not below 0, as each KL is a divergence; 0 where the student's matrix equals every
        teacher's.

    Raises
    ------
    ValueError
        If there is no teacher, the shapes do not fit, the batch is empty, rows are off the unit
        sphere (`check_norm`), or the backend is unknown or can't run here.

    See Also
    --------
    mclip.losses.tiled.pairs.affinity_loss : the tiled form by itself, with the size of its tiles.

    References
    ----------
    Vasu et al., "MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training",
    arXiv 2311.17049, equations 2-4.

    Examples
    --------
    >>> import torch
    >>> from mclip.losses import affinity_loss
    >>> student, teacher = torch.eye(4), torch.eye(4)
    >>> affinity_loss(student, student, [(teacher, teacher, 10.0)], 10.0)
    tensor(0.)
    >>> affinity_loss(student, student.flip(0), [(teacher, teacher, 10.0)], 10.0) > 9
    tensor(True)
    """
    if not is_plain(backend, len(image), group):
        options: dict[str, Any] = {"check_norm": check_norm, "backend": backend, "group": group}
        return pairs.affinity_loss(image, text, teachers, logit_scale, **options)
    image, text = gathered(group, image, text)
    teachers = [(*gathered(group, u, v), g) for u, v, g in teachers]  # type: ignore[misc]
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
