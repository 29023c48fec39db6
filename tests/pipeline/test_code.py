"""mclip.pipeline.code: an edit marks the stages whose result it changes, and no others."""

import ast
import functools
import hashlib
import inspect
import json
import keyword
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import grimp
import pytest
from pydantic_core import to_jsonable_python

import mclip
from mclip import params
from mclip.params.tree import Section
from mclip.pipeline import code, strip
from mclip.system import source
from mclip.system.progress import bar

ROOT = Path(__file__).parents[2]

# --- syntax trees -----------------------------------------------------------------------------------------------

TRICKY = r'''
"""Module."""
from __future__ import annotations
import os, a.b as c
from . import d
from .. import e as f
x: int = 0x_FFFF_FFFF_FFFF_FFFF_FFFF_FFFF
y = [0.1, 1e-6, 1e22, 1e999, 3j, -2.5j, True, None, ..., b"\x00\xff'", "\N{SNOWMAN}\U0001FAE8'\"\n", 10**40]
s = "a" "b" f"c{x}" 'd' f"{y!r:>{w}.{p}f}{x=}{x = !s}" "e" f"" f"{{}}{x:%Y-%m}" rf"\d{x}" u"z"
t = f"{x}" f"{x:}" f"{d['k']}{x!a:{'>'}{10}}{f'{x:{y}}'}{lambda_:=^5}" + f"plain" + """two
lines"""
@deco(1, *a, k=2, **kw)
async def g(p, /, q: str = "q", *args: int, r, s=..., **rest) -> dict[str, int]:
    """Function."""
    async with m as n, (o): await n
    async for i in j: yield i
    return [z async for z in q if z]
class K(Base, metaclass=Meta):
    """Class."""
    field: ClassVar[int]
    "about the field"
    def __init__(self, f=lambda v, *w, k=1: v if w else k): self.f = f; super().__init__()
def h(v):
    match v:
        case {"k": [1, *rest, -1], **more} if (n := len(rest)) > 1: return n, more
        case K(field=0 | None as q) | (True, "s"): pass
        case _: raise E(v) from None
try:
    u, *v = w[1:2, ::3, ...]; del u; assert v, "m"
except* (A, B) as err: ...
else: global_ = not x < y <= z != 1 is not None in q
finally: print(*a, sep="", **{**k, "l": {*m}}, end=f'{1}')
while x: x @= y; break
else: x //= ~y ** -z
for i, in (n for m in o for n in m if n if m): continue
with (a as b, c): nonlocal_ = (yield_, (lambda: (yield)))
'''


def test_the_canonical_text_is_the_same_under_every_python():
    """The digest was made with Python 3.11, 3.12 and 3.13; a test run with another one proves that
    it agrees.
    """
    assert hashlib.sha256(source.canonical(TRICKY).encode()).hexdigest()[:16] == "8b2ea834fc17c13a"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1", "x = 1  # why\n\n"),
        ("f(a, b)", "f(\n    a,\n    b,\n)"),
        ("x = 'a'", 'x = "a"'),
        ("x = 'ab'", "x = 'a' 'b'"),
        ('"""Doc."""\nx = 1', "x = 1"),
        ('def f():\n    """Doc."""\n    return 1', "def f(): return 1"),
        (
            'class A:\n    """Doc."""\n    x = 1\n    "of x"',
            "class A:\n    '''Another.'''\n    x = 1",
        ),
        ("f'a{x}b'", "'a' f'{x}' 'b'"),
        ("x = 1_000", "x = 1000"),
        ("x = (1)", "x = 1"),
        ("f'{x:}'", "f'{x}'"),
    ],
)
def test_what_does_the_same_has_one_canonical_text(one, other):
    assert source.canonical(one) == source.canonical(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = 0.1", "x = 0.10000001"),
        ("x = 'a'", "x = b'a'"),
        ("x = None", "x = ..."),
        ("return_ = None", "return_ = 0"),
        ("def f(a=1): pass", "def f(*, a=1): pass"),
        ("f(*a)", "f(a)"),
        ("f(**a)", "f(*a)"),
        ("f'{x!r}'", "f'{x!s}'"),
        ("f'{x:.1f}'", "f'{x:.2f}'"),
        ("f'{x}'", "'{x}'"),
        ("[a]", "(a,)"),
        ("a < b", "a <= b"),
        ("x = '''a'''", "x = '''b'''"),
        ("f('''doc''')", "f()"),
        ("{**a, 'b': 1}", "{'b': 1, **a}"),
        ("async def f(): pass", "def f(): pass"),
        ("{None: a}", "{**a}"),
        ("def f(*, a, b=1): pass", "def f(*, a=1, b): pass"),
    ],
)
def test_what_does_something_else_has_another(one, other):
    assert source.canonical(one) != source.canonical(other)


