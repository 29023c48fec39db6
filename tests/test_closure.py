"""mclip.pipeline.code: what a notebook stands on is found whole, and an edit changes the checksums
of those it concerns.
"""

import ast
import hashlib
import json
from pathlib import Path

import pytest

import mclip
from mclip.pipeline import code, strip

ROOT = Path(__file__).parents[1]
MODULES = {
    "__init__": "__version__ = '1'",
    "a": "from . import b\nfrom .pack.inner import thing",
    "b": "import os\nimport torch.nn\nfrom mclip import plots\n\ndef late():\n    from .c import name\n    import mclip.pack.other as o",
    "c": "start(['python', '-m', 'mclip.process'])\nabout = {b'mclip.bytes': 1}\nother = 'mclip.process is not it', 'mclip.none'",
    "process": "from mclip.pack import *",
    "bytes": "",
    "plots/__init__": "from mclip import unseen",
    "unseen": "",
    "alone": "from mclip.pipeline.needs import check",
    "needs": "from .unseen import x",
    "cycle": "from . import cycle_back",
    "cycle_back": "from . import cycle",
    "pack/__init__": "from mclip.pack.seen import x",
    "pack/seen": "",
    "pack/inner": "from .. import up\nfrom .deep.below import x",
    "pack/other": "",
    "pack/deep/__init__": "",
    "pack/deep/below": "from ...top import y",
    "up": "",
    "top": "",
}
PACK = {"mclip/pack/__init__.py", "mclip/pack/seen.py", "mclip/pack/configs/x.json"}


