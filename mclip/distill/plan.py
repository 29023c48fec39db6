"""Train the student with one recipe, one run a seed (papers.md 1.5, 2.2, 2.3).

`runs_of` plans the runs. `run_recipe` starts `mclip.distill.trainer` for each, `parallel_runs` of
them side by side, each in a process of its own (torchrun starts `distill.train.processes` below
it), and copies the finished students to the stage's folder. Importing this module imports neither
torch nor open_clip.

A run lies in `CACHE` under its identity, the digest of everything that its result depends on
(`mclip.distill.identity`). So stages and studies that ask for the same run share it, a killed one
continues at its checkpoint, finished seeds outlive the folder that DVC empties before a stage, and
a run of other data or settings is never taken for this one. `rm -r` of `CACHE` is always safe: what
is asked for again is trained again, to the same bytes.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mclip.distill import terms
from mclip.distill.identity import identity
from mclip.distill.pairs import TrainingSet
from mclip.distill.runs import Run
from mclip.params import Recipe, Train
from mclip.system.processes import end_family, end_with_parent
from mclip.system.source import code_digest

if TYPE_CHECKING:  # named by identity: an edit of it is one of this module (mclip.system.source)
    from mclip.distill import pixels  # noqa: F401

CACHE = Path("data/cache/students")


class TrainingError(RuntimeError):
    """A training process failed; the message has the end of its log and the log's path."""


def runs_of(
    name: str,
    recipe: Recipe,
    student: str,
    train: Train,
    seeds: Sequence[int],
    *,
    teacher: str | None,
    data: dict[str, Any] | None = None,
    cache: Path = CACHE,
) -> list[Run]:
    """The runs of a recipe, one a seed.

    Parameters
    ----------
    teacher : name of the cluster teacher, a folder of data/embeddings; used where a term of the
        recipe needs it.
    data : overrides of TrainingSet, such as its folders.
    cache : where runs lie, `runs/IDENTITY` once they are finished.

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
        pictures_code=code_digest("mclip.distill.pixels"),
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
            out="",
            scratch="",
        )
        for seed in seeds
    ]
    return [_placed(run, identity(run), cache) for run in runs]


def _placed(run: Run, name: str, cache: Path) -> Run:
    out, scratch = (str(cache / part / name) for part in ("runs", "scratch"))
    return replace(run, identity=name, out=out, scratch=scratch)


def run_recipe(
    runs: list[Run], *, folder: str | Path = "models/students", side_by_side: int | None = None
) -> pd.DataFrame:
    """Train what is missing and copy all to `folder`/RECIPE/seedN.

    Returns
    -------
    DataFrame
        The histories of all seeds: columns seed, step, samples, lr, logit_scale, loss, one a term.
    """
    train_all(runs, side_by_side=side_by_side)
    for run in runs:
        place = Path(folder) / run.name / f"seed{run.seed}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(run.out, place)
    return history(runs)


def finished(run: Run) -> bool:
    """Is a run trained already? A student of another identity does not count."""
    written = all((Path(run.out) / name).exists() for name in ("history.csv", "training.json"))
    return written and facts(run).get("identity") == run.identity


def train_all(runs: list[Run], *, side_by_side: int | None = None) -> None:
    """Train the unfinished runs, `parallel_runs` side by side, the longest first.

    Trainings are processes of multiprocessing: a script calls this below `if __name__ ==
    "__main__"`.

    Raises TrainingError with the last lines of the log of the first run that failed; the others are
    stopped, their checkpoints stay.
    """
    todo = {run.out: run for run in runs if not finished(run)}
    waiting = sorted(todo.values(), key=lambda run: -run.train.samples)
    running: dict[int, tuple[Run, BaseProcess]] = {}  # by sentinel
    limit = side_by_side or runs[0].train.parallel_runs
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                process = _start(waiting[0])
                running[process.sentinel] = (waiting.pop(0), process)
            for sentinel in wait(list(running)):
                run, process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise TrainingError(_last_words(run, process.exitcode))
                shutil.rmtree(run.scratch, ignore_errors=True)
    finally:
        for _, process in running.values():
            end_family(process.pid)


def history(runs: list[Run]) -> pd.DataFrame:
    """The histories of finished runs, one after the other, with a column `seed`."""
    tables = [pd.read_csv(Path(r.out) / "history.csv").assign(seed=r.seed) for r in runs]
    return pd.concat(tables, ignore_index=True)


def _start(run: Run) -> BaseProcess:
    """Start a training as a fork of a process that has imported the trainer: 0.1 s instead of 8.

    Where there is an NVIDIA GPU each imports for itself: a library that has asked for devices can't
    be forked.
    """
    scratch = Path(run.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    run.save(scratch / "run.json")
    (scratch / "log.txt").touch()  # it may be killed before it opens it
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if not Path("/dev/nvidiactl").exists():
        context.set_forkserver_preload([__name__, "mclip.distill.trainer"])
    process = context.Process(target=_train, args=(run, dict(os.environ)))
    process.start()
    return process


def _train(run: Run, environment: dict[str, str]) -> None:
    """The process of a training; its log takes what it prints, its bar goes to MCLIP_PROGRESS."""
    end_with_parent()
    multiprocessing.set_start_method(None, force=True)  # decoders start as in any other process
    scratch = Path(run.scratch)
    with open(scratch / "log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()  # a fork has what was there when the first one was started
    os.environ.update(environment)
    if run.train.threads:  # for what is started below; the trainer sets torch's own
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(run.train.threads)
    arguments = [str(scratch / "run.json")]
    if run.train.processes == 1:
        from mclip.distill import trainer

        return trainer.main(arguments)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={run.train.processes}", "-m", "mclip.distill.trainer"]
    sys.exit(subprocess.call(launcher + arguments, stdin=subprocess.DEVNULL))


def _last_words(run: Run, code: int) -> str:
    log = Path(run.scratch) / "log.txt"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    return (
        f"{run.name} seed {run.seed} ended with exit status {code}; the whole log is {log}\n{tail}"
    )


def facts(run: Run) -> dict[str, Any]:
    """Facts of a finished run: pairs trained on, parameters of both towers, precision, identity."""
    return json.loads((Path(run.out) / "training.json").read_text())