# --- a small package --------------------------------------------------------------------------------------------

MODULES = {
    "__init__": "__version__ = '1'",
    "a": "from . import b\nfrom .pack.inner import thing",
    "b": "import os\nimport torch.nn\nfrom mclip.report import plots\n\ndef late():\n    from .c import name\n    import mclip.pack.other as o",
    "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mclip import process\nstart(['python', '-m', 'mclip.process'])",
    "process": "from mclip.pack import *",
    "report/__init__": "",
    "report/plots/__init__": "from mclip import unseen",
    "unseen": "",
    "alone": "from mclip.report.pages import body",
    "report/pages": "from mclip.unseen import x",
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
    "plug/__init__": "import pkgutil",
    "plug/one": "from mclip import far",
    "plug/two": "",
    "far": "",
    "uses": "from mclip import plug",
}
PACK = {"mclip/pack/__init__.py", "mclip/pack/seen.py", "mclip/pack/configs/x.json"}
STAGES = """
stages:
  code: {cmd: python -m mclip.pipeline.code, deps: [mclip], outs: [data/code]}
  first: {cmd: run, deps: [notebooks/first.ipynb, data/code/first], params: [balance, evaluate]}
  each:
    foreach: ${distill.recipes}
    do: {cmd: run, deps: [notebooks/third.ipynb, 'data/code/each/${key}'], params: ['distill.recipes.${key}']}
"""


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
    files |= {"dvc.yaml": STAGES, "params.yaml": (ROOT / "params.yaml").read_text()}
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
        "def f():\n    import mclip.cycle",
    )
    notebook(tmp_path / "notebooks/fourth.ipynb", "from mclip.uses import x")
    return tmp_path


EACH = {"each/clip", "each/clip-cid", "each/mobileclip", "each/combined"}


def files_of(root, name):
    return code.recorded(name, root).keys() - {code.VALUES}


def changed(root):
    return {path.relative_to(root / "data/code").as_posix() for path in code.write(root)}


def test_imports_are_followed_at_any_depth_through_packages_and_processes(root):
    code.write(root)
    below = {
        "mclip/pack/inner.py",
        "mclip/pack/deep/__init__.py",
        "mclip/pack/deep/below.py",
        "mclip/up.py",
        "mclip/top.py",
    }
    assert (
        files_of(root, "first")
        == {"mclip/a.py", "mclip/b.py", "mclip/c.py", "mclip/process.py", "mclip/pack/other.py"}
        | PACK
        | below
    )
    assert files_of(root, "studies/second") == {"mclip/alone.py"}
    assert files_of(root, "each/clip") == {"mclip/cycle.py", "mclip/cycle_back.py"} | PACK | below
    assert files_of(root, "fourth") == {"mclip/uses.py", "mclip/far.py"} | {
        f"mclip/plug/{name}.py" for name in ("__init__", "one", "two")
    }


def test_a_file_of_data_code_has_a_digest_a_line_in_order_and_the_values_last(root):
    code.write(root)
    lines = [line.split("  ") for line in (root / "data/code/first").read_text().splitlines()]
    assert all(len(digest) == 16 for digest, _ in lines)
    names = [name for _, name in lines]
    assert names == [*sorted(names[:-1]), code.VALUES]


EDITS = [  # one after the other: the file, the line that is added to it, the stages that change
    ("mclip/top.py", "x = 1", {"first"} | EACH),
    ("mclip/pack/configs/x.json", "{} ", {"first"} | EACH),
    ("mclip/c.py", "x = 1", {"first"}),
    ("mclip/alone.py", "x = 1", {"studies/second"}),
    ("mclip/plug/two.py", "x = 1", {"fourth"}),
    ("mclip/plug/three.py", "x = 1", {"fourth"}),
    ("mclip/top.py", "# x = 1", set()),
    ("mclip/top.py", '"""Doc."""', set()),
    ("mclip/report/plots/__init__.py", "x = 1", set()),
    ("mclip/report/pages.py", "x = 1", set()),
    ("mclip/unseen.py", "x = 1", set()),
    ("mclip/__init__.py", "x = 1", set()),
    ("notebooks/first.ipynb", " ", set()),
]


