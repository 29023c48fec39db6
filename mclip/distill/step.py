"""One batch through student and objective, forward and backward, whole or in parts."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mclip import models
from mclip.data.augment import to_input
from mclip.distill import sharding
from mclip.distill.lengths import text_encoder
from mclip.distill.objective import Objective


class Together(nn.Module):
    """Student and objective as one module, so that DDP averages the gradients of both."""

    def __init__(self, student: nn.Module, objective: Objective):
        super().__init__()
        self.student, self.objective = student, objective
        self.encode_text = text_encoder(student)

    def forward(
        self,
        batch: dict[str, torch.Tensor],
        mean: tuple,
        std: tuple,
        precision: torch.dtype,
        given: dict[str, Any] | None = None,
        part: slice | None = None,
        encode_only: bool = False,
    ) -> dict[str, torch.Tensor]:
        if given is None or part is not None:
            own = self._encode(batch, mean, std, precision)
            if encode_only:
                return own
        if given is not None:  # accumulation: this part's features in the cached whole
            own = {
                k: torch.cat([given[k][: part.start], v, given[k][part.stop :]])
                for k, v in own.items()
            }
            batch = given["batch"]
        sides = {k: v for k, v in batch.items() if k not in ("image", "tokens", "syn_tokens")}
        return self.objective({**sides, **own}, self.student.logit_scale.exp())

    def _encode(self, batch, mean, std, precision) -> dict[str, torch.Tensor]:
        size = models.image_size(self.student)
        x = to_input(batch["image"], size, mean, std)
        with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
            out = {"image": self.student.encode_image(x)}
            if "syn_tokens" in batch:  # one pass of the text tower for both captions
                both = torch.cat([batch["tokens"], batch["syn_tokens"]])
                out["text"], out["syn_text"] = encode_distinct(self.encode_text, both).chunk(2)
            else:
                out["text"] = encode_distinct(self.encode_text, batch["tokens"])
        return {k: F.normalize(v.float(), dim=-1) for k, v in out.items()}


def encode_distinct(
    encode: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor
) -> torch.Tensor:
    """`encode(tokens)`, each distinct row of tokens encoded once: (b, context) -> (b, d)."""
    rows, inverse = torch.unique(tokens, dim=0, return_inverse=True)
    # its backward adds in a fixed order, unlike that of encode(rows)[inverse]
    return encode(rows).index_select(0, inverse)


def backward(
    wrapped: nn.Module,
    together: Together,
    batch: dict[str, torch.Tensor],
    mean: tuple,
    std: tuple,
    precision: torch.dtype,
    accumulate: int,
    grad_checkpoint: bool = False,
) -> dict[str, torch.Tensor]:
    """Forward and backward of one batch, gradients added to the parameters'; the terms' values.

    wrapped : `averaged_over_ranks` of `together`, or itself on one rank.

    With accumulate > 1 the batch goes through the towers in parts: first without gradients to
    collect all features, then each part again with them, its rows replaced in the whole, so that
    the contrastive batch is the whole one.
    """
    with models.fast_attention(batch["image"].device):
        return _backward(
            wrapped, together, batch, mean, std, precision, accumulate, grad_checkpoint
        )


def _backward(
    wrapped, together, batch, mean, std, precision, accumulate, grad_checkpoint
) -> dict[str, torch.Tensor]:
    # what goes through the towers a second time, in accumulation or a checkpoint's backward, was
    # counted before
    again = _statistics_kept if grad_checkpoint else contextlib.nullcontext
    if accumulate == 1:
        terms = wrapped(batch, mean, std, precision)
        with again(together.student):
            sum(terms.values()).backward()
        return {k: v.detach() for k, v in terms.items()}
    parts = [{k: v[i::accumulate] for k, v in batch.items()} for i in range(accumulate)]
    sides = {
        k: torch.cat([p[k] for p in parts])
        for k in batch
        if k not in ("image", "tokens", "syn_tokens")
    }
    drawn = [(generator, generator.get_state()) for generator in together.objective.generators()]
    with torch.no_grad(), _statistics_kept(together.student):
        cached = [together(p, mean, std, precision, encode_only=True) for p in parts]
        given: dict = {k: torch.cat([c[k] for c in cached]) for k in cached[0]}
    given["batch"] = sides
    at = 0
    for i, part in enumerate(parts):
        for generator, state in drawn:  # every part sees the same draws
            generator.set_state(state)
        stop = at + len(part["image"])
        last = i == accumulate - 1
        with contextlib.nullcontext() if last or wrapped is together else wrapped.no_sync():
            terms = wrapped(part, mean, std, precision, given=given, part=slice(at, stop))
            with again(together.student):
                sum(terms.values()).backward()
        at = stop
    # the objective's parameters and the logit scale got the whole batch's gradient once a part
    shared = [
        p
        for n, p in together.named_parameters()
        if n.startswith("objective.") or n == "student.logit_scale"
    ]
    for p in shared:
        if p.grad is not None:
            p.grad /= accumulate
    return {k: v.detach() for k, v in terms.items()}


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norm's running statistics come out as they went in."""
    buffers = [
        b
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        for b in m.buffers(False)
    ]
    before = [b.clone() for b in buffers]
    yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def averaged_over_ranks(together: Together) -> nn.Module:
    """DDP around it; what is sharded over the ranks keeps its own gradient."""
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(
        together, [one.name for one in sharding.spread(together)]
    )  # torch's only way
    return ddp(together)
