"""Skip the positions behind a caption's end in a causal text tower while a student trains.

The tower's output is that of the end token, the largest id, and under a causal mask it reads
nothing that comes after. Captions of half the context are common (of the default's 16 tokens they
use 9, of CLIP's 77 about 20), so a batch goes through the tower in two groups, each cut to its
longest caption: the same features up to rounding, and in the default a third less arithmetic in the
text tower.
"""

from collections.abc import Callable

import open_clip
import torch
from torch import Tensor, nn


class _Text(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def text_encoder(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A cheaper `model.encode_text`, where that is exact: (b, context) tokens -> (b, d).

    That is where open_clip's own tower has a causal mask and takes the largest token for the end;
    elsewhere it is `model.encode_text` itself. Gradients flow to every parameter.
    """
    causal = type(model) is open_clip.CLIP and getattr(model, "attn_mask", None) is not None
    if not causal or model.text_pool_type != "argmax":
        return model.encode_text  # type: ignore[return-value]
    text = _Text(model)

    def encode(tokens: Tensor) -> Tensor:
        length = tokens.argmax(1).cpu() + 1
        order = length.argsort(stable=True)
        cut, parts = split(length[order]), []
        for rows in (order[:cut], order[cut:]):
            if len(rows):
                n = int(length[rows[-1]])
                shorter = {
                    "model.positional_embedding": model.positional_embedding[:n],
                    "model.attn_mask": model.attn_mask[:n, :n],
                }
                parts.append(
                    torch.func.functional_call(text, shorter, (tokens[rows.to(tokens.device), :n],))
                )
        return torch.cat(parts)[order.argsort().to(tokens.device)]

    return encode


def split(length: Tensor) -> int:
    """How many of the shortest texts make a group of their own so that both groups, padded, are
    least.

    length : (b,), ascending.
    """
    count = torch.arange(1, len(length) + 1)
    return int((count * length + (len(length) - count) * length[-1]).argmin()) + 1
