"""A run's checkpoint: all that is needed to continue with the same batches to the same bytes.

It does not depend on the number of ranks.
"""

from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from mclip.distill import sharding
from mclip.system.files import whole

FILE = "checkpoint.pt"


def save(
    scratch: Path,
    identity: str,
    step: int,
    together: nn.Module,
    optimizer: Optimizer,
    averaged: AveragedModel | None,
    history: list[dict],
) -> None:
    """Write a checkpoint, whole or not at all; every rank calls this, rank 0 writes."""
    states = sharding.whole(together, optimizer)
    if states is None:  # another rank
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with whole(scratch / FILE) as draft:
        torch.save(
            {
                "identity": identity,
                "step": step,
                "model": states[0],
                "optimizer": states[1],
                "averaged": averaged.state_dict() if averaged is not None else None,
                "history": history,
            },
            draft,
        )


def resume(
    scratch: Path,
    identity: str,
    together: nn.Module,
    optimizer: Optimizer,
    averaged: AveragedModel | None,
) -> tuple[int, list[dict]]:
    """Load a checkpoint into module, optimizer and average; returns the steps done and the history.

    0 and none where there is none of this very run: identity, see `mclip.distill.identity`.
    """
    file = scratch / FILE
    if not file.exists():
        return 0, []
    state = torch.load(file, map_location="cpu", weights_only=True)
    if state.get("identity") != identity:
        return 0, []
    sharding.own(together, optimizer, state["model"], state["optimizer"])
    if averaged is not None:
        averaged.load_state_dict(state["averaged"])
    return state["step"], state["history"]
