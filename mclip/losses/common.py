"""Argument checks and small arithmetic that the plain and the tiled losses share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def check_ids(ids: Tensor | None, size: int) -> None:
    """ValueError unless ids is None or has one id for each of `size` samples."""
    if ids is not None and ids.shape != (size,):
        raise ValueError(
            f"ids: expected one id a sample, shape ({size},), found {tuple(ids.shape)}"
        )


def check_pair(a: Tensor, b: Tensor, names: tuple[str, str], *, norm: bool = False) -> None:
    """ValueError that names the arguments unless both are (b, d) with the same b > 0 and d (and of
    unit norm).
    """
    for tensor, name in zip((a, b), names, strict=True):
        if tensor.ndim != 2:
            raise ValueError(
                f"{name}: expected embeddings of shape (batch, width), found {tuple(tensor.shape)}"
            )
    if len(a) == 0:
        raise ValueError(f"{names[0]}: the batch is empty")
    if len(a) != len(b):
        raise ValueError(
            f"{names[0]} has {len(a)} rows, {names[1]} has {len(b)}: they must be pairs"
        )
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{names[0]} is {a.shape[1]} wide, {names[1]} is {b.shape[1]}: "
            "the student and what it is compared with need the same embed_dim"
        )
    if norm:
        check_unit(a, names[0])
        check_unit(b, names[1])


def check_unit(rows: Tensor, name: str) -> None:
    """ValueError unless every row's norm is 1, to a hundredth: bf16 has no more than that."""
    off = (rows.detach().float().norm(dim=1) - 1).abs()
    off = torch.where(off.isnan(), torch.inf, off)
    if off.max() > 1e-2:
        row = int(off.argmax())
        raise ValueError(
            f"{name}: row {row} has norm {rows[row].detach().float().norm():.4g}, expected 1; "
            "torch.nn.functional.normalize(x, dim=1) makes it so"
        )


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
    loss: Any = 0.0
    if beta > 0:
        loss = beta * nce(teacher_image.detach(), text, *args, **options)
    if beta < 1:
        loss = loss + (1 - beta) * nce(image, teacher_text.detach(), *args, **options)
    return loss


def part(n: int, rank: int, world: int) -> slice:
    """The rank's of 0..n, cut into `world` parts as equal as can be."""
    return slice(n * rank // world, n * (rank + 1) // world)
