"""What an epoch of training costs, stored or online (MobileCLIP; papers.md 2.5).

    plain               the baseline's training step
    reinforced          MobileCLIP's, from the stored augmentations, captions and embeddings
    teachers online     that, and one augmentation of each picture drawn, replayed and embedded by
                        the ensemble, the true and one synthetic caption embedded
    everything online   that, and the synthetic caption written by the captioner

Measured on one thread (or one GPU), the parts in turns in one process; medians. Online parts are
added up, as they would run before the step on the same core or GPU.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from mclip.params import Params, Reinforce, Section, absent
from mclip.system.timing import interleaved

if TYPE_CHECKING:
    import pandas as pd

    from mclip.distill.runs import Run

KINDS = ("plain", "reinforced", "teachers online", "everything online")


class Settings(Section):
    """`ablations.epoch`."""

    recipe: str  # the reinforced one
    baseline: str
    rounds: PositiveInt  # training steps of each that are timed, by turns

    def check(self, p: Params) -> Iterator[str]:
        yield from absent("recipe", [self.recipe], p.distill.recipes, "recipe")
        yield from absent("baseline", [self.baseline], p.distill.recipes, "recipe")


def per_sample(
    plain: Run,
    reinforced: Run,
    settings: Reinforce,
    teachers: Mapping[str, str],
    captioner: str,
    *,
    rounds: int = 7,
    warm: int = 2,
) -> pd.Series:
    """Milliseconds a sample of `KINDS`.

    Parameters
    ----------
    plain, reinforced : runs of at least warm + rounds + 1 steps; nothing is trained to the end.
    settings : the reinforce section; of each picture one augmentation and one caption are made.
    teachers : name -> model string. captioner : model string.

    Raises
    ------
    ValueError : runs that are too short.
    """
    import pandas as pd
    import torch

    from mclip import models, reinforce
    from mclip.data import shards
    from mclip.distill import trainer

    batch = reinforced.train.batch_size
    length = min(run.train.samples // run.train.batch_size for run in (plain, reinforced))
    if length <= warm + rounds:
        raise ValueError(
            f"distill.train: samples / batch_size are {length} steps, timing {rounds} rounds takes "
            f"more than {warm + rounds}: raise samples or lower ablations.epoch.rounds"
        )
    # where the training steps and reinforce.run put their models, too
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ensemble = []
        for name in settings.ensemble:
            model, _, _, tokenizer = models.create(teachers[name], device=device)
            ensemble.append((models.for_inference(model), tokenizer))
        writer = models.for_inference(models.create(captioner, device=device)[0])
        one = settings.model_copy(
            update={"n_aug": 1, "n_syn": 1, "caption_candidates": 1, "batch_size": batch}
        )
        samples = list(itertools.islice(shards.iter_samples(reinforced.data.pairs), batch))
        captions = [sample.caption for sample in samples]
        with trainer.started((plain, reinforced)) as steps:
            found = interleaved(
                {
                    "plain": lambda: next(steps[0]),
                    "reinforced": lambda: next(steps[1]),
                    "teachers": lambda: reinforce.reinforce_samples(samples, one, ensemble),
                    "texts": lambda: models.encode_texts_with_all(
                        ensemble, captions, precision=one.precision
                    ),
                    "everything": lambda: reinforce.reinforce_samples(
                        samples, one, ensemble, writer
                    ),
                },
                rounds,
                warm,
                wait=torch.cuda.synchronize if device == "cuda" else lambda: None,
            )
    finally:
        torch.set_num_threads(threads)
    ms = {name: 1e3 * statistics.median(seconds) / batch for name, seconds in found.items()}
    stored = ms["reinforced"]
    # without a writer only true captions are embedded: as many synthetic ones cost as much again
    return pd.Series(
        dict(
            zip(
                KINDS,
                (
                    ms["plain"],
                    stored,
                    stored + ms["teachers"] + ms["texts"],
                    stored + ms["everything"],
                ),
                strict=True,
            )
        ),
        name="ms a sample",
    )


def table(ms: pd.Series, pairs: int, paper: Mapping[str, float]) -> pd.DataFrame:
    """`per_sample` to read: milliseconds, minutes an epoch of so many pairs on one core, how many
    times plain's, and the same of the paper's hours.
    """
    import pandas as pd

    return (
        pd.DataFrame(
            {
                "ms a sample": ms,
                f"minutes an epoch of {pairs:,} pairs": ms * pairs / 6e4,
                "times plain": ms / ms["plain"],
                "the paper: hours": pd.Series(paper),
                "the paper: times plain": pd.Series(paper) / paper["plain"],
            }
        )
        .loc[list(ms.index)]
        .rename_axis("training")
    )


def verdict(ms: pd.Series, paper: Mapping[str, float]) -> str:
    """What the store saves, in a sentence."""
    times = ms / ms["plain"]
    order = list(ms.sort_values(kind="stable").index) == sorted(paper, key=lambda kind: paper[kind])
    said = {
        kind: f"{times[kind]:.2f} times ({paper[kind] / paper['plain']:.2f})" for kind in KINDS[1:]
    }
    return (
        "Of a plain sample's cost (the paper's in brackets) one of the reinforced set takes "
        f"{said['reinforced']}, with the teachers online {said['teachers online']}, "
        f"with everything online {said['everything online']}: "
        f"the paper's order {'holds' if order else 'does not hold'}."
    )