def test_an_edit_changes_exactly_what_depends_on_it(root):
    assert len(code.write(root)) == 7
    for edited, text, changes in EDITS:
        with (root / edited).open("a") as file:
            file.write(f"\n{text}\n")
        assert changed(root) == changes, (edited, text)


def test_values_that_the_file_gives_are_left_to_dvc_and_those_that_it_leaves_open_count(root):
    def edit(before, after):
        text = (root / "params.yaml").read_text()
        assert before in text
        (root / "params.yaml").write_text(text.replace(before, after, 1))
        return changed(root)

    code.write(root)
    assert edit("threshold: 0.2", "threshold: 0.2") == set()
    assert edit("weight: {affinity: 1.0}", "weight: {affinity: 0.5}") == set()
    assert edit("backend: processes\n\ncluster", "\ncluster") == {
        "first"
    }  # of balance: the schema's from now on
    assert edit("lambda: 1.0  ", "#") == {"each/mobileclip"}
    assert edit("    openmoji-black: {}\n", "    openmoji-black: {}\n    pets: {}\n") == {
        "first"
    }  # by the registry


def test_what_the_schema_fills_in():
    assert code.silent(
        {"a": 1, "b": {"c": [1], "d": 2.0}, "e": {"f": 1}, "g": {}},
        {"a": 1, "b": {"c": [1]}, "e": None},
    ) == {"b": {"d": 2.0}, "e": {"f": 1}, "g": {}}
    assert code.silent({"a": 2, "b": {"c": 1}}, {"a": None, "b": "a/path"}) == {
        "a": 2,
        "b": {"c": 1},
    }
    assert code.silent({"a": 0.5}, {"a": 0.5, "b": 1}) == {}


def test_what_has_not_changed_is_not_written_and_what_is_gone_is_removed(root):
    (root / "data/code").mkdir(parents=True)
    (root / "data/code/each").write_text("of a stage that had one entry")
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
    assert {
        path.relative_to(root / "data/code").as_posix()
        for path in (root / "data/code").rglob("*")
        if path.is_file()
    } == {"first", "fourth"} | EACH


def test_a_notebook_that_cannot_be_read_depends_on_everything(root):
    notebook(root / "notebooks/studies/second.ipynb", "files = !ls")
    (root / "notebooks/fourth.ipynb").write_text("")
    code.write(root)
    assert (
        {"mclip/a.py", "mclip/alone.py", "mclip/plug/one.py"} | PACK
        <= files_of(root, "fourth")
        == files_of(root, "studies/second")
    )


def test_a_module_that_is_not_python_is_named(root, monkeypatch, capsys):
    (root / "mclip/alone.py").write_text("x = 1\ndef (")
    monkeypatch.chdir(root)
    assert code.main() == 2
    assert capsys.readouterr().err == "mclip/alone.py, line 2: not valid Python\n"


def test_the_package_that_this_process_runs_stays_imported(root):
    source.Package(root)
    assert sys.modules["mclip"] is mclip and str(root) not in sys.path


# --- this repository --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here():
    package = source.Package(ROOT)
    return {
        str(path.relative_to(ROOT / "notebooks").with_suffix("")): {
            file.as_posix().removeprefix("mclip/")
            for file in package.notebook(path.relative_to(ROOT))
        }
        for path in strip.notebooks(ROOT / "notebooks")
    }


ALGORITHM = {
    "balance/sets.py",
    "balance/links.py",
    "balance/cells.py",
    "balance/components.py",
    "balance/forest.py",
    "balance/prepared.py",
    "balance/unionfind.py",
}


def test_a_training_depends_on_the_trainer_and_not_on_what_made_its_data(here):
    training = {
        "distill/trainer.py",
        "distill/targets.py",
        "distill/objective.py",
        "losses/cluster.py",
        "losses/tiled/pairs.py",
        "losses/tiled/triton_tiles.py",
        "models/factory.py",
        "distill/lengths.py",
        "models/configs/demo-student.json",
    }
    for name in ("distill", "ablations/terms", "ablations/students", "ablations/epoch"):
        assert training <= here[name], name
    reading = {"data/stores/balance.py", "data/stores/clusters.py", "data/stores/embeddings.py"}
    assert reading <= here["distill"]
    assert not here["distill"] & (
        ALGORITHM
        | {
            "cluster.py",
            "embed.py",
            "data/stores/rows.py",
            "balance/prune.py",
            "evaluate/suite.py",
            "teachers/align.py",
        }
    )
    for name in ("cluster", "reinforce", "evaluate", "teachers", "embed", "ablations/epoch"):
        assert not here[name] & ALGORITHM, name


