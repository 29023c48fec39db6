"""Ablations: variants of a recipe or of its data, trained alike, scored alike (notebooks/ablations).

    shared = ablate.Shared.of(p)                                         # p: the stage's parameters
    runs = ablate.plan(study, recipe, shared, samples=7680, seeds=[0, 1])
    ablate.train(runs)
    frame = ablate.score("terms", runs, p.evaluate.sets, batch_size=128)  # writes reports/metrics/ablations/terms.*

A study trains whatever no other has trained yet: finished runs lie in `CACHE`, named by all that their bytes depend on
(the student, the recipe, the trainer's settings and code, the seed, the data). So a baseline that several studies share
is trained once, a killed study goes on where it stopped, and a new variant trains only itself. Without the cache
each study trains its own, to the same bytes; `rm -r data/cache/ablations` is always safe.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from . import compare, derive, distill, evaluate, models
from .files import write_whole
from .params import Balance, Cluster, EvalSet, Learning, Recipe, Study, Train, varied
from .runs import Run

CACHE = Path("data/cache/ablations")
METRICS = Path("reports/metrics/ablations")
CODE = ("cluster.py", "data/augment.py", "data/reinforced.py", "data/shards.py", "data/training.py", "kernels",
        "losses", "models", "runs.py", "train.py")
UNSEEN = {"parallel_runs", "checkpoint_every"}  # of distill.train: never seen in what a run gives


@dataclass(frozen=True)
class Shared:
    """What all variants have in common: the student, its trainer, what their data derive from."""

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


def plan(study: Study, recipe: Recipe, shared: Shared, *, samples: int, seeds: Sequence[int]) -> dict[str, list[Run]]:
    """Each variant's runs, a run a seed; data that a variant needs and no stage made are made here.

    Parameters
    ----------
    recipe : the one the study names.
    samples, seeds : where the study has none of its own.
    """
    runs = {}
    for name, variant in study.variants.items():
        changed = varied(recipe, variant.recipe)
        data, teacher = derive.folders(variant, changed, shared.balance, shared.cluster, cache=shared.cache,
                                       data=shared.data)
        runs[name] = _runs(name, changed, shared, study.samples or samples, study.seeds or seeds, teacher, data)
    return runs


def plan_learning(curve: Learning, recipes: Mapping[str, Recipe], shared: Shared, *, seeds: Sequence[int],
                  finished_seeds: Sequence[int], students: str | Path = "models/students") -> dict[str, list[Run]]:
    """The runs of a learning curve, "RECIPE SAMPLES" -> runs; each length is a training of its own, its own cosine.

    At distill's own number of samples they are its finished students. Raises FileNotFoundError where these are missing.
    """
    runs, full = {}, shared.train.samples
    for recipe in dict.fromkeys([*curve.recipes, curve.baseline]):
        lengths = dict.fromkeys(curve.samples, seeds)
        if recipe == curve.baseline:
            lengths |= dict.fromkeys(curve.longer, curve.longer_seeds)
        data = derive.FOLDERS | shared.data
        for samples, which in sorted((lengths | {full: finished_seeds}).items()):
            key = f"{recipe} {samples}"
            if samples != full:
                runs[key] = _runs(recipe, recipes[recipe], shared, samples, which, shared.cluster.teacher, data)
                continue
            runs[key] = distill.plan(recipe, recipes[recipe], shared.student, shared.train, list(which), data=data,
                                     teacher=shared.cluster.teacher, out=students)
            if missing := [run.out for run in runs[key] if not distill.finished(run)]:
                raise FileNotFoundError(f"{missing[0]} is missing: run `dvc repro distill@{recipe}` first")
    return runs


def _runs(name: str, recipe: Recipe, shared: Shared, samples: int, seeds: Sequence[int], teacher: str | None,
          data: dict[str, str]) -> list[Run]:
    train = shared.train.model_copy(update={"samples": samples})
    runs = distill.plan(name, recipe, shared.student, train, list(seeds), teacher=teacher, data=data)
    found = []
    for run in runs:
        key = identity(run)
        found.append(replace(run, out=str(shared.cache / "runs" / key), scratch=str(shared.cache / "scratch" / key)))
    return found


def identity(run: Run) -> str:
    """Digest of all that a run's result depends on, whatever it is called and wherever its data lie."""
    spec = asdict(run.data)
    reads = {"pairs": run.data.pairs}
    if run.data.pairs_kind == "kept":
        reads["balance"] = run.data.balance
    if run.data.pairs_kind == "reinforced":
        reads["reinforced"] = run.data.reinforced
    if run.data.teacher is not None:
        reads |= {"clusters": run.data.clusters, "embeddings": f"{run.data.embeddings}/{run.data.teacher}"}
    for folder in [*derive.FOLDERS, "cache"]:
        del spec[folder]
    return derive.digest({
        "student": [run.student, distill._configuration(run.student)],
        "recipe": run.recipe.model_dump(exclude={"title"}),
        "train": run.train.model_dump(exclude=UNSEEN),
        "seed": run.seed,
        "set": spec,
        "data": {name: derive.fingerprint(folder) for name, folder in reads.items()},
        "code": derive.code(CODE),
        "versions": [version(name) for name in ("torch", "open_clip_torch", "timm")],
    })


