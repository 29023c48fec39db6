"""CLIP's symmetric contrastive loss (arXiv 2103.00020, Figure 3), and the NCE that other losses
build on.

NCE(A, B) = -(1/2b) sum_i [ log softmax_j(g a_i.b_j)_i + log softmax_j(g b_i.a_j)_i ],   g = 1 / tau
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    check_norm: bool = False,
) -> Tensor:
    """L_CLIP = NCE(image, text).

    Parameters
    ----------
    image, text : (b, d), unit norm; row i of both is pair i
    logit_scale : scalar g, already exponentiated
    ids : (b,) int64 or None Samples with the same id (say, the same caption) are not each other's
        negatives: the terms j != i with ids[j] == ids[i] are left out of both softmax denominators.
        The pair itself stays the only positive. (Not taken: averaging the log-probabilities over
        all samples of an id, as SupCon does. With ten CIFAR captions that pulls every image of a
        class to one point, which plain CLIP would never ask for.)
    check_norm : refuse rows that are not of unit norm (one more pass over them; on CUDA the host
        waits for it)

    Returns a scalar: b = 1, or one id for the whole batch, gives 0.
    """
    return nce(image, text, logit_scale, ids=ids, check_norm=check_norm)


def nce(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    check_norm: bool = False,
) -> Tensor:
    """NCE(A, B) of the module's docstring; options as in `clip_loss`."""
    check_pair(a, b, ("image", "text"), norm=check_norm)
    logits = similarity(a, b, logit_scale)
    if ids is not None:
        logits = logits.masked_fill(shared(ids, len(a)), float("-inf"))
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def similarity(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """scale * a @ b.T (rows of a x rows of b) in float32 or wider, also under autocast: at a logit
    scale of 100 a bf16 logit has steps of 0.5.
    """
    with torch.autocast(a.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return scale * (a.to(wide) @ b.to(wide).T)


def shared(ids: Tensor, size: int) -> Tensor:
    """(b, b) mask: True where two different samples have the same id."""
    check_ids(ids, size)
    same = ids[:, None] == ids[None, :]
    return same.fill_diagonal_(False)


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
