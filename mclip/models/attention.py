"""The way of attention that is fast on a device."""

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def fast_attention(
    device: torch.device,
) -> contextlib.AbstractContextManager[None]:
    """Within it, attention on a CPU is plain matrix products; elsewhere torch chooses.

    torch's flash attention on a CPU is written for long sequences. Captions of 16 tokens spend most
    of it in overhead. A training step needs the context around its backward pass, too, where
    activations are recomputed there (gradient checkpointing).

    Parameters
    ----------
    device : torch.device
        Where the model is.

    Returns
    -------
    context manager
        For the forward pass.

    Examples
    --------
    >>> import torch
    >>> from mclip import models
    >>> q = torch.ones(1, 2, 16, 8)
    >>> with models.fast_attention(q.device):
    ...     torch.nn.functional.scaled_dot_product_attention(q, q, q).shape
    torch.Size([1, 2, 16, 8])
    """
    if device.type != "cpu":
        return contextlib.nullcontext()
    return sdpa_kernel(SDPBackend.MATH)
