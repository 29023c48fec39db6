"""Ablations: variants of a recipe or of its data, trained alike, scored alike.

    # p: the stage's parameters; plans, trains, scores, in that order:
    study = ablate.outcome("terms", p)

    runs = ablate.plan(study, recipe, ablate.Shared.of(p), samples=7680, seeds=[0, 1])
    # trains, scores, writes reports/metrics/ablations/terms.*
    main = ablate.finish("terms", runs, p)

A study trains only what neither `distill` nor another study has trained yet: finished runs
(`mclip.distill.plan`) and their scores are kept in `CACHE`. So a baseline that several studies
share is trained and scored once, and a new variant trains only itself.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from filelock import FileLock

from mclip import evaluate, models
from mclip.data.stores.metrics import write_items
from mclip.distill import plan as distill
from mclip.distill.runs import Run
from mclip.evaluate import scores as tables
from mclip.params import Balance, Cluster, EvalSet, Learning, Recipe, Study, Train
from mclip.params.tree import varied
from mclip.report import compare
from mclip.studies import derive
from mclip.system.files import digest, write_whole
from mclip.system.source import code_digest

if TYPE_CHECKING:  # a run is named by its code (`identity`), which `distill` starts as a process
    import mclip.distill.trainer  # noqa: F401

CACHE = distill.CACHE
METRICS = Path("reports/metrics/ablations")
PACKAGES = ("torch", "open_clip_torch", "timm")
# after a recipe's name: its finished student, beside a curve on a fraction of them
ON_ALL = " on all pairs"


@dataclass(frozen=True)
class Shared:
    """What all variants share: the student, its trainer, and the sources of their data."""

    student: str
    train: Train
    balance: Balance
    cluster: Cluster
    data: dict[str, str] = field(default_factory=dict)  # folders other than the stages'
    cache: Path = CACHE

    @classmethod
    def of(cls, p: Any) -> "Shared":
        """From a stage's parameters."""
        return cls(p.distill.student, p.distill.train, p.balance, p.cluster)


def plan(
    study: Study, recipe: Recipe, shared: Shared, *, samples: int, seeds: Sequence[int]
) -> dict[str, list[Run]]:
    """Each variant's runs, a run a seed; data that a variant needs and no stage made are made here.

    Parameters
    ----------
    recipe : the one the study names.
    samples, seeds : where the study has none of its own.
    """
    runs = {}
    for name, variant in study.variants.items():
        changed = varied(recipe, variant.recipe)
        teacher: str | None = shared.cluster.teacher
        if variant.fraction < 1:
            data = derive.part(
                variant.fraction, changed, shared.cluster, cache=shared.cache, data=shared.data
            )
        else:
            data, teacher = derive.folders(
                variant,
                changed,
                shared.balance,
                shared.cluster,
                cache=shared.cache,
                data=shared.data,
            )
        length = variant.samples or study.samples or samples
        runs[name] = runs_of(name, changed, shared, length, study.seeds or seeds, teacher, data)
    return runs


def plan_learning(
    curve: Learning,
    recipes: Mapping[str, Recipe],
    shared: Shared,
    *,
    seeds: Sequence[int],
    finished_seeds: Sequence[int],
) -> dict[str, list[Run]]:
    """The runs of a learning curve, "RECIPE SAMPLES" -> runs; each length is a training of its own,
    its own cosine.

    At distill's own number of samples they are its students, which are trained already. With a
    fraction of the pairs these stand beside the curve, as recipe "RECIPE on all pairs".
    """
    runs: dict[str, list[Run]] = {}
    full = shared.train.samples
    whole = curve.fraction == 1
    for recipe in dict.fromkeys([*curve.recipes, curve.baseline]):
        lengths = dict.fromkeys(curve.samples, seeds)
        if recipe == curve.baseline:
            lengths |= dict.fromkeys(curve.longer, curve.longer_seeds)
        if whole:
            lengths.pop(full, None)
        data = derive.part(
            curve.fraction, recipes[recipe], shared.cluster, cache=shared.cache, data=shared.data
        )
        own = {
            (samples, recipe): runs_of(
                recipe, recipes[recipe], shared, samples, which, shared.cluster.teacher, data
            )
            for samples, which in lengths.items()
        }
        own[full, recipe if whole else recipe + ON_ALL] = runs_of(
            recipe,
            recipes[recipe],
            shared,
            full,
            finished_seeds,
            shared.cluster.teacher,
            derive.FOLDERS | shared.data,
        )
        runs |= {f"{name} {samples}": own[samples, name] for samples, name in sorted(own)}
    return runs


