"""What keeps the repository whole: dvc.yaml and the notebooks agree, overlays are valid, sources
are stripped.
"""

import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from mclip import params
from mclip.pipeline import code, needs, run, strip

ROOT = Path(__file__).parents[1]
STAGES = needs.stages(ROOT)
NOTEBOOKS = [name for name in STAGES if name != "code"]
OVERLAYS = sorted(ROOT.glob("params/*.yaml"))


def call(entry) -> list[str]:
    first = entry["cmd"] if isinstance(entry["cmd"], str) else entry["cmd"][0]
    words = shlex.split(first)
    assert words[:3] == ["python", "-m", "mclip.pipeline.run"]
    return words[3:]


def option(words: list[str], flag: str) -> list[str]:
    return [value for name, value in pairwise(words) if name == flag]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_stage_sees_exactly_its_params(name):
    words = call(STAGES[name])
    assert sorted(option(words, "-p")) == sorted(STAGES[name].get("params", []))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_stage_depends_on_its_notebook_and_keeps_the_report(name):
    words, entry = call(STAGES[name]), STAGES[name]
    assert f"notebooks/{words[0]}.ipynb" in entry["deps"]
    assert (ROOT / f"notebooks/{words[0]}.ipynb").exists()
    values = [setting.split("=", 1)[1] for setting in option(words, "-s")]
    report = f"reports/{'/'.join([words[0], *values])}.ipynb"
    outs = [o for kind in ("outs", "metrics", "plots") for o in entry.get(kind, [])]
    assert {report: {"cache": False}} in outs


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_stage_depends_on_the_code_of_its_notebook(name):
    words, deps = call(STAGES[name]), STAGES[name]["deps"]
    values = [setting.split("=", 1)[1] for setting in option(words, "-s")]
    assert [d for d in deps if d.startswith("data/code")] == [
        f"data/code/{'/'.join([words[0], *values])}"
    ]
    listed = [d for d in deps if d.startswith("mclip") and d != "mclip/report/site"]
    assert all(d.removesuffix(".py").replace("/", ".") in code.EXEMPT for d in listed), (
        "mclip.pipeline.code knows of it"
    )


def test_the_first_stage_writes_what_notebooks_stand_on():
    name, entry = next(iter(STAGES.items()))
    assert (name, entry["cmd"], entry["deps"], entry["outs"]) == (
        "code",
        "python -m mclip.pipeline.code",
        ["mclip", "notebooks", "params.yaml"],
        [code.FOLDER],
    )


@pytest.mark.parametrize("name", STAGES)
def test_dependencies_in_the_repository_exist(name):
    for dep in STAGES[name]["deps"]:
        if dep.startswith(("mclip", "notebooks")):
            assert (ROOT / dep).exists(), dep


@pytest.mark.parametrize("path", strip.notebooks(ROOT / "notebooks"), ids=lambda p: p.stem)
def test_source_notebooks_are_stripped_and_take_parameters(path):
    assert path.read_text() == strip.stripped(path.read_text()), "run `mclip strip`"
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert run._parameter_names(nb, path)
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ")


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.stem)
def test_overlays_are_valid_over_the_default(path):
    tree = params.merge(params.read_yaml(ROOT / "params.yaml"), params.read_yaml(path))
    params.check(tree, path.name)
    assert path.read_text().startswith("# ")


def test_the_papers_settings():
    def overlaid(name):
        overlay = params.read_yaml(ROOT / f"params/{name}.yaml")
        return params.check(params.merge(params.read_yaml(ROOT / "params.yaml"), overlay))

    cid, mobile = overlaid("clip-cid-paper"), overlaid("mobileclip-paper")
    assert (cid.balance.threshold, cid.cluster.clusters, cid.distill.train.batch_size) == (
        0.07,
        1_000_000,
        32_768,
    )
    assert cid.distill.recipes["clip-cid"].cluster.alpha == 0.999 and cid.distill.train.betas == (
        0.9,
        0.98,
    )
    assert sum(s.probe for s in cid.evaluate.sets.values()) == 14 and len(cid.evaluate.sets) == 19
    assert (mobile.reinforce.n_aug, mobile.reinforce.n_syn, mobile.distill.train.ema) == (
        10,
        5,
        0.9995,
    )
    assert (mobile.reinforce.scale_min, mobile.reinforce.randaugment_ops) == (0.08, 2)
    assert mobile.distill.train.samples == 65_536 * 200_000 and mobile.distill.train.betas == (
        0.9,
        0.95,
    )
    assert not cid.teachers.assemble and cid.teachers.captioner_train is None


def test_the_lock_names_no_hosts():
    text = (ROOT / "requirements.txt").read_text()
    assert not re.search(r"://|file:|--(extra-)?index-url|--find-links| @ |/home/|/root/", text)
    assert re.search(r"^torch==", text, re.MULTILINE)


def test_dvc_does_not_look_at_caches_of_python():
    assert "__pycache__" in (ROOT / ".dvcignore").read_text().split()
    assert "analytics = false" in (ROOT / ".dvc/config").read_text()


def test_make_lists_its_commands():
    said = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for command in ("repro", "test", "lab", "report", "lint", "bench"):
        assert f"make {command}\t" in said
