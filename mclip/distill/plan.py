"""Train the student with one recipe, a run a seed (papers.md 1.5, 2.2, 2.3).

`runs_of` says what to run, `run_recipe` starts `mclip.distill.trainer` for each: torchrun with
`distill.train.processes` processes, `parallel_runs` of them side by side. A run that was finished
by a killed stage is not trained again; one that was under way goes on at its checkpoint. Both only
where all that its result depends on is the same (`mclip.distill.identity`): else it is trained
from the start, in the same folders. Importing this module takes neither torch nor open_clip.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mclip.distill import terms
from mclip.distill.identity import identity
from mclip.distill.pairs import TrainingSet
from mclip.distill.runs import Run
from mclip.params import Recipe, Train
from mclip.pipeline import code, warm

if TYPE_CHECKING:  # named or started as a process: an edit is one of this module (pipeline.code)
    from mclip.distill import pixels  # noqa: F401
    from mclip.distill import trainer as train  # noqa: F401

SCRATCH = Path("data/cache/runs")


class TrainingError(RuntimeError):
    """A training process failed; the message has its last words and where the whole log is."""


def runs_of(
    name: str,
    recipe: Recipe,
    student: str,
    train: Train,
    seeds: Sequence[int],
    *,
    teacher: str | None,
    data: dict[str, Any] | None = None,
    out: str | Path = "models/students",
    scratch: Path = SCRATCH,
) -> list[Run]:
    """The runs of a recipe, one a seed.

    Parameters
    ----------
    teacher : name of the cluster teacher, a folder of data/embeddings; used where a term of the
        recipe needs it.
    data : overrides of TrainingSet, such as its folders.

    Raises
    ------
    FileNotFoundError
        Data that the recipe reads are missing; the message names the stage to run.
    """
    spec = TrainingSet(
        which=recipe.pairs,
        use_reinforced=recipe.reinforced,
        teacher=teacher if "teacher" in terms.needs(recipe.weight) else None,
        synthetic=recipe.synthetic,
        light_scale_min=train.light_scale_min,
        light_views=train.light_views,
        pictures_code=code.code("mclip.distill.pixels"),
        **(data or {}),
    )
    runs = [
        Run(
            name=name,
            seed=seed,
            student=student,
            train=train,
            recipe=recipe,
            data=spec,
            out=str(Path(out) / name / f"seed{seed}"),
            scratch=str(scratch / f"{name}-{seed}"),
        )
        for seed in seeds
    ]
    return [replace(run, identity=identity(run)) for run in runs]


def run_recipe(runs: list[Run], *, side_by_side: int | None = None) -> pd.DataFrame:
    """`train_all`, then the histories of all seeds: columns seed, step, samples, lr, logit_scale,
    loss, one a term.
    """
    train_all(runs, side_by_side=side_by_side)
    return history(runs)


def finished(run: Run) -> bool:
    """Is there nothing left to train? A student of another identity is not this run's."""
    written = all((Path(run.out) / name).exists() for name in ("history.csv", "training.json"))
    return written and facts(run).get("identity") == run.identity


def train_all(runs: list[Run], *, side_by_side: int | None = None) -> None:
    """Train those of the runs that aren't finished, `parallel_runs` side by side, the longest
    first.

    Raises TrainingError with the last lines of the log of the first run that failed; the others are
    stopped, their checkpoints stay.
    """
    todo = {run.out: run for run in runs if not finished(run)}
    waiting, running = sorted(todo.values(), key=lambda run: -run.train.samples), {}
    limit = side_by_side or runs[0].train.parallel_runs
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                run = waiting.pop(0)
                running[run.out] = (run, _start(run))
            for out, (run, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[out]
                    if code:
                        raise TrainingError(_last_words(run, code))
                    shutil.rmtree(run.scratch, ignore_errors=True)
            time.sleep(0.2)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def history(runs: list[Run]) -> pd.DataFrame:
    """The histories of finished runs, one after the other, with a column `seed`."""
    tables = [pd.read_csv(Path(r.out) / "history.csv").assign(seed=r.seed) for r in runs]
    return pd.concat(tables, ignore_index=True)


def _start(run: Run) -> subprocess.Popen:
    scratch = Path(run.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    run.save(scratch / "run.json")
    arguments = ["mclip.distill.trainer", str(scratch / "run.json")]
    command = warm.command(*arguments)
    if run.train.processes > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={run.train.processes}",
            "-m",
            *arguments,
        ]
    env = dict(os.environ)
    if run.train.threads:
        # before torch starts: its pool, and OpenMP's, are sized once; no busy waiting where runs
        # share cores
        env |= {
            "OMP_NUM_THREADS": str(run.train.threads),
            "MKL_NUM_THREADS": str(run.train.threads),
        }
    # the log takes what the run prints; its progress bar goes to the terminal by MCLIP_PROGRESS
    with open(scratch / "log.txt", "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, stdin=subprocess.DEVNULL
        )


def _last_words(run: Run, code: int) -> str:
    log = Path(run.scratch) / "log.txt"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    return (
        f"{run.name} seed {run.seed} ended with exit status {code}; the whole log is {log}\n{tail}"
    )


def facts(run: Run) -> dict[str, Any]:
    """Of a finished run: pairs it trained on, parameters of its image and of its text tower, its
    identity.
    """
    return json.loads((Path(run.out) / "training.json").read_text())