def runs_of(
    name: str,
    recipe: Recipe,
    shared: Shared,
    samples: int,
    seeds: Sequence[int],
    teacher: str | None,
    data: dict[str, Any],
) -> list[Run]:
    """The runs of a recipe with the student and the trainer that all variants share, for so many
    samples.
    """
    train = shared.train.model_copy(update={"samples": samples})
    return distill.runs_of(
        name, recipe, shared.student, train, seeds, teacher=teacher, data=data, cache=shared.cache
    )


def train(runs: Mapping[str, Sequence[Run]], *, cache: Path = CACHE) -> dict[str, int]:
    """Train the missing runs of all variants side by side; {"trained": runs, "reused": runs}."""
    each = {run.out: run for own in runs.values() for run in own}
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "training.lock"):  # two studies may want the same run
        todo = [run for run in each.values() if not distill.finished(run)]
        if todo:
            distill.train_all(todo)
    return {"trained": len(todo), "reused": len(each) - len(todo)}


class Scores(NamedTuple):
    """What runs score, without linear probes."""

    metrics: dict[
        str, dict[str, dict[str, float]]
    ]  # a run's folder -> set -> metric; a missing set has no metrics
    chance: dict[str, dict[str, float]]
    problems: list[str]
    items: dict[str, dict[str, dict[str, float]]]  # a run's folder -> set -> picture -> share


def scores(
    runs: Iterable[Run], sets: Mapping[str, EvalSet], *, batch_size: int, cache: Path = CACHE
) -> Scores:
    """Evaluate finished runs, reusing cached scores where the same weights were already evaluated.

    Their scores lie in `cache`, named by the weights, the sets, and the code. Pictures are decoded
    once for all.
    """
    sets = {name: spec.model_copy(update={"probe": False}) for name, spec in sets.items()}
    asked = [
        batch_size,
        [(name, spec.model_dump(), _test_files(spec.path)) for name, spec in sets.items()],
        code_digest("mclip.evaluate"),
        [version(name) for name in (*PACKAGES, "torchvision", "pillow")],
    ]
    files = {}
    for out in dict.fromkeys(run.out for run in runs):
        weights = (
            models.weights_sha256(f"local-dir:{out}"),
            (Path(out) / "open_clip_config.json").read_text(),
        )
        files[out] = cache / "scores" / f"{digest([weights, asked])}.json"
    if todo := [out for out, file in files.items() if not file.exists()]:
        loaded = [models.create(f"local-dir:{out}") for out in todo]
        _, _, preprocess, tokenizer = loaded[0]
        students = [models.for_inference(model) for model, *_ in loaded]
        result = evaluate.evaluate_many(
            students, preprocess, tokenizer, sets, batch_size=batch_size
        )
        for out, metrics, items in zip(todo, result.metrics, result.items, strict=True):
            entry = {
                "metrics": metrics,
                "chance": result.chance,
                "problems": result.problems,
                "items": items,
            }
            write_whole(files[out], json.dumps(entry, allow_nan=False) + "\n")
    found = {out: json.loads(file.read_text()) for out, file in files.items()}
    first = next(iter(found.values()))
    return Scores(
        {out: entry["metrics"] for out, entry in found.items()},
        first["chance"],
        first["problems"],
        {out: entry["items"] for out, entry in found.items()},
    )


def _test_files(folder: str) -> list[tuple[str, str]]:
    """The files of a set that zero-shot and retrieval read, by checksum; none without the set."""
    files = sorted(
        path for part in ("*", "test/*") for path in Path(folder).glob(part) if path.is_file()
    )
    found = []
    for path in files:
        with open(path, "rb") as file:
            found.append((str(path), hashlib.file_digest(file, "sha256").hexdigest()))
    return found


