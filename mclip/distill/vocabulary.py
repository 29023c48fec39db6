"""Train only the rows of the token embedding that a student's captions use.

A caption set of a few thousand words uses a few thousand of CLIP's 49,408 tokens, but each step
would fill, clip and update the gradients and moments of all rows: a sixth of the default's step.
Rows without a gradient change by weight decay alone, all by the same factor; one of them is kept to
measure it.

    kept = vocabulary.shrink(student, [tokens, syn_tokens])  # before the optimizer is made
    tokens = kept.tokens(tokens)                             # ids of the small table
    kept.restore(student)                                    # after the last step: the whole table
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kept:
    """The rows of a token embedding that are kept, and how to restore the table.

    ids : (m,) token ids of the small table's rows, ascending. whole : (vocabulary, width), the
        table before training.
    witness : the place among `ids` of a token that no caption has.
    """

    ids: Tensor
    whole: Tensor
    witness: int

    def tokens(self, tokens: Tensor) -> Tensor:
        """The tokens as rows of the small table, same shape and dtype. Their order stays: the end's
        is the largest.
        """
        return torch.searchsorted(self.ids, tokens).to(tokens.dtype)

    @torch.no_grad()
    def restore(self, student: nn.Module) -> None:
        """Put the whole table back: the trained rows, and the others with the weight decay that the
        witness had.
        """
        table = _table(student)
        before = self.whole[self.ids[self.witness]].to(table.weight)
        after = table.weight[self.witness]
        decay = (after.double() @ before.double()) / before.double().square().sum()
        whole = (self.whole.to(table.weight).double() * decay).to(table.weight.dtype)
        whole[self.ids.to(whole.device)] = table.weight
        table.weight, table.num_embeddings = nn.Parameter(whole), len(whole)


def shrink(student: nn.Module, captions: Sequence[Tensor]) -> Kept | None:
    """Cut the student's token embedding to the rows of these tokens and a witness.

    Parameters
    ----------
    captions : all tokens that the training will see, any shapes.

    Returns
    -------
    None where the student is left as it is: its text tower finds the end of a caption by
    anything but the largest token (`pool_type` argmax) or pads with anything but 0, has no such
    table, or the captions use half of it and more.
    """
    table = _table(student)
    text = getattr(student, "text", student)
    pooled = getattr(text, "text_pool_type", getattr(text, "pool_type", ""))
    if table is None or pooled != "argmax" or getattr(text, "pad_id", 0) != 0:
        return None
    size = table.num_embeddings
    used = torch.zeros(size, dtype=torch.bool)
    used[0] = True  # padding stays 0
    for tokens in captions:
        used[tokens.long().flatten()] = True
    if used.sum() > size // 2:
        return None
    witness = int((~used).int().argmax())
    used[witness] = True
    ids, whole = used.nonzero().flatten(), table.weight.detach().clone()
    table.weight = nn.Parameter(whole[ids.to(whole.device)])
    table.num_embeddings = len(ids)
    return Kept(ids, whole, int(torch.searchsorted(ids, witness)))


def _table(student: nn.Module) -> nn.Embedding | None:
    """The token embedding of an open_clip model, which lies in the model itself or in its text
    tower.
    """
    table = getattr(getattr(student, "text", student), "token_embedding", None)
    return table if isinstance(table, nn.Embedding) else None