def test_balance_depends_on_its_algorithm_and_on_no_model(here):
    assert here["balance"] >= ALGORITHM | {"data/stores/rows.py", "system/workers.py"} and not any(
        file.startswith("models/") for file in here["balance"]
    )
    assert here["ablations/threshold"] >= ALGORITHM  # which balances by other thresholds


def test_every_notebook_can_be_read(here):
    """Otherwise it would depend on the whole package, which has run.py: no notebook imports its
    runner.
    """
    for name, files in here.items():
        assert "pipeline/run.py" not in files, name


def test_a_module_that_another_names_is_imported_by_it():
    """So is one that it starts as a process; grimp follows imports, also those for a type checker
    alone.
    """
    graph = grimp.build_graph("mclip", cache_dir=None)
    for module in graph.modules - source.EXEMPT.keys():
        spec = ROOT.joinpath(*module.split("."))
        text = (spec / "__init__.py" if spec.is_dir() else spec.with_suffix(".py")).read_text()
        named = {
            node.value
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert named & graph.modules - {"mclip", module} <= graph.find_modules_directly_imported_by(
            module
        ), module


def test_the_names_of_cached_runs_have_all_the_code_that_makes_them():
    package = source.Package(ROOT)

    def below(module):
        return {file.as_posix().removeprefix("mclip/") for file in package.files([module])}

    assert {
        "distill/trainer.py",
        "losses/tiled/pairs.py",
        "models/configs/demo-student.json",
    } <= below("mclip.distill.trainer")
    assert not below("mclip.distill.trainer") & (ALGORITHM | {"cluster.py", "evaluate/suite.py"})
    assert {
        *ALGORITHM,
        "cluster.py",
        "balance/prune.py",
        "studies/derive.py",
        "data/stores/reinforced.py",
    } <= below("mclip.studies.derive")
    assert {
        "evaluate/suite.py",
        "evaluate/features.py",
        "evaluate/metrics.py",
        "models/inference.py",
    } <= below("mclip.evaluate")
    assert (
        len(
            {
                source.code_digest(f"mclip.{name}")
                for name in ("distill.trainer", "studies.derive", "evaluate")
            }
        )
        == 3
    )


# --- edits of this repository -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for name in ("mclip", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder)
    params.apply_overlay(ROOT / "params/full.yaml", folder / "params.yaml")
    return folder


def state(copy):
    """By the copy's own schema: in a process of its own."""
    program = "import json; from mclip.pipeline import code; print(json.dumps(code.depends_on(code.Package())))"
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def before(copy):
    return state(copy)


RECIPES = ("clip", "clip-cid", "mobileclip", "combined")
DISTILL = {f"distill/{name}" for name in RECIPES}
STUDIES = {
    f"ablations/{name}"
    for name in (
        "amount",
        "clusters",
        "efficiency",
        "few-pairs",
        "reinforcement",
        "students",
        "teacher",
        "terms",
        "threshold",
    )
}
OVERLAID = {"ablations/few-pairs"}  # no stage of these params: its values count nowhere
EVALUATING = {
    "teachers",
    "reinforce",
    *(f"evaluate/{name}" for name in RECIPES),
    "ablations/pca",
    "ablations/search",
} | STUDIES
ALIGNED = {"teachers", "reinforce"}  # with the loss of mclip.losses, and what imports them
SCALE = ("scale: PositiveFloat = 20.0", "scale: PositiveFloat = 40.0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edits", "marked"),
    [
        # comments and docstrings
        (
            {
                "data/evalsets.py": ("import", "# a comment\nimport"),
                "models/factory.py": ('"""', '"""Another word. '),
            },
            set(),
        ),
        # what a set without a metric of its own is judged by; report reads evaluate.sets
        (
            {"params/sections.py": ('"top1",', '"mean_per_class",')},
            EVALUATING - OVERLAID | {"report"},
        ),
        # a default of recipes that give no scale, in code that trains; stages that read all recipes
        (
            {"distill/terms/cluster.py": SCALE},
            DISTILL
            | STUDIES
            | {"ablations/epoch", "ablations/search", "ablations/weights", "report"},
        ),
        (
            {"losses/cluster.py": ("scale: float = 20.0", "scale: float = 40.0")},
            DISTILL | STUDIES | ALIGNED | {"ablations/epoch"},
        ),
        ({"evaluate/metrics.py": ("def ", "LIMIT = 1\n\n\ndef ")}, EVALUATING),
        # found by its name
        ({"evaluate/tasks/retrieval.py": ("(1, 5, 10)", "(1, 5)")}, EVALUATING),
        ({"balance/links.py": ("import", "import json\nimport")}, {"balance"} | STUDIES),
        (
            {"params/tree.py": ('not value.get("_replace")', '"_replace" not in value')},
            STUDIES,
        ),  # variants of a recipe
        # what only shows or checks
        (
            {
                "report/plots/charts.py": ("import", "import json\nimport"),
                "system/progress.py": ("ncols=100", "ncols=90"),
                "report/pages.py": ("distill", "distil"),
                "params/schema.py": ("embedded teacher", "teacher of embed"),
            },
            set(),
        ),
    ],
)
def test_an_edit_marks_the_stages_that_it_concerns(copy, before, edits, marked):
    texts = {copy / "mclip" / name: (copy / "mclip" / name).read_text() for name in edits}
    try:
        for (path, text), (old, new) in zip(texts.items(), edits.values(), strict=True):
            assert old in text
            path.write_text(text.replace(old, new, 1))
        after = state(copy)
    finally:
        for path, text in texts.items():
            path.write_text(text)
    assert {name for name in before if before[name] != after[name]} == marked


