"""What a notebook says when a stage before it has not run: the stages of dvc.yaml, read as dvc
reads them.
"""

import ast
import re
import shlex
import shutil
from pathlib import Path

import nbformat
import pytest

from mclip.params import ParamsError
from mclip.pipeline import needs, strip

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {
    str(path.relative_to(ROOT / "notebooks").with_suffix("")): path
    for path in strip.notebooks(ROOT / "notebooks")
}

DVC = """
stages:
  data: {cmd: make data, outs: [data/pairs]}
  train:
    foreach: ${recipes}
    do:
      deps: [mclip/x.py, data/code/train, data/pairs, {models/base: {}}]
      cmd: train ${key} ${item.lr}
      outs: ["models/${key}"]
      metrics: ["reports/metrics/${key}.json": {cache: false}]
  each: {foreach: [1, 2], do: {deps: [data/pairs], outs: ["data/each${item}"]}}
  grid: {matrix: {r: "${names}", k: [1, 2]}, cmd: "g ${item.r}", deps: ["models/${item.r}"], outs: ["data/${item.r}-${item.k}"]}
  show: {deps: [data/pairs, "models/${names[0]}", reports/metrics, reports/train.ipynb], outs: [reports/show.ipynb]}
"""
PARAMS = "{recipes: {a: {lr: 0.1}, b: {lr: 0.2}}, names: [a, b]}"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "dvc.yaml").write_text(DVC)
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path


def fill(root, *paths):
    for path in paths:
        (root / path).mkdir(parents=True, exist_ok=True)
        (root / path / "file").touch()


def test_stages_have_dvcs_names_and_filled_in_paths(root):
    stages = needs.stages(root)
    assert list(stages) == [
        "data",
        "train@a",
        "train@b",
        "each@1",
        "each@2",
        "grid@a-1",
        "grid@a-2",
        "grid@b-1",
        "grid@b-2",
        "show",
    ]
    assert stages["train@b"]["cmd"] == "train b 0.2" and needs.outs(stages["train@a"]) == [
        "models/a",
        "reports/metrics/a.json",
    ]
    assert needs.reads(stages["train@a"]) == ["data/pairs", "models/base"]
    assert needs.reads(stages["show"]) == ["data/pairs", "models/a", "reports/metrics"]
    assert needs.outs(stages["grid@b-2"]) == ["data/b-2"]


def test_the_stage_to_run_is_named_once_and_last(root):
    def said(stage):
        with pytest.raises(needs.MissingInput) as caught:
            needs.check(stage, root)
        (text,) = caught.value._render_traceback_()
        assert "\n" not in text
        return text.removeprefix("MissingInput: ")

    assert said("show") == (
        "show reads data/pairs, models/a and reports/metrics, which are missing: run "
        "`dvc repro train@a train@b` first"
    )
    fill(root, "data/pairs")
    assert said("train@a") == "train@a reads models/base, which is missing"  # nothing makes it
    assert (
        said("grid@b-1")
        == "grid@b-1 reads models/b, which is missing: run `dvc repro train@b` first"
    )
    (root / "models/b").mkdir(parents=True)  # an empty folder is what an interrupted stage leaves
    assert said("grid@b-1").startswith("grid@b-1 reads models/b")
    fill(root, "models/b")
    needs.check("grid@b-1", root)
    needs.check("data", root)
    assert said("train@c").startswith(
        "with this params.yaml there is no stage 'train@c'; there are data, train@a, "
    )


def test_a_key_that_params_has_not(root):
    (root / "params.yaml").write_text("{names: [a], recipe: {}}")
    with pytest.raises(ParamsError, match="params.yaml has no 'recipes'"):
        needs.stages(root)


def test_the_stages_are_those_that_dvc_sees():
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        want = {stage.addressing: stage for stage in repo.index.stages}
        here = needs.stages(ROOT)
        assert list(here) == list(want)
        for name, entry in here.items():
            assert sorted(needs.outs(entry)) == sorted(str(out) for out in want[name].outs)
            assert set(needs.reads(entry)) <= {str(dep) for dep in want[name].deps}


# ---------------------------------------------------------------- the notebooks


def code(path: Path) -> list[str]:
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    return [re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE) for source in cells]


def checked(path: Path) -> list[tuple[int, str]]:
    """Each call of needs.check: its cell and the stage, with {name} where it is formatted in."""
    found = []
    for i, source in enumerate(code(path)):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "needs.check":
                found.append((i, ast.unparse(node.args[0]).strip("f'\"")))
    return found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_checks_its_own_stage_before_it_reads(name):
    runs = {
        stage: entry
        for stage, entry in needs.stages(ROOT).items()
        for words in [
            shlex.split(entry["cmd"] if isinstance(entry["cmd"], str) else entry["cmd"][0])
        ]
        if words[:4] == ["python", "-m", "mclip.pipeline.run", name]
    }
    if not runs:
        pytest.skip("no stage runs it")
    found = checked(NOTEBOOKS[name])
    if not any(needs.reads(entry) for entry in runs.values()):
        assert not found, "it reads nothing that a stage writes"
        return
    assert len(found) == 1, "one line `needs.check(STAGE)` after params.stage"
    cell, stage = found[0]
    pattern = re.sub(r"\\\{.*?\\\}", ".+", re.escape(stage))
    assert all(re.fullmatch(pattern, run) for run in runs), f"its stage is {next(iter(runs))}"
    assert cell <= 1, "at the head: nothing is read before"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_a_notebook_names_is_what_its_stage_depends_on_or_writes(name):
    for stage, entry in needs.stages(ROOT).items():
        if f"mclip.pipeline.run {name} " not in " ".join(str(entry["cmd"]).split()) + " ":
            continue
        known = needs.reads(entry) + needs.outs(entry)
        named = {
            found.rstrip("/")
            for source in code(NOTEBOOKS[name])
            for found in re.findall(
                r"[\"'](?:local-dir:)?((?:data|models|reports/metrics)/[\w./-]+)", source
            )
        }
        for path in (
            path for path in named if not f"{path}/".startswith("data/cache/")
        ):  # no result lies there
            assert any(needs._overlap(path, other) for other in known), (
                f"{stage}: {path} is not among its deps"
            )


def test_without_its_inputs_a_notebook_says_which_stage_to_run(tmp_path, monkeypatch):
    """The real dvc.yaml where nothing has run: every notebook's first line is about a stage before
    it.
    """
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for stage, entry in needs.stages().items():
        if needs.reads(entry):
            with pytest.raises(
                needs.MissingInput, match=r"^\S+ reads .*missing: run `dvc repro [\w@ -]+` first$"
            ):
                needs.check(stage)
        else:
            needs.check(stage)
