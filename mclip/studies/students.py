"""Students side by side: trained alike, scored alike, and what each costs
(notebooks/ablations/students.ipynb).

Their runs lie in the studies' cache, where the default student's is that of the study of its recipe
(mclip/studies/ablate.py). Accuracy is the same in every run, costs are measured and are not:
milliseconds of the fastest form of each tower (`models.for_inference`), one picture or one caption
on one thread, and of a whole training step of the recipe with its real batches. All students take
turns, so that a machine that slows down slows all of them; medians.

What was tried for the ViT (mclip/models/configs/demo-vit.json; figures as in
mclip/models/fastvit.py): patches of 8 pixels, width 128, four layers take 309 ms and reach 29.9 %
and 4.9 %; patches of 4 with two layers 685 ms, 29.9 % and 4.6 %. Four layers on patches of 4 cost
4.7 ResNets at width 128 and 8.9 at width 192, six of width 256 on patches of 8 5.8: not trained.
All students share the default one's text tower (two layers of width 128): only images differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mclip.params import Params, Recipe, Section, Train, absent
from mclip.system.timing import interleaved

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from mclip.distill.runs import Run

WARM_STEPS = 2  # of each student before the clock starts


class Settings(Section):
    """`ablations.students`."""

    recipe: str
    models: list[str] = Field(min_length=1)  # beside distill.student

    def check(self, p: Params) -> Iterator[str]:
        yield from absent("recipe", [self.recipe], p.distill.recipes, "recipe")


def plan(
    recipe_name: str,
    recipe: Recipe,
    names: Sequence[str],
    settings: Train,
    seeds: Sequence[int],
    *,
    teacher: str | None,
    data: dict | None = None,
    cache: Path | None = None,
) -> dict[str, list[Run]]:
    """Each student's runs, a run a seed, for `ablate.train` and `ablate.score`.

    Parameters
    ----------
    names : open_clip model strings, or of mclip/models/configs.
    settings : distill.train with the studies' number of samples, the same for all.
    data : overrides of TrainingSet's folders.
    cache : the studies' own by default.
    """
    from mclip.distill import plan as distill

    cache = cache or distill.CACHE
    return {
        name: distill.runs_of(
            recipe_name, recipe, name, settings, seeds, teacher=teacher, data=data, cache=cache
        )
        for name in names
    }


# --- cost -----------------------------------------------------------------------------------------


def costs(runs: Mapping[str, Run], *, steps: int = 8, rounds: int = 60) -> pd.DataFrame:
    """What a student costs, by its name; random weights, which cost as much as trained ones.

    Parameters
    ----------
    runs : a run of each student.
    steps : training steps that are timed, at most those of a run.
    rounds : passes of each tower that are timed.

    Returns
    -------
    indexed by student: image_params, text_params, image_ms, text_ms, latency_ms (both),
    step_ms, train_s (step_ms times the steps of a run).
    """
    import pandas as pd
    import torch

    from mclip import models

    threads = torch.get_num_threads()
    towers: dict[tuple[str, str], Callable[[], object]] = {}
    table: dict[str, dict[str, float]] = {}
    try:
        torch.set_num_threads(1)
        for name in runs:
            model, _, _, tokenizer = models.create(name)
            image = sum(p.numel() for p in model.get_submodule("visual").parameters())
            table[name] = {
                "image_params": image,
                "text_params": sum(p.numel() for p in model.parameters()) - image,
            }
            towers |= {
                (name, f"{kind}_ms"): call for kind, call in _towers(model, tokenizer).items()
            }
        with torch.no_grad():
            for (name, column), seconds in interleaved(towers, rounds, warm=3).items():
                table[name][column] = 1e3 * statistics.median(seconds)
        for name, step_s in _step_seconds(runs, steps).items():
            table[name] |= {
                "latency_ms": table[name]["image_ms"] + table[name]["text_ms"],
                "step_ms": 1e3 * step_s,
                "train_s": step_s * (runs[name].train.samples // runs[name].train.batch_size),
            }
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("student")


def _towers(model: torch.nn.Module, tokenizer) -> dict[str, Callable]:
    """A call of each tower of a model on one picture, one caption."""
    import torch

    from mclip import models

    fast: Any = models.for_inference(model)
    side = models.image_size(model)
    picture = torch.zeros(1, 3, side, side).contiguous(memory_format=torch.channels_last)
    caption = tokenizer(["a photo of a red apple"])
    return {"image": lambda: fast.encode_image(picture), "text": lambda: fast.encode_text(caption)}


def _step_seconds(runs: Mapping[str, Run], steps: int) -> dict[str, float]:
    """Median seconds of a training step of each run, by turns; nothing is trained to the end."""
    from mclip.distill import trainer

    most = (
        min(run.train.samples // run.train.batch_size for run in runs.values()) - 1
    )  # the last one would export
    with trainer.started(runs.values()) as going:
        found = interleaved(
            {name: partial(next, each) for name, each in zip(runs, going, strict=True)},
            max(1, min(steps, most - WARM_STEPS)),
            min(WARM_STEPS, most - 1),
        )
    return {name: statistics.median(seconds) for name, seconds in found.items()}


# --- what to say ----------------------------------------------------------------------------------


def summary(main: pd.DataFrame, cost: pd.DataFrame, sets: Iterable[str]) -> pd.DataFrame:
    """One row a student: `costs`' columns, and of each set "SET mean" and "SET std" over the seeds,
    in percent.

    main : of compare.main_metric, its column recipe named student. The standard deviation of one
        seed is 0.
    """
    out = cost.copy()
    for name in sets:
        percent = (100 * main[main["set"] == name].set_index("student")["value"]).groupby("student")
        out[f"{name} mean"], out[f"{name} std"] = percent.mean(), percent.std().fillna(0.0)
    return out


def verdict(table: pd.DataFrame, sets: Mapping[str, str]) -> str:
    """The comparison in one sentence.

    A difference counts where it is larger than both standard deviations over seeds together.
    Another student is worth a change where it loses nothing that counts and gains something that
    does, or costs less both to train and to run.

    Parameters
    ----------
    table : of `summary`, the default student in the first row.
    sets : set -> what to call it.
    """
    first, base = table.index[0], table.iloc[0]
    own = " and ".join(
        f"{base[f'{k} mean']:.1f} ± {base[f'{k} std']:.1f} % on {title}"
        for k, title in sets.items()
    )
    said, worth = [], []
    for name, row in table.iloc[1:].iterrows():
        gaps = {key: row[f"{key} mean"] - base[f"{key} mean"] for key in sets}
        counts = {
            key: abs(gap) > row[f"{key} std"] + base[f"{key} std"] for key, gap in gaps.items()
        }
        latency, training = row["latency_ms"] / base["latency_ms"], row["train_s"] / base["train_s"]
        parts = [
            f"{gaps[key]:+.1f} points on {title}{'' if counts[key] else ' (within the spread)'}"
            for key, title in sets.items()
        ]
        said.append(
            f"{name} has {' and '.join(parts)} at {latency:.1f} x the latency, "
            f"{training:.1f} x the training"
        )
        loses = any(counts[key] and gap < 0 for key, gap in gaps.items())
        gains = any(counts[key] and gap > 0 for key, gap in gaps.items())
        if not loses and (gains or max(latency, training) <= 1):
            worth.append(name)
    if not said:
        return f"{first} reaches {own}; no other student was asked for."
    advice = f"{' and '.join(worth)} would be worth a change" if worth else "none is worth a change"
    return f"{first} reaches {own}; at equal samples {', '.join(said)}: {advice}."
