"""The notebook runner, on tiny notebooks of its own. All runs start at once: they must not meet,
either.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat import v4

from mclip.pipeline import code, kernel, run, strip
from mclip.system import source

ROOT = Path(__file__).parents[2]
PARAMETERS = "sections = None\nrecipe = 'none'"
TYPED = """
from mclip import params
p = params.stage(sections)
print(p.distill.train.cache_pixels is True, p.distill.train.lr_min == 1e-6, p.distill.train.ema is None, recipe)
"""
STATE = """
import os, sys, matplotlib
print(os.environ["PYTHONHASHSEED"], matplotlib.get_backend(), sys.executable == os.environ["EXPECTED_PYTHON"])
print(os.getcwd() == os.environ["EXPECTED_CWD"], "startup" in globals())
"""
LIVE = """
import sys, time
from pathlib import Path
from mclip.system import progress
for _ in progress.bar(range(3), desc="counting"): pass
print("waiting"); print("a warning of /some/path", file=sys.stderr); print("more")
object()
while not Path(f"go-{recipe}").exists(): time.sleep(0.05)
"""
FAILING = """
from lib import broken
print("so far")
broken.outer(0)
print("never")
"""
DVC = """
stages:
  typo: {cmd: mclip run typo, params: [balance.treshold]}
  good:
    foreach: [a, b]
    do:
      cmd: python -m mclip.pipeline.run good -s recipe=${item}
      params: [distill.train]
  guarded: {cmd: [mclip run guarded -s recipe=g, mclip report], params: [balance]}
