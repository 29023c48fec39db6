"""How fast models are on this machine, beside the paper's accuracy.

For notebooks/ablations/latency.ipynb; mclip/models/latency.py measures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from mclip.params import Section
from mclip.system.timing import Runtime

if TYPE_CHECKING:
    import pandas as pd

# ImageNet zero-shot top-1 and mean of 38 sets, %, and image + text latency, ms on an iPhone 12 Pro
# Max, as published in arXiv 2311.17049, Table 1: not measured here
PUBLISHED = {
    "MobileCLIP-S0": (67.8, 58.1, 3.1),
    "MobileCLIP-S1": (72.6, 61.3, 5.8),
    "MobileCLIP-S2": (74.4, 63.7, 6.9),
    "MobileCLIP-B": (76.8, 65.2, 13.7),
}


class Settings(Section):
    """`ablations.latency`."""

    device: Literal["cpu", "cuda"]
    models: list[str] = Field(min_length=1)
    runtimes: list[Runtime] = Field(min_length=1)
    batches: list[PositiveInt] = Field(min_length=1)
    rounds: PositiveInt


def measure(study: Settings) -> pd.DataFrame:
    """The frame of `mclip.models.latency.measure`."""
    from mclip.models import latency

    return latency.measure(
        study.models,
        study.runtimes,
        batches=study.batches,
        rounds=study.rounds,
        device=study.device,
    )


def verdict(study: Settings, first: pd.DataFrame, gmac: dict[str, float]) -> str:
    """Each model's time in one sentence, against the slowest.

    Parameters
    ----------
    first : pandas.DataFrame
        Of `mclip.models.latency.best`, at the first batch size; the last row is what the others
        are compared with.
    gmac : dict
        Model -> 10^9 multiply-adds of one input.
    """
    slowest, said = first.iloc[-1], []
    for row in first.itertuples():
        line = f"{row.model} {row.ms:.1f} ms ({row.runtime})"
        if row.model != slowest.model:
            line += (
                f", {slowest.ms / row.ms:.1f} times as fast as {slowest.model} (its image tower "
                f"alone {slowest.image / row.image:.1f} times) with "
                f"{gmac[slowest.model] / gmac[row.model]:.1f} times fewer multiply-adds"
            )
        said.append(line)
    return (
        f"Image + text at batch {study.batches[0]} on {study.device}: {'; '.join(said)}; "
        "each in its fastest runtime."
    )
