"""What keeps the repository whole: dvc.yaml and the notebooks agree, overlays are valid, sources
are stripped.
"""

import re
import subprocess
from pathlib import Path

import nbformat
import pytest

from mclip import params
from mclip.pipeline import code, run, stages, strip
from mclip.system import source

ROOT = Path(__file__).parents[1]
STAGES = stages.resolved(ROOT)
NOTEBOOKS = [name for name in STAGES if name != "code"]
OVERLAYS = sorted(ROOT.glob("params/*.yaml"))


def titled(name: str) -> run.Stage:
    return run.Stage(*stages.call(STAGES[name]))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_stage_depends_on_its_notebook_and_keeps_the_report(name):
    stage, entry = titled(name), STAGES[name]
    assert stage.notebook.as_posix() in entry["deps"] and (ROOT / stage.notebook).exists()
    assert {stage.report().as_posix(): {"cache": False}} in entry["outs"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_stage_depends_on_the_code_of_its_notebook(name):
    deps = stages.paths(STAGES[name], "deps")
    assert [d for d in deps if d.startswith("data/code")] == [f"data/code/{titled(name).title}"]
    listed = [d for d in deps if d.startswith("mclip") and d != "mclip/report/site"]
    assert all(d.removesuffix(".py").replace("/", ".") in source.EXEMPT for d in listed), (
        "mclip.pipeline.code knows of it"
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_a_notebook_names_is_what_its_stage_depends_on_or_writes(name):
    known = [
        path for kind in ("deps", "outs", "metrics") for path in stages.paths(STAGES[name], kind)
    ]
    nb = nbformat.read(ROOT / titled(name).notebook, as_version=4)
    source = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "code")
    named = re.findall(r"[\"'](?:local-dir:)?((?:data|models|reports/metrics)/[\w./-]+)", source)
    for path in (Path(path) for path in named if not path.startswith("data/cache")):
        assert any(
            path.is_relative_to(other) or Path(other).is_relative_to(path) for other in known
        ), path


def test_the_first_stage_writes_what_notebooks_stand_on():
    name, entry = next(iter(STAGES.items()))
    assert (name, entry["cmd"], entry["deps"], entry["outs"]) == (
        "code",
        "python -m mclip code",
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
    assert run.parameter_names(nb, path)
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


@pytest.mark.slow
def test_make_lists_its_commands():
    said = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for command in ("repro", "check", "test", "test-long", "lab", "report", "lint", "bench"):
        assert f"make {command}\t" in said
