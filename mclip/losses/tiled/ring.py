"""Blocks that pass from rank to rank in a ring: every rank meets every other's, none holds more
than two at a time.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class Ring:
    """The ranks of a process group in a circle. group None: this process alone, and nothing is
    sent.

    All ranks must make the same calls in the same order, with tensors of the same shapes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.world = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def turn(
        self, fixed: list[Tensor], running: list[Tensor]
    ) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
        """Each rank's (rank, fixed, running), this one's own first.

        `fixed` is only read; its next block is on its way while the caller works on the present
        one. `running` is what the caller changes in place: it goes on with the changes, and at the
        end the given tensors hold all ranks'.
        """
        here, moving = fixed, running
        for step in range(self.world):
            last = step == self.world - 1
            coming = None if last else self._pass_on(here)
            yield (self.rank - step) % self.world, here, moving
            if coming is not None:
                here = self._arrived(coming)
            if moving and self.world > 1:
                moving = self._arrived(self._pass_on(moving))
        for home, back in zip(running, moving, strict=True):
            if home is not back:
                home.copy_(back)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, concatenated by rank."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts)

    def _pass_on(self, tensors: list[Tensor]) -> tuple[list[dist.Work], list[Tensor], list[Tensor]]:
        to, source = ((self.rank + step) % self.world for step in (1, -1))
        sent = [x.contiguous() for x in tensors]
        received = [torch.empty_like(x) for x in sent]
        transfers = []
        for tag, (x, y) in enumerate(zip(sent, received, strict=True)):
            transfers += [
                dist.P2POp(dist.isend, x, group=self.group, group_peer=to, tag=tag),
                dist.P2POp(dist.irecv, y, group=self.group, group_peer=source, tag=tag),
            ]
        return dist.batch_isend_irecv(transfers), sent, received

    @staticmethod
    def _arrived(transfer: tuple[list[dist.Work], list[Tensor], list[Tensor]]) -> list[Tensor]:
        works, _, received = transfer  # what is sent must live until it is
        for work in works:
            work.wait()
        return received