def notebook(path: Path, *cells: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [{"cell_type": "markdown", "source": ["import mclip.up"]}]
    path.write_text(
        json.dumps(
            {
                "cells": found
                + [
                    {"cell_type": "code", "source": cell.splitlines(keepends=True)}
                    for cell in cells
                ]
            }
        )
    )


@pytest.fixture
def root(tmp_path):
    files = {f"mclip/{name}.py": text for name, text in MODULES.items()}
    files |= {
        "mclip/pack/configs/x.json": "{}",
        "mclip/pack/configs/.x.json.swp": "",
        "mclip/pack/.ipynb_checkpoints/x.json": "",
        "mclip/pack/x.pyc": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    notebook(
        tmp_path / "notebooks/first.ipynb",
        "%matplotlib inline\nimport numpy",
        "from mclip import a, plots\n!ls\na.run()",
    )
    notebook(tmp_path / "notebooks/studies/second.ipynb", "%%bash\nls |", "import mclip.alone")
    notebook(
        tmp_path / "notebooks/third.ipynb",
        "from mclip.pack.inner import thing",
        "x = 'mclip.cycle'",
    )
    return tmp_path


def stands_on(root, name):
    return set(code.recorded(name, root))


def test_imports_at_any_depth_and_names_of_modules_are_followed(root):
    code.write(root)
    below = {
        "mclip/pack/inner.py",
        "mclip/pack/deep/__init__.py",
        "mclip/pack/deep/below.py",
        "mclip/up.py",
        "mclip/top.py",
    }
    assert (
        stands_on(root, "first")
        == {"mclip/a.py", "mclip/b.py", "mclip/c.py", "mclip/process.py", "mclip/pack/other.py"}
        | PACK
        | below
    )
    assert stands_on(root, "studies/second") == {"mclip/alone.py"}
    assert stands_on(root, "third") == {"mclip/cycle.py", "mclip/cycle_back.py"} | PACK | below


def test_the_files_are_sorted_checksums_that_sha256sum_reads(root):
    code.write(root)
    text = (root / "data/code/studies/second").read_text()
    assert text == f"{hashlib.sha256(MODULES['alone'].encode()).hexdigest()}  mclip/alone.py\n"
    lines = (root / "data/code/first").read_text().splitlines()
    assert [line[66:] for line in lines] == sorted(line[66:] for line in lines)


@pytest.mark.parametrize(
    "edited, changes",
    [
        ("mclip/top.py", {"first", "third"}),
        ("mclip/pack/configs/x.json", {"first", "third"}),
        ("mclip/c.py", {"first"}),
        ("mclip/alone.py", {"studies/second"}),
        ("mclip/plots/__init__.py", set()),
        ("mclip/pipeline/needs.py", set()),
        ("mclip/unseen.py", set()),
        ("mclip/__init__.py", set()),
        ("notebooks/first.ipynb", set()),
    ],
)
def test_an_edit_changes_exactly_what_stands_on_it(root, edited, changes):
    assert len(code.write(root)) == 3
    (root / edited).write_text((root / edited).read_text() + "\n")
    assert {str(path.relative_to(root / "data/code")) for path in code.write(root)} == changes


def test_what_has_not_changed_is_not_written_and_what_is_gone_is_removed(root):
    code.write(root)
    files = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in (root / "data/code").rglob("*")
        if path.is_file()
    }
    assert code.write(root) == []
    assert files == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    (root / "notebooks/studies/second.ipynb").unlink()
    notebook(root / "notebooks/.ipynb_checkpoints/first.ipynb", "import mclip.a")
    code.write(root)
    assert {path.name for path in (root / "data/code").rglob("*") if path.is_file()} == {
        "first",
        "third",
    }


def test_code_that_cannot_be_read_takes_no_stage_down(root):
    """A notebook that isn't Python stands on everything; a module that isn't fails where it is
    imported.
    """
    notebook(root / "notebooks/third.ipynb", "files = !ls")
    (root / "notebooks/fourth.ipynb").write_text("")
    (root / "mclip/alone.py").write_text("def (")
    code.write(root)
    assert (
        {"mclip/a.py", "mclip/bytes.py", "mclip/alone.py"} | PACK
        <= stands_on(root, "third")
        == stands_on(root, "fourth")
    )
    assert stands_on(root, "studies/second") == {"mclip/alone.py"}


# --- this repository --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here():
    package = code.Package(ROOT)
    return {
        str(path.relative_to(ROOT / "notebooks").with_suffix("")): {
            file.as_posix().removeprefix("mclip/")
            for file in package.notebook(path.relative_to(ROOT))
        }
        for path in strip.notebooks(ROOT / "notebooks")
    }


ALGORITHM = {
    "balance.py",
    "links.py",
    "bounds.py",
    "cells.py",
    "components.py",
    "forest.py",
    "prepared.py",
    "unionfind.py",
}


def test_a_training_stands_on_the_trainer_and_not_on_what_it_only_reads(here):
    training = {
        "train.py",
        "data/training.py",
        "losses/objective.py",
        "losses/cluster.py",
        "kernels/tiled.py",
        "kernels/triton_tiles.py",
        "models/factory.py",
        "models/lengths.py",
        "models/configs/demo-student.json",
    }
    for name in ("distill", "ablations/terms", "ablations/students", "ablations/epoch"):
        assert training <= here[name], name
    reading = {"data/balanced.py", "data/clustered.py", "data/embedded.py"}
    assert reading <= here["distill"]
    assert not here["distill"] & (
        ALGORITHM | {"cluster.py", "embed.py", "rows.py", "prune.py", "evaluate.py", "teachers.py"}
    )
    for name in ("cluster", "reinforce", "evaluate", "teachers", "embed", "ablations/epoch"):
        assert not here[name] & ALGORITHM, name


def test_balance_stands_on_its_algorithm_and_on_no_model(here):
    assert here["balance"] >= ALGORITHM | {"rows.py", "engine.py"} and not any(
        file.startswith("models/") for file in here["balance"]
    )
    assert here["ablations/threshold"] >= ALGORITHM  # which balances by other thresholds


def test_what_only_shows_is_in_none(here):
    for name, files in here.items():
        assert not {
            file for file in files if file.split("/")[0].removesuffix(".py") in code.SHOWING
        }, name
        assert "__init__.py" not in files, name
    assert here["report"] == {"compare.py"}


def test_every_notebook_can_be_read(here):
    """Otherwise it would stand on the whole package, which has run.py: no notebook imports its
    runner.
    """
    for name, files in here.items():
        assert "run.py" not in files, name


def test_nothing_runs_where_closures_do_not_look():
    """mclip/__init__.py is in no closure, so that a new version number makes nothing anew."""
    body = ast.parse(Path(mclip.__file__).read_text()).body
    assert all(
        isinstance(node, ast.Expr | ast.Assign) and isinstance(node.value, ast.Constant)
        for node in body
    )


def test_every_module_that_shows_exists():
    for name in code.SHOWING:
        assert (ROOT / "mclip" / f"{name}.py").exists() or (
            ROOT / "mclip" / name / "__init__.py"
        ).exists()


def test_the_names_of_cached_runs_have_all_the_code_that_makes_them():
    package = code.Package(ROOT)

    def below(module):
        return {file.as_posix().removeprefix("mclip/") for file in package.files([module])}

    assert {"train.py", "kernels/tiled.py", "models/configs/demo-student.json"} <= below(
        "mclip.distill.trainer"
    )
    assert not below("mclip.distill.trainer") & (ALGORITHM | {"cluster.py", "evaluate.py"})
    assert {*ALGORITHM, "cluster.py", "prune.py", "derive.py", "data/reinforced.py"} <= below(
        "mclip.studies.derive"
    )
    assert {"evaluate.py", "features.py", "metrics.py", "models/inference.py"} <= below(
        "mclip.evaluate"
    )
    assert (
        code.code("mclip.distill.trainer")
        == code.code("mclip.distill.trainer")
        != code.code("mclip.studies.derive")
    )
