"""How many augmentations and captions are worth storing (MobileCLIP; papers.md 2.5: five and two)?

More of them than one or two say something only where a run sees each pair many times. So a part of
the pairs is reinforced once more, with as many as the study wants, and each variant is trained on
the first few of them:

    all        every stored augmentation and caption
    aug N      the first N augmentations, every caption
    syn N      every augmentation, the true caption and the first N synthetic ones; syn 0: the true
               one alone

What was tried on the default data (two seeds each, all captions, CIFAR-10 in percent with one
stored augmentation and with ten): on 5 % of the pairs light crops (area 0.9 and more) 32.4 and 32.9
at 19,200 samples, crops from 0.6 31.7 and 33.1, crops from 0.4 with one RandAugment operation 27.3
and 29.4, and no difference yet at 9,600 samples (25.7, 26.1); on 2 % and 9,600 samples light 25.2
and 26.6, strong 21.5 and 26.1; strong at 6,400 samples 20.7 and 25.0. So light augmentations are
worth as much with one as with ten, strong ones need more the more often a picture is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
from pydantic import Field, NonNegativeInt, PositiveInt

from mclip.params import Params, Recipe, Reinforce, Section, Selection, absent, explain
from mclip.params.tree import varied
from mclip.system.files import digest

if TYPE_CHECKING:
    import pandas as pd

    from mclip.distill.runs import Run
    from mclip.studies import ablate

ALL, AUG, SYN = "all", "aug", "syn"
KINDS = {AUG: "augmentations", SYN: "captions"}  # as published.ENOUGH calls them


class Settings(Section):
    """`ablations.amount`."""

    recipe: str  # a reinforced one
    fraction: Annotated[float, Field(gt=0, le=1)]  # of the pairs: few ones are seen many times
    samples: PositiveInt
    stored: dict[str, Any]  # laid over `reinforce`, for these pairs
    n_aug: list[PositiveInt]
    n_syn: list[NonNegativeInt]

    def check(self, p: Params) -> Iterator[str]:
        yield from absent("recipe", [self.recipe], p.distill.recipes, "recipe")
        if self.recipe in p.distill.recipes and not p.distill.recipes[self.recipe].synthetic:
            yield "recipe: needs one with synthetic: true"
        try:
            full = stored(self, p.reinforce)
        except pydantic.ValidationError as err:
            yield from (f"stored.{line}" for line in explain(err, Reinforce))
            return
        yield from absent("stored.ensemble", full.ensemble, p.teachers.models, "teacher")
        for key in ("n_aug", "n_syn"):
            most = getattr(full, key)
            for n in getattr(self, key):
                if n >= most:
                    yield f"{key}: {n} is not below the {most} that are stored (stored.{key})"


def stored(study: Settings, settings: Reinforce) -> Reinforce:
    """The reinforce section with what the study stores laid over it."""
    return varied(settings, study.stored)


def variants(study: Settings) -> dict[str, Selection]:
    """Variant -> what of the stored set it takes; "syn 0" takes what ALL does, for a recipe without
    captions.
    """
    from mclip.studies import derive

    found = {ALL: derive.WHOLE}
    found |= {f"{AUG} {n}": derive.WHOLE.model_copy(update={"n_aug": n}) for n in study.n_aug}
    return found | {
        f"{SYN} {n}": derive.WHOLE.model_copy(update={"n_syn": n or None}) for n in study.n_syn
    }


def reinforced_part(
    study: Settings,
    settings: Reinforce,
    teachers: dict[str, str],
    captioner: str,
    *,
    data: dict[str, str] | None = None,
    cache: str | Path | None = None,
) -> Path:
    """The study's reinforced set, made where it isn't there; a killed run goes on. The stage's own
    where that is it.

    cache : the studies' own by default. Raises what `reinforce.run` does.
    """
    from mclip import models, reinforce
    from mclip.data.stores.contents import fingerprint
    from mclip.studies import ablate, derive
    from mclip.system.source import code_digest

    cache = Path(cache or ablate.CACHE)
    own, wanted = derive.FOLDERS | (data or {}), stored(study, settings)
    if study.fraction == 1 and wanted == settings:
        return Path(own["reinforced"])
    weights = [models.weights_sha256(teachers[name]) for name in wanted.ensemble]
    if wanted.n_syn:
        weights.append(models.weights_sha256(captioner))
    made_of = [
        reinforce.result_settings(wanted),
        weights,
        study.fraction,
        fingerprint(own["pairs"]),
        fingerprint(own["balance"]) if wanted.pairs == "kept" else None,
        code_digest("mclip.reinforce"),
    ]
    folder = cache / "data" / f"reinforced-{digest(made_of)}"
    if not folder.exists():
        draft = folder.with_name(
            f"{folder.name}.part"
        )  # not whole_folder's: its shards are kept over a killed run
        reinforce.run(
            wanted,
            teachers,
            captioner,
            pairs=own["pairs"],
            balance=own["balance"],
            fraction=study.fraction,
            out=draft,
            cache=cache,
        )
        draft.rename(folder)
    return folder


def plan(
    study: Settings,
    recipe: Recipe,
    shared: ablate.Shared,
    source: str | Path,
    *,
    seeds: Sequence[int],
) -> dict[str, list[Run]]:
    """Each variant's runs, a run a seed, for `ablate.train` and `ablate.score`; source: of
    `reinforced_part`.
    """
    from mclip.studies import ablate, derive

    runs = {}
    for name, chosen in variants(study).items():
        own = derive.selected(chosen, {"reinforced": str(source)}, Path(shared.cache))
        changed = varied(recipe, {"synthetic": False}) if name == f"{SYN} 0" else recipe
        data: dict[str, Any] = shared.data | {"reinforced": str(own), "fraction": study.fraction}
        runs[name] = ablate.runs_of(
            study.recipe, changed, shared, study.samples, seeds, shared.cluster.teacher, data
        )
    return runs


def titles(study: Settings, most: Mapping[str, int]) -> dict[str, str]:
    """Each variant's title; most: of `most`."""
    found = {ALL: " and ".join(f"{n} {kind}" for kind, n in most.items())}
    for name in variants(study):
        if name != ALL:
            kind, n = name.split()
            found[name] = _counted(int(n), KINDS[kind])
    return found