# --- modules that count for none --------------------------------------------------------------------------------


def sources():
    """Name -> syntax tree of the modules that count and, by path, of the notebooks."""
    for path in sorted((ROOT / "mclip").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name not in source.EXEMPT:
            yield name, ast.parse(path.read_text())
    for path in strip.notebooks(ROOT / "notebooks"):
        cells = json.loads(path.read_text())["cells"]
        yield (
            path.stem,
            ast.parse(
                "\n".join(
                    source._plain("".join(c["source"])) for c in cells if c["cell_type"] == "code"
                )
            ),
        )


def used(tree: ast.Module, *packages: str) -> set[tuple[str, str]]:
    """(package, name) of what a module takes from packages of mclip: `from mclip.X import name`,
    `X.name`.
    """
    found, names = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for package in packages:
                if (node.module or "") in (package, f"mclip.{package}"):
                    found |= {(package, alias.name) for alias in node.names}
            if node.module in (None, "mclip"):
                names |= {
                    alias.asname or alias.name: alias.name
                    for alias in node.names
                    if alias.name in packages
                }
        elif isinstance(node, ast.Import):
            assert not any(
                alias.name in {f"mclip.{package}" for package in packages} for alias in node.names
            )
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in names
        ):
            found.add((names[node.value.id], node.attr))
    return found


SHOWING = ("report.pages", "report.plots", "report.build")
SECTIONS = {
    name: value
    for name, value in vars(params).items()
    if isinstance(value, type) and issubclass(value, Section)
}


def test_every_exempt_module_exists_and_has_its_reason():
    for name, reason in source.EXEMPT.items():
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name
        assert reason


def test_the_package_itself_runs_nothing():
    body = ast.parse(Path(mclip.__file__).read_text()).body
    assert all(
        isinstance(node, ast.Expr | ast.Assign) and isinstance(node.value, ast.Constant)
        for node in body
    )


@pytest.mark.slow
def test_code_that_counts_takes_nothing_from_what_shows():
    graph = grimp.build_graph("mclip", cache_dir=None)
    for name in {f"mclip.{part}" for part in SHOWING} & graph.modules:
        importers = graph.find_modules_that_directly_import(name, as_package=True)
        assert importers <= source.EXEMPT.keys() | {
            "mclip.pipeline.run",
            "mclip.pipeline.kernel",
        }, name
    for name, tree in sources():
        assert used(tree, "progress") <= {("progress", "bar")}, name
        assert used(tree, "closure") <= {
            ("closure", name)
            for name in (
                "code",
                "Package",
                "CodeError",
                "FOLDER",
                "recorded",
                "depends_on",
                "file_digest",
            )
        }
        assert name == "mclip.pipeline.run" or used(tree, "closure") <= {("closure", "code")}, name


