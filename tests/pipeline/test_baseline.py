"""A run that is kept under a name, compared, replaced, and brought back with its data."""

import subprocess
import sys
from pathlib import Path

import pytest

from mclip import cli
from mclip.pipeline import baseline

DVC_YAML = """
stages:
  train:
    cmd: python train.py
    params: [lr]
    outs:
      - model.txt
      - reports/metrics/clip.csv: {cache: false}
"""
TRAIN = """
import pathlib
lr = pathlib.Path("params.yaml").read_text().split()[1]
pathlib.Path("model.txt").write_text(f"model {lr}")
rows = [f"clip,pets,unseen,classification,top1,{s},{float(lr) + s / 100},0.1,top1" for s in (0, 1, 2)]
head = "recipe,set,kind,task,metric,seed,value,chance,main"
pathlib.Path("reports/metrics").mkdir(parents=True, exist_ok=True)
pathlib.Path("reports/metrics/clip.csv").write_text("\\n".join([head, *rows]))
"""


def call(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def dvc(*words):
    return call(sys.executable, "-m", "dvc", *words)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A finished run at lr 0.2, committed."""
    monkeypatch.chdir(tmp_path)
    for key in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{key}_NAME", "me")
        monkeypatch.setenv(f"GIT_{key}_EMAIL", "me@example.org")
    call("git", "init", "-q")
    dvc("init", "-q")
    Path("dvc.yaml").write_text(DVC_YAML.replace("python", sys.executable))
    Path("train.py").write_text(TRAIN)
    Path(".gitignore").write_text("/model.txt\n")
    run("0.2")
    call("git", "add", "-A")
    call("git", "commit", "-qm", "the default run")
    return tmp_path


def run(lr):
    Path("params.yaml").write_text(f"lr: {lr}\n")
    dvc("repro", "-q")


def state():
    files = ("params.yaml", "dvc.lock", "model.txt", "reports/metrics/clip.csv")
    return [Path(file).read_text() for file in files]


@pytest.mark.slow
def test_a_saved_run_comes_back_with_its_data_and_so_does_the_last_one(repository, capsys):
    default = state()
    run("0.5")
    mine, status = state(), call("git", "status", "--porcelain")
    head = call("git", "rev-parse", "HEAD")
    assert cli.main(["save", "mine"]) == 0
    assert (state(), call("git", "status", "--porcelain")) == (mine, status)  # nothing changed
    assert cli.main(["save", "mine"]) == 2
    assert "there is a branch of that name" in capsys.readouterr().err

    run("0.6")  # not saved: `back` does
    Path("notes").mkdir()
    Path("notes/new.txt").write_text("untracked")
    latest = state()
    assert cli.main(["back", "HEAD"]) == 0
    assert state() == default and not Path("notes/new.txt").exists()
    assert cli.main(["back", "last-run"]) == 0
    assert state() == latest and Path("notes/new.txt").read_text() == "untracked"
    assert cli.main(["back", "mine"]) == 0
    assert state() == mine
    assert dvc("status") == "Data and pipelines are up to date.\n"
    assert call("git", "rev-parse", "HEAD") == head
    assert "lr" in dvc("params", "diff", "HEAD", "mine")  # DVC knows the branch


@pytest.mark.slow
def test_compare_shows_parameters_and_differences_with_intervals(repository, capsys):
    run("0.5")
    baseline.save("mine")
    parameters, metrics = baseline.compare("HEAD", "mine")
    assert parameters.to_dict("records") == [{"parameter": "lr", "a": 0.2, "b": 0.5}]
    row = metrics[metrics["set"] == "pets"].iloc[0]
    assert (row["a"], row["b"], row["difference"]) == pytest.approx((21, 51, 30))
    assert row["low"] < 30 < row["high"] and row["low"] == pytest.approx(30 - 2.27, abs=0.01)

    assert cli.main(["compare", "HEAD"]) == 0  # with what is there now
    said = capsys.readouterr().out
    assert "lr: 0.2 -> 0.5" in said and "+30.0 (+27.7 to +32.3)" in said
    run("0.5001")
    assert cli.main(["compare", "mine"]) == 0
    assert "within noise" in capsys.readouterr().out
    assert cli.main(["compare", "nothing"]) == 2
    assert "nothing: no such run or revision" in capsys.readouterr().err


@pytest.mark.slow
def test_an_output_that_is_in_no_cache_is_not_deleted(repository, capsys):
    run("0.5")
    baseline.save("mine")
    mine = state()
    Path("model.txt").write_text("of a stage that was killed")
    assert cli.main(["back", "HEAD"]) == 2
    assert "undo: `mclip back last-run`" in capsys.readouterr().err
    assert Path("model.txt").read_text() == "of a stage that was killed"
    assert cli.main(["back", "last-run"]) == 2  # the same output, still in no cache
    assert Path("dvc.lock").read_text() == mine[1]


@pytest.mark.slow
def test_another_machine_gets_a_saved_run(repository, tmp_path_factory, monkeypatch):
    away, there = tmp_path_factory.mktemp("away"), tmp_path_factory.mktemp("there") / "clone"
    call("git", "init", "-q", "--bare", str(away / "git"))
    call("git", "remote", "add", "origin", str(away / "git"))
    dvc("remote", "add", "-d", "storage", str(away / "dvc"))
    call("git", "commit", "-qam", "storage")
    call("git", "push", "-q", "origin", "HEAD:main")
    run("0.5")
    mine = state()
    baseline.save("mine")
    call("git", "push", "-q", "origin", "mine")
    dvc("push", "-q", "--all-branches")

    call("git", "clone", "-q", "-b", "main", str(away / "git"), str(there))
    monkeypatch.chdir(there)
    call("git", "fetch", "-q", "origin", "mine:mine")
    dvc("fetch", "-q", "--all-branches")
    baseline.back("mine")
    assert state() == mine
