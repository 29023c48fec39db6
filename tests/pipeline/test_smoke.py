"""The whole pipeline in small sizes, as a person runs it: a clone, the smoke overlay, `dvc repro`.

python -m pytest tests/pipeline/test_smoke.py    # about four minutes
python -m pytest -m "not pipeline"               # everything else
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from mclip import params

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
STUDIES = ("students", "latency", "amount", "epoch", "pca", "weights", "search")


def call(clone: Path, *command: str, check: bool = True) -> str:
    """Run a command in the clone with this interpreter's commands first; its output, both streams."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHONPATH", "GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE")
    }
    env |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]]),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "DVC_NO_ANALYTICS": "1",
    }
    done = subprocess.run(
        command,
        cwd=clone,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
    )
    assert not check or done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-6000:]}"
    return done.stdout


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", output))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The working tree (with what isn't committed yet) as a repository of its own, and smoke laid
    over it.
    """
    clone = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        made = name.startswith("reports/") and not name.endswith("README.md")
        if (ROOT / name).is_file() and name != "dvc.lock" and not made:
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    params.apply_overlay(ROOT / "params/smoke.yaml", clone / "params.yaml")
    call(clone, "git", "init", "-q")
    call(clone, "git", "add", "-A")
    call(
        clone,
        "git",
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@localhost",
        "commit",
        "-qm",
        "smoke",
    )
    return clone


@pytest.fixture(scope="module")
def first(clone):
    start = time.monotonic()
    output = call(clone, "dvc", "repro")  # as `make repro` does
    print(f"smoke pipeline: {time.monotonic() - start:.0f} s")
    return output


def test_every_stage_runs_and_the_report_is_there(clone, first):
    recipes = params.load(clone / "params.yaml").distill.recipes
    expected = {"code", "data", "teachers", "embed", "balance", "cluster", "reinforce", "report"}
    expected |= {f"{stage}@{recipe}" for stage in ("distill", "evaluate") for recipe in recipes}
    assert expected <= ran(first)
    for name in STUDIES:  # smoke leaves them out
        assert f"ablations/{name}: left out" in first
        assert not (clone / f"reports/site/ablations-{name}.html").exists()
    assert (clone / "reports/site/index.html").stat().st_size > 1000
    for recipe in recipes:
        assert json.loads((clone / f"reports/metrics/{recipe}.json").read_text())


def test_executed_notebooks_are_whole_and_without_traces(clone, first):
    reports = [
        p for p in (clone / "reports").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
    ]
    assert len(reports) >= 8
    for path in reports:
        text = path.read_text()
        nbformat.validate(nbformat.reads(text, as_version=4))
        assert str(clone) not in text and sys.prefix not in text, path


def test_a_second_repro_runs_nothing(clone, first):
    output = call(clone, "dvc", "repro")
    assert not ran(output)
    assert "up to date" in output
    new = call(clone, "git", "status", "--porcelain").splitlines()
    assert not [line for line in new if line.startswith(("?? data", "?? models"))]


def test_ablations_costs_and_pictures(clone, first):
    """The stages that smoke leaves out; nothing else runs again but the report."""
    path = clone / "params.yaml"
    before = path.read_text()
    params.apply_overlay(Path(__file__).parent / "ablations.yaml", path)
    output = call(clone, "dvc", "repro")
    assert ran(output) == {"code", "ablate@terms", "ablate-learning@few-pairs", *STUDIES, "report"}
    for name in ("terms", "few-pairs", *STUDIES):
        assert (clone / f"reports/site/ablations-{name}.html").is_file()
    path.write_text(before)


def test_the_same_stage_writes_the_same_bytes(clone, first):
    before = (clone / "dvc.lock").read_text()
    output = call(clone, "dvc", "repro", "--force", "--single-item", "balance", "reinforce")
    assert ran(output) == {"balance", "reinforce"}
    assert (clone / "dvc.lock").read_text() == before


def test_one_changed_parameter_reruns_only_what_depends_on_it(clone, first):
    path = clone / "params.yaml"
    before = path.read_text()
    threshold = params.load(path).balance.threshold
    path.write_text(before.replace(f"threshold: {threshold}", "threshold: 0.4", 1))
    assert params.load(path).balance.threshold == 0.4
    output = call(clone, "dvc", "repro", "cluster")
    assert ran(output) == {
        "code",
        "balance",
        "cluster",
    }  # code: the same files, as params.yaml gives the threshold
    for name in ("data", "teachers", "embed"):
        assert f"Stage '{name}' didn't change, skipping" in output
    waiting = call(clone, "dvc", "status", check=False)
    assert "reinforce" in waiting and "distill@" in waiting


def test_an_edit_reruns_what_depends_on_it(clone, first):
    """A figure's look, a comment: data/code is written again, as it was. How links are found: not
    the trainings.
    """

    def edited(name: str, line: str) -> str:
        with open(clone / name, "a") as file:
            file.write(f"\n{line}\n")
        return call(clone, "dvc", "repro", "code")

    assert ran(edited("mclip/report/plots/charts.py", "EDITED = 1")) == {"code"}
    assert ran(edited("mclip/balance/links.py", "# edited")) == {"code"}
    waiting = call(clone, "dvc", "status", check=False)
    assert "data/code" not in waiting
    assert ran(edited("mclip/balance/links.py", "EDITED = 1")) == {"code"}
    waiting = call(clone, "dvc", "status", check=False)
    assert "data/code/balance" in waiting and not re.search(
        r"data/code/(distill|cluster|reinforce|evaluate)\b", waiting
    )


def test_an_unknown_parameter_stops_at_once(clone, first):
    path = clone / "params.yaml"
    before = path.read_text()
    path.write_text(before.replace("threshold:", "treshold:", 1))
    try:
        output = call(clone, "python", "-m", "mclip.pipeline.run", "balance", check=False)
    finally:
        path.write_text(before)
    assert "params.yaml: balance.treshold: unknown key; did you mean 'threshold'?" in output