def score(
    study: str,
    runs: Mapping[str, Sequence[Run]],
    sets: Mapping[str, EvalSet],
    *,
    batch_size: int,
    folder: str | Path = METRICS,
    cache: Path = CACHE,
) -> pd.DataFrame:
    """The `scores` of every run; writes `folder`/STUDY.csv, every seed, and STUDY.json for DVC.

    Returns
    -------
    stores.metrics.COLUMNS; `recipe` holds the variant.
    """
    found = scores(
        (run for own in runs.values() for run in own), sets, batch_size=batch_size, cache=cache
    )
    for line in found.problems:
        print(line)
    seeds = {variant: [run.seed for run in own] for variant, own in runs.items()}
    write_items(
        study,
        {variant: [found.items[run.out] for run in own] for variant, own in runs.items()},
        seeds,
        folder,
    )
    return tables.write_all(
        study,
        {variant: [found.metrics[run.out] for run in own] for variant, own in runs.items()},
        seeds,
        found.chance,
        sets,
        folder,
    )


def finish(study: str, runs: Mapping[str, Sequence[Run]], p: Any) -> pd.DataFrame:
    """`train` and `score` of what is planned, on a stage's evaluation sets; the frame of
    compare.main_metric.
    """
    train(runs)
    return compare.main_metric(
        score(study, runs, p.evaluate.sets, batch_size=p.evaluate.batch_size)
    )


class Outcome(NamedTuple):
    """A study that has been trained and scored."""

    spec: Study | Learning
    runs: dict[str, list[Run]]
    main: pd.DataFrame  # of compare.main_metric; `recipe` holds the variant
    titles: dict[str, str]  # variant -> what to call it

    @property
    def first(self) -> str:
        """The variant that the others are held against."""
        return next(iter(self.runs))

    @property
    def sets(self) -> list[str]:
        """The held-out mean, then every set that is there."""
        return list(dict.fromkeys(self.main["set"]))


def outcome(name: str, p: Any) -> Outcome:
    """Plan, train and score a study of a stage's parameters."""
    study = p.ablations.studies[name]
    runs = plan(
        study,
        p.distill.recipes[study.recipe],
        Shared.of(p),
        samples=p.ablations.samples,
        seeds=p.ablations.seeds,
    )
    main = finish(name, runs, p)
    first = next(iter(runs.values()))
    lengths = " or ".join(
        f"{n:,}" for n in dict.fromkeys(own[0].train.samples for own in runs.values())
    )
    print(f"{len(runs)} variants of {study.recipe}, {len(first)} seed(s), {lengths} samples a run")
    titles = {name: variant.title or name for name, variant in study.variants.items()}
    return Outcome(study, runs, main, titles)


def learning(name: str, p: Any) -> Outcome:
    """Plan, train and score a learning curve of a stage's parameters, titled as the recipes."""
    curve, recipes = p.ablations.learning[name], p.distill.recipes
    runs = plan_learning(
        curve, recipes, Shared.of(p), seeds=p.ablations.seeds, finished_seeds=p.distill.seeds
    )
    return Outcome(
        curve, runs, finish(name, runs, p), {name: recipe.title for name, recipe in recipes.items()}
    )


def by_samples(main: pd.DataFrame) -> pd.DataFrame:
    """The frame of a learning curve with its variants, "RECIPE SAMPLES", as columns recipe and
    samples.
    """
    parts = main["recipe"].str.rsplit(" ", n=1)
    return main.assign(recipe=parts.str[0], samples=parts.str[1].astype(int))


def seed_counts(main: pd.DataFrame) -> pd.DataFrame:
    """How many seeds each recipe of a learning curve has, a row a number of samples."""
    first = main[main["set"] == main["set"].iloc[0]]
    counts = first.groupby(["recipe", "samples"], sort=False)["seed"].nunique().unstack(0)
    return counts.sort_index().rename_axis("samples")


def pairs(runs: Mapping[str, Sequence[Run]]) -> dict[str, int]:
    """Variant -> how many pairs it trained on."""
    return {name: distill.facts(own[0])["pairs"] for name, own in runs.items()}