"""
CHILD = """
import subprocess
process = subprocess.Popen(["sleep", "987"], start_new_session=True)
print("started", process.pid)
process.wait()
"""


def write_notebook(path: Path, *cells: str) -> None:
    nb = v4.new_notebook(
        cells=[v4.new_markdown_cell(f"# {path.stem}?"), v4.new_code_cell(PARAMETERS)]
    )
    nb.cells[1].metadata["tags"] = ["parameters"]
    nb.cells += [v4.new_code_cell(c.strip()) for c in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(strip.stripped(nbformat.writes(nb)))


class Run:
    """A runner in the background; `said` is what its terminal shows so far."""

    def __init__(self, repo: Path, name: str, *args: str, module: str = "mclip.pipeline.run"):
        self.log = repo / f"{name}.log"
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "EXPECTED_PYTHON": sys.executable,
            "EXPECTED_CWD": str(repo),
            "MPLBACKEND": "agg",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "IPYTHONDIR": str(repo / "ipython"),
            "JUPYTER_PATH": str(repo / "jupyter"),
            "TMPDIR": str(repo / "tmp"),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *args], cwd=repo, env=env, stderr=log
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while text not in self.said:
            assert self.process.poll() is None and time.monotonic() < end, (
                f"no {text!r} in:\n{self.said}"
            )
            time.sleep(0.05)

    def code(self) -> int:
        return self.process.wait(timeout=120)


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A repository with notebooks, and a person whose settings would spoil every run."""
    repo = tmp_path_factory.mktemp("repo")
    (repo / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (repo / "dvc.yaml").write_text(DVC)
    write_notebook(repo / "notebooks/good.ipynb", TYPED, STATE, LIVE)
    write_notebook(repo / "notebooks/ablations/failing.ipynb", FAILING)
    write_notebook(repo / "notebooks/guarded.ipynb", LIVE)
    write_notebook(repo / "notebooks/child.ipynb", CHILD)
    write_notebook(repo / "notebooks/typo.ipynb")
    write_notebook(repo / "notebooks/early.ipynb", "import sys; sys.exit(0)", "print('never')")
    (repo / "lib").mkdir()
    (repo / "lib/broken.py").write_text(
        "def outer(x):\n    return inner(x)\n\n\ndef inner(x):\n    return 1 / x\n"
    )
    (repo / "ipython/profile_default/startup").mkdir(parents=True)
    (repo / "ipython/profile_default/startup/0.py").write_text("startup = 1\n")
    (repo / "jupyter/kernels/python3").mkdir(parents=True)
    (repo / "jupyter/kernels/python3/kernel.json").write_text(
        json.dumps({"argv": ["false"], "display_name": "other", "language": "python"})
    )
    (repo / "tmp").mkdir()
    for name in ("failing", "child"):
        report = repo / ("reports/ablations" if name == "failing" else "reports") / f"{name}.ipynb"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("former good report")
    (repo / "reports/good").mkdir(parents=True)
    (repo / "reports/good/a.failed.ipynb").write_text("of an earlier try")
    return repo


@pytest.fixture(scope="module")
def runs(repo):
    """Every run, started at once and finished."""
    runs = {
        "a": Run(repo, "a", "good", "-s", "recipe=a"),
        "b": Run(repo, "b", "good", "-s", "recipe=b"),
        "failing": Run(repo, "failing", "ablations/failing"),
        "early": Run(repo, "early", "early"),
        "guarded": Run(repo, "guarded", "guarded", "-s", "recipe=g"),
        "child": Run(repo, "child", "child"),
    }
    try:
        runs["child"].wait_for("started")
        runs["child"].process.send_signal(signal.SIGTERM)
        runs["guarded"].wait_for("waiting")
        with (repo / "notebooks/guarded.ipynb").open("a") as file:
            file.write("\n")
        (repo / "go-g").touch()
        for name in "ab":  # seen in the terminal while the notebook still runs
            runs[name].wait_for("waiting")
            runs[name].wait_for("counting: 100%")
            assert runs[name].process.poll() is None
            (repo / f"go-{name}").touch()
        for item in runs.values():
            item.code()
    finally:
        for item in runs.values():
            item.process.kill() if item.process.poll() is None else None
    return runs


def outputs(path: Path) -> str:
    nb = nbformat.read(path, as_version=4)
    return "".join(o.get("text", "") for c in nb.cells for o in c.get("outputs", []))


@pytest.mark.slow
def test_parameters_arrive_with_their_types_in_a_clean_kernel(repo, runs):
    assert runs["a"].code() == 0, runs["a"].said
    text = outputs(repo / "reports/good/a.ipynb")
    assert "True True True a\n" in text
    assert "0 module://matplotlib_inline.backend_inline True\nTrue False\n" in text


@pytest.mark.slow
def test_the_report_holds_nothing_of_this_run_or_machine(repo, runs):
    raw = (repo / "reports/good/a.ipynb").read_text()
    nb = nbformat.reads(raw, as_version=4)
    nbformat.validate(nb)
    assert (
        set(nb.metadata) == {"kernelspec", "language_info"}
        and "version" not in nb.metadata.language_info
    )
    assert [c.id for c in nb.cells] == [f"cell-{i}" for i in range(len(nb.cells))]
    assert (
        nb.cells[2].metadata == {"tags": ["injected-parameters"]}
        and "\n        'train': {\n" in nb.cells[2].source
    )
    assert "waiting\nmore\n" in outputs(
        repo / "reports/good/a.ipynb"
    )  # one stream, no warning in between
    assert (
        "a warning" not in outputs(repo / "reports/good/a.ipynb")
        and "100%" not in raw
        and str(repo) not in raw
    )
    assert not (repo / "reports/good/a.failed.ipynb").exists()
    assert not list((repo / "tmp").iterdir()) and not list((repo / "reports").glob(".*"))


@pytest.mark.slow
def test_two_runs_write_the_same_bytes(repo, runs):
    assert runs["b"].code() == 0, runs["b"].said
    a, b = ((repo / f"reports/good/{x}.ipynb").read_text() for x in "ab")
    assert a.replace("'a'", "'b'").replace("True a", "True b") == b


@pytest.mark.slow
def test_the_terminal_shows_headings_prints_warnings_and_bars(runs):
    said = runs["a"].said
    for text in (
        "good/a: running notebooks/good.ipynb\n",
        "  good?\n",
        "waiting\n",
        "a warning of /some/path",
        "counting: 100%",
        "good/a: reports/good/a.ipynb written, ",
    ):
        assert text in said
    assert "\r" not in said  # a file gets whole lines


@pytest.mark.slow
def test_the_time_is_kept_beside_the_report(repo, runs):
    times = json.loads((repo / "reports/times/good/a.json").read_text())
    assert times["stage"] == "good" and times["recipe"] == "a"
    assert times["seconds"] > 0 and times["peak_rss_mb"] > 10


@pytest.mark.slow
def test_a_failure_says_where_on_one_screen_and_keeps_what_ran(repo, runs):
    assert runs["failing"].code() == 1
    said = runs["failing"].said
    kept = "reports/ablations/failing.failed.ipynb"
    assert f"ablations/failing: FAILED in cell [2] of {kept}" in said
    assert (
        "  line 3: broken.outer(0)\n  lib/broken.py:2 in outer: return inner(x)\n"
        "  lib/broken.py:6 in inner: return 1 / x\n" in said
    )
    assert "\nZeroDivisionError: division by zero\n" in said
    assert said.endswith(f"jupyter lab {kept}\n") and len(said.splitlines()) < 25
    assert "so far\n" in outputs(repo / kept)
    assert (repo / "reports/ablations/failing.ipynb").read_text() == "former good report"
    assert not (repo / "reports/times/ablations/failing.json").exists()


@pytest.mark.slow
def test_a_notebook_that_exits_early_is_no_report(repo, runs):
    assert runs["early"].code() == 1
    assert "SystemExit: 0" in runs["early"].said
    assert not (repo / "reports/early.ipynb").exists()


@pytest.mark.slow
def test_an_edit_during_the_run_is_refused(repo, runs):
    assert runs["guarded"].code() == 1
    assert (
        "notebooks/guarded.ipynb was edited while it ran; nothing is kept, run it again\n"
        in runs["guarded"].said
    )
    assert not list(repo.glob("reports/guarded*"))


@pytest.mark.slow
def test_a_signal_stops_the_kernel_and_all_below_it(repo, runs):
    assert runs["child"].code() == 128 + signal.SIGTERM
    pid = int(runs["child"].said.split("started ")[1].split()[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert "child: stopped by SIGTERM: no report, but " in runs["child"].said
    assert (repo / "reports/child.ipynb").read_text() == "former good report"


@pytest.mark.slow
def test_nothing_goes_on_when_dvc_itself_is_killed(repo, tmp_path, monkeypatch):
    """Else the next `dvc repro` would run the stage beside what is left of this one."""
    monkeypatch.setenv("SHELL", "/bin/sh")  # some stay there between DVC and the stage
    started = {}
    for number in (signal.SIGKILL, signal.SIGTERM):
        clone = tmp_path / number.name
        for name in ("params.yaml", "notebooks/child.ipynb"):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_text((repo / name).read_text())
        (clone / "tmp").mkdir()
        (clone / ".dvc").mkdir()
        (clone / ".dvc/config").write_text("[core]\n    no_scm = True\n    analytics = false\n")
        (clone / "dvc.yaml").write_text(
            "stages:\n  child:\n    cmd: python -m mclip.pipeline.run child\n"
        )
        started[number] = Run(clone, "dvc", "repro", module="dvc")
    for number, dvc in started.items():
        dvc.wait_for("started")
        family = psutil.Process(dvc.process.pid).children(recursive=True)
        assert any("sleep" in member.cmdline() for member in family)
        dvc.process.send_signal(number)
        assert psutil.wait_procs(family, timeout=30)[1] == []
        assert "child: stopped by SIGTERM: no report, but " in dvc.said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["god"], "notebooks/god.ipynb: no such notebook; did you mean 'good'?"),
        (["typo"], "params.yaml has no 'balance.treshold'"),
        (
            ["good", "-s", "recipie=clip"],
            "notebooks/good.ipynb: its parameters cell has no 'recipie' (it has: sections, recipe)",
        ),
        (["good", "-s", "recipe"], "-s recipe: expected NAME=VALUE"),
    ],
)
def test_a_wrong_call_is_one_line(repo, monkeypatch, capsys, args, said):
    monkeypatch.chdir(repo)
    assert run.main(args) == 2
    assert capsys.readouterr().err == said + "\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A repository with a stage of one notebook, x, that imports mclip.a and through it
    mclip.models.
    """
    monkeypatch.chdir(tmp_path)
    files = {
        "notebooks/x.ipynb": nbformat.writes(
            v4.new_notebook(cells=[v4.new_code_cell("from mclip import a")])
        ),
        "mclip/__init__.py": "",
        "mclip/a.py": "from . import models",
        "mclip/models/__init__.py": "from . import b",
    }
    for name in (
        "mclip/models/b.py",
        "mclip/models/c.json",
        "mclip/other.py",
        "mclip/shown.py",
        "data/d.json",
    ):
        files[name] = ""
    files["params.yaml"] = (ROOT / "params.yaml").read_text()
    files["dvc.yaml"] = (
        "stages:\n  y: {cmd: mclip run x, params: [balance],"
        " deps: [notebooks/x.ipynb, data/code/x, mclip/shown.py, data]}\n"
        "  z: {cmd: python -m mclip.pipeline.run z, deps: [mclip]}\n"
    )
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_guarded_are_the_sources_that_dvc_records(package):
    def files(name):
        return {path.as_posix() for path in run.sources(run.Stage(name), source.Package())}

    assert files("x") == {
        "notebooks/x.ipynb",
        "mclip/a.py",
        "mclip/models/__init__.py",
        "mclip/models/b.py",
        "mclip/models/c.json",
        "mclip/shown.py",
    }
    assert "mclip/other.py" in files("w")  # no notebook that can be read


@pytest.mark.parametrize(
    ("file", "text", "counts"),
    [
        ("mclip/models/b.py", "# a comment", False),
        ("mclip/models/b.py", "x = 1", True),
        ("mclip/models/b.py", "def (", True),
        ("mclip/models/c.json", " ", True),
        ("notebooks/x.ipynb", "{}", True),
        ("mclip/other.py", "x = 1", False),
    ],
)
def test_an_edit_that_changes_what_a_stage_does_is_seen(package, file, text, counts):
    stage = run.Stage("x")
    files = run.sources(stage, source.Package())
    before = run.state(stage, files)
    (package / file).write_text(text)
    assert (run.state(stage, files) != before) == counts


def test_an_edit_of_the_values_that_a_stage_picks_is_seen(package):
    before = run.state(stage := run.Stage("x"), [])
    text = (package / "params.yaml").read_text()
    (package / "params.yaml").write_text(text.replace("threshold: 0.2 ", "threshold: 0.3 "))
    assert run.state(stage, []) != before


def test_an_edit_between_dvcs_stage_code_and_the_notebooks_own_stops_it(package, monkeypatch):
    def edited():
        return run.edited_before(run.Stage("x"), source.Package())

    code.write()
    (package / "mclip/models/b.py").write_text("changed = True")
    assert edited() == []  # by hand, where nothing is recorded
    monkeypatch.setenv("DVC_STAGE", "y")
    with pytest.raises(
        run.StageError,
        match=r"^x: mclip/models/b.py was edited after DVC's stage `code`: run `dvc repro`",
    ):
        run.run(run.Stage("x"))
    code.write()
    assert edited() == []
    (package / "mclip/models/b.py").write_text("changed = True  # said why")
    assert edited() == []
    (package / "mclip/models/b.py").write_text("def (")
    with pytest.raises(run.StageError, match=r"^x: mclip/models/b.py, line 1: not valid Python"):
        run.run(run.Stage("x"))


def test_a_stage_whose_section_is_null_is_left_out_at_once(package, capsys):
    (package / "params.yaml").write_text("ablations: {amount: null, epoch: {rounds: 1}}")
    (package / "dvc.yaml").write_text(
        "stages:\n  amount:\n    cmd: mclip run ablations/amount\n    params: [ablations.amount, evaluate]\n"
        "    outs: [reports/ablations/amount.ipynb: {cache: false}, reports/a.csv, m/amount.json]\n"
        "  epoch: {cmd: mclip run ablations/epoch, params: [ablations.epoch, ablations.amount]}\n"
    )
    assert run.main(["ablations/amount"]) == 0
    assert "left out, ablations.amount is empty in params.yaml" in capsys.readouterr().err
    report = nbformat.read("reports/ablations/amount.ipynb", as_version=4)
    assert "`ablations.amount` is empty" in report.cells[0].source
    assert Path("reports/a.csv").read_text() == "\n" and Path("m/amount.json").read_text() == "{}\n"
    assert run.left_out(run.Stage("ablations/epoch")) is None
    assert run.left_out(run.Stage("ablations/none")) is None


def test_injected_values_are_python_one_key_a_line():
    value = {"a": {"b": [1e-5, None, True], "c": "x" * 80, "d": {}}}
    text = kernel.readable(value)
    assert eval(text) == value
    assert "    'a': {\n        'b': [1e-05, None, True],\n" in text


def test_a_live_terminal_redraws_a_bar_below_the_prints():
    class Screen:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    terminal = kernel.Terminal(Screen())
    terminal.write("\r 10%", "progress")
    terminal.write("a print\n")
    terminal.write("\r 20%", "progress")
    assert terminal.stream.text == "\r\x1b[K 10%\r\x1b[Ka print\n\r\x1b[K 20%"