def train(runs: Mapping[str, Sequence[Run]], *, cache: Path = CACHE) -> dict[str, int]:
    """Train what is not there yet, all variants and seeds side by side; {"trained": runs, "reused": runs}."""
    each = {run.out: run for own in runs.values() for run in own}
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "training.lock"):  # two studies may want the same run
        todo = [run for run in each.values() if not distill.finished(run)]
        if todo:
            distill.train_all(todo)
    return {"trained": len(todo), "reused": len(each) - len(todo)}


def score(study: str, runs: Mapping[str, Sequence[Run]], sets: Mapping[str, EvalSet], *, batch_size: int,
          folder: str | Path = METRICS) -> pd.DataFrame:
    """Evaluate every run without linear probes and write `folder`/STUDY.csv, every seed, and STUDY.json for DVC.

    Returns
    -------
    compare.COLUMNS; `recipe` holds the variant. Pictures are decoded once for all students.
    """
    sets = {name: spec.model_copy(update={"probe": False}) for name, spec in sets.items()}
    where = {out: i for i, out in enumerate(dict.fromkeys(run.out for own in runs.values() for run in own))}
    loaded = [models.create(f"local-dir:{out}") for out in where]
    _, _, preprocess, tokenizer = loaded[0]
    students = [models.for_inference(model) for model, *_ in loaded]
    result = evaluate.evaluate_many(students, preprocess, tokenizer, sets, batch_size=batch_size)
    for line in result.problems:
        print(line)
    rows, tree = [], {}
    for variant, own in runs.items():
        metrics = [result.metrics[where[run.out]] for run in own]
        tree[variant] = evaluate.summary(metrics, sets)
        rows += [(variant, name, sets[name].kind, sets[name].task, metric, run.seed, round(values[name][metric], 6),
                  round(chance, 6))
                 for name in result.chance for metric, chance in result.chance[name].items()
                 for run, values in zip(own, metrics, strict=True)]
    frame = pd.DataFrame(rows, columns=compare.COLUMNS)
    write_whole(Path(folder) / f"{study}.json", json.dumps(tree, indent=1, allow_nan=False) + "\n")
    write_whole(Path(folder) / f"{study}.csv", frame.to_csv(index=False, lineterminator="\n"))
    return frame


def by_samples(main: pd.DataFrame) -> pd.DataFrame:
    """The frame of a learning curve with its variants, "RECIPE SAMPLES", as columns recipe and samples."""
    parts = main["recipe"].str.rsplit(" ", n=1)
    return main.assign(recipe=parts.str[0], samples=parts.str[1].astype(int))


def titles(study: Study) -> dict[str, str]:
    """Variant -> what to call it."""
    return {name: variant.title or name for name, variant in study.variants.items()}


def pairs(runs: Mapping[str, Sequence[Run]]) -> dict[str, int]:
    """Variant -> how many pairs it trained on."""
    return {name: distill.facts(own[0])["pairs"] for name, own in runs.items()}