def most(study: Settings, settings: Reinforce) -> dict[str, int]:
    """How many augmentations and captions are stored for the study."""
    full = stored(study, settings)
    return {KINDS[AUG]: full.n_aug, KINDS[SYN]: full.n_syn}


def curve(main: pd.DataFrame, most: Mapping[str, int], sets: Sequence[str]) -> pd.DataFrame:
    """Every variant against ALL on some sets: columns what (of KINDS), number, set, mean, low, high
    (points).

    main : of compare.main_metric, its column recipe holding the variant. ALL itself ends both
        curves, at 0.
    """
    import pandas as pd

    from mclip.report import claims

    rows = []
    for name in sets:
        found, _ = claims.against(main, name, ALL)
        for row in found.itertuples():
            if row.recipe == ALL:
                rows += [(what, n, name, 0.0, 0.0, 0.0) for what, n in most.items()]
            else:
                kind, n = row.recipe.split()
                rows.append((KINDS[kind], int(n), name, row.mean, row.low, row.high))
    frame = pd.DataFrame(rows, columns=["what", "number", "set", "mean", "low", "high"])
    return frame.sort_values(["what", "set", "number"], kind="stable", ignore_index=True)


def verdict(points: pd.DataFrame, paper: Mapping[str, int]) -> str:
    """From how many on more is not seen to help, in a sentence; points: of `curve`, paper: of its
    numbers.
    """
    parts = []
    for name, own in points.groupby("set", sort=False):
        said = [_enough(what, each) for what, each in own.groupby("what", sort=False)]
        parts.append(f"on {name} {', and '.join(said)}")
    enough = " and ".join(f"{n} {what}" for what, n in paper.items())
    return f"With 95 % intervals, {'; '.join(parts)}. The paper has {enough} as enough."


def _enough(what: str, points: pd.DataFrame) -> str:
    """The largest number that is worse than all, and the next: of one set and kind, by number."""
    below = points.index[points["high"] < 0]
    most = points["number"].iloc[-1]
    if not len(below):
        return f"no smaller number of {what} can be told from {most}"
    worst, after = (
        points.loc[below[-1]],
        points.loc[points["number"] > points["number"][below[-1]], "number"].iloc[0],
    )
    verb = "is" if worst["number"] == 1 else "are"
    gap = (
        f"{_counted(worst['number'], what)} {verb} {-worst['mean']:.1f} ± "
        f"{worst['mean'] - worst['low']:.1f} points below {most}"
    )
    return gap + (f" and {after} is within noise of them" if after < most else "")


def _counted(n: int, what: str) -> str:
    return f"{n} {what.removesuffix('s') if n == 1 else what}"