def test_a_bar_hands_on_what_it_counts(capsys):
    items = [object(), None, [], 0]
    assert all(one is other for one, other in zip(bar(items, desc="x"), items, strict=True))
    assert list(bar(iter(range(1000)), desc="x", hidden=True)) == list(range(1000))


@pytest.mark.slow
def test_notebooks_give_nothing_that_was_drawn_to_code_that_counts():
    """Answers are statements; figures go into nothing but figures."""
    for name, tree in sources():
        shown = {("report.build", "answer")}
        statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        drawn = {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and _draws(node.value, set())
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        assert {
            (package, attr) for package, attr in used(tree, *SHOWING) if package != "report.plots"
        } <= shown, name
        for node in ast.walk(tree):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Attribute)
                or not isinstance(node.func.value, ast.Name)
            ):
                continue
            owner = node.func.value.id
            if (owner, node.func.attr) in shown:
                assert id(node) in statements, (name, ast.unparse(node))
            elif (
                (ROOT / f"mclip/{owner}.py").exists()
                or (ROOT / f"mclip/{owner}").is_dir()
                or "write" in node.func.attr
            ):
                allowed = owner in ("plots", "report")
                assert allowed or not any(
                    _draws(arg, drawn) for arg in [*node.args, *(k.value for k in node.keywords)]
                ), (name, ast.unparse(node))


def _draws(node: ast.AST, drawn: set[str]) -> bool:
    return any(
        (isinstance(n, ast.Name) and (n.id == "plots" or n.id in drawn)) for n in ast.walk(node)
    )


def test_sections_are_fields_and_validators():
    """No method and no property of a section decides a result: what validators fill in are values,
    and `check` has nothing but messages.
    """

    class Bare(Section):
        pass

    todo, seen = [Section], []
    while todo:
        todo += (below := todo.pop().__subclasses__())
        # not those that a check of params.yaml puts together from them
        seen += [
            kind
            for kind in below
            if kind.__module__.startswith("mclip.params")
            and getattr(sys.modules[kind.__module__], kind.__name__, None) is kind
        ]
    assert len(seen) > 20
    for kind in seen:
        public = {name for name in vars(kind) if not name.startswith("_")}
        assert public - kind.model_fields.keys() <= vars(Bare).keys() | {"check"}, kind
        validators = kind.__pydantic_decorators__
        checked = {*validators.model_validators, *validators.field_validators}
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        for function in (node for node in tree.body[0].body if isinstance(node, ast.FunctionDef)):
            returns = [
                node for node in ast.walk(function) if isinstance(node, ast.Return) and node.value
            ]
            assert function.name in checked or not returns, (
                f"{kind}.{function.name} gives something to its caller"
            )


def test_code_that_counts_takes_sections_and_errors_from_params():
    """And gives every key where it makes a section itself: a default of the schema would decide
    there.
    """
    for name, tree in sources():
        if name == "mclip.pipeline.run":
            continue
        functions = {attr for _, attr in used(tree, "params")} - SECTIONS.keys()
        assert functions <= {
            "ParamsError",
            "stage",
            "load",
            "tree",
            "registry",
            "absent",
            "explain",
        }, name
        for node in ast.walk(tree):
            kind = (
                SECTIONS.get(node.func.id)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                else None
            )
            if kind is None or ("params", node.func.id) not in used(tree, "params"):
                continue
            if name == "mclip.evaluate.named":  # for the command, which is no stage
                continue
            assert {k.arg for k in node.keywords} == set(kind.model_fields), (
                name,
                ast.unparse(node),
            )


def test_a_stage_sees_the_values_that_params_has():
    values = params.load(ROOT / "params.yaml").model_dump(by_alias=True, mode="json")

    def get(tree, key):
        if isinstance(tree, dict):
            return tree[key]
        return getattr(tree, f"{key}_" if keyword.iskeyword(key) else key)

    for name, stage in code.stages(ROOT).items():
        seen = params.stage(params.pick(values, stage.keys))
        for key in stage.keys:
            value = functools.reduce(get, key.split("."), seen)
            assert to_jsonable_python(value, by_alias=True) == functools.reduce(
                get, key.split("."), values
            ), (name, key)
