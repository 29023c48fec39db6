"""CLIP's symmetric contrastive loss, and the NCE that other losses build on.

arXiv 2103.00020, Figure 3:

NCE(A, B) = -(1/2b) sum_i [ log softmax_j(g a_i.b_j)_i + log softmax_j(g b_i.a_j)_i ],   g = 1 / tau
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mclip.losses.backends import Backend, gathered, is_plain
from mclip.losses.common import check_ids, check_pair
from mclip.losses.tiled import pairs


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    check_norm: bool = False,
    backend: Backend = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """CLIP's contrastive loss, L_CLIP = NCE(image, text) of the module's docstring.

    Parameters
    ----------
    image, text : Tensor, shape (b, d)
        Unit-norm rows; row i of both is pair i.
    logit_scale : Tensor or float
        Scalar g, already exponentiated.
    ids : Tensor of int64, shape (b,), optional
        Samples with the same id (say, the same caption) are not each other's negatives: the terms
        j != i with ids[j] == ids[i] are left out of both softmax denominators. The pair itself
        stays the only positive.
    check_norm : bool, default False
        Refuse rows that are not of unit norm: one more pass over them; on CUDA the host waits.
    backend : {"auto", "plain", "tiled", "triton"}, default "auto"
        "plain" holds whole (b, b) matrices; "tiled" and "triton" (CUDA) take memory linear in b,
        for the same value and gradients, but no second derivative. "auto" is plain for a batch
        below 1,024, else triton on CUDA where it can run, else tiled.
    group : torch.distributed.ProcessGroup, optional
        None: this process has the whole batch. Else each rank of the group gives its rows, all
        equally many; each gets the whole batch's loss, and gradients such that their *mean* over
        ranks (as DDP takes it) is that of one process with the whole batch.

    Returns
    -------
    Tensor, shape ()
        The mean over the batch, float32 or wider; 0 for b = 1 or one id for the whole batch.

    Raises
    ------
    ValueError
        If the shapes do not fit, the batch is empty, rows are off the unit sphere (`check_norm`),
        or the backend is unknown or can't run here.

    See Also
    --------
    mclip.losses.tiled.pairs.clip_loss : the tiled form by itself, with the size of its tiles.

    Notes
    -----
    Considered for `ids` and not taken: averaging the log-probabilities over all samples of an id,
    as SupCon does. With ten CIFAR captions that pulls every image of a class to one point, which
    plain CLIP would never ask for.

    References
    ----------
    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
    arXiv 2103.00020, Figure 3.

    Examples
    --------
    >>> import torch
    >>> from mclip.losses import clip_loss
    >>> image = text = torch.eye(4)
    >>> clip_loss(image, text, 10.0)
    tensor(0.0001)
    >>> clip_loss(image, text.flip(0), 10.0, backend="tiled")
    tensor(10.0001)
    """
    if is_plain(backend, len(image), group):
        image, text = gathered(group, image, text)
        (ids,) = gathered(group, ids)
        return nce(image, text, logit_scale, ids=ids, check_norm=check_norm)
    options: dict[str, Any] = {"check_norm": check_norm, "backend": backend, "group": group}
    return pairs.clip_loss(image, text, logit_scale, ids=ids, **options)


def nce(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    check_norm: bool = False,
) -> Tensor:
    """NCE(A, B) of the module's docstring on whole matrices; options as in `clip_loss`."""
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
