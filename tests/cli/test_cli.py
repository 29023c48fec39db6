"""The command `mclip`: help, examples, exit codes, one-line errors, and the wheel that brings it."""

import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from mclip import cli

ROOT = Path(__file__).parents[2]
DECLARED = [name for name, command in cli.COMMANDS.items() if not command.parses_itself]


@pytest.mark.slow
def test_the_overview_lists_every_subcommand_and_imports_nothing_heavy():
    code = (
        "import sys; from mclip.cli import main; main(['--help'])\n"
        "print('heavy:', {'torch', 'pandas', 'pydantic', 'numpy', 'nbformat'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.endswith("heavy: set()\n")
    for name, command in cli.COMMANDS.items():
        assert f"  {name}" in said.stdout and command.summary in said.stdout


@pytest.mark.parametrize("name", DECLARED)
def test_help_has_a_description_examples_that_parse_and_exit_codes(name, capsys):
    assert cli.main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: mclip {name}" in said and cli.COMMANDS[name].summary in said
    assert "exit codes:\n  0  done\n" in said and "  2  wrong use" in said
    parser, _ = cli.COMMANDS[name].parser()
    assert all(action.help for action in parser._actions)
    examples = said.partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    assert examples
    for line in examples:
        words = shlex.split(line.partition(" > ")[0])
        assert words[:2] == ["mclip", name]
        parser.parse_args(words[2:])  # raises WrongUse


def test_choices_that_help_names_are_those_of_the_modules():
    from mclip.data.stores.balance import METRICS
    from mclip.models.latency import RUNTIMES

    def choices(name, option):
        parser, _ = cli.COMMANDS[name].parser()
        return next(a.choices for a in parser._actions if option in a.option_strings)

    assert choices("balance", "--metric") == METRICS
    assert choices("latency", "--runtimes") == (*RUNTIMES, "all")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["balanse"], "mclip: error: no subcommand 'balanse'; did you mean 'balance'?"),
        (["xyz"], "mclip: error: no subcommand 'xyz'; there are check, "),
        (["--hepl"], "mclip: error: unrecognized arguments: --hepl"),
        (["balance", "a", "b"], "mclip balance: error: one of .* --threshold --remove is required"),
        (["balance", "a", "b", "--threshold", "1"], "--metric is needed with --threshold"),
        (["balance", "a", "b", "--threshold", "1", "--remove", "0.4"], "--remove: not allowed"),
        (["balance", "a", "b", "--remove", "1"], "argument --remove: .* above 0 and below 1"),
        (["balance", "a", "b", "--metric", "l2", "--threshold", "x"], "argument --threshold"),
        (
            ["balance", "a", "b", "--metric", "l2", "--thresh", "1"],
            "--threshold --remove is required",
        ),
        (
            ["balance", "a", "b", "--metric", "l2", "--threshold", "1", "--workers", "0"],
            "--workers",
        ),
        (["evaluate", "m", "--sets", "demo", "--device", "gpu"], "argument --device: expected cpu"),
        (["sets", "pest"], "mclip sets: error: SET: pest: not in the registry .*'pets'"),
        (["params"], "required: ACTION"),
        (["params", "apply", "none.yaml"], "mclip params: error: params.yaml: no such file"),
        (["params", "aply"], "argument ACTION: invalid choice: 'aply'"),
        (["fetch", "nothing"], "mclip fetch: error: PACKAGE: no 'nothing'; there are "),
        (["strip", "none.ipynb"], "mclip strip: error: NOTEBOOK: none.ipynb: no such file"),
        (["latency", "--runtimes", "tpu"], "argument --runtimes: invalid choice: 'tpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line_on_stderr(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert re.search(message, said.err) and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir())


def test_nothing_asked_for_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "subcommands" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0


def test_how_exceptions_become_exit_codes(monkeypatch, capsys):
    class OfThisPackage(RuntimeError):
        __module__ = "mclip.somewhere"

    class WrongResult(OfThisPackage):
        __module__ = "mclip.somewhere"
        exit_code = 1

    def fails(error):
        def function(parser):
            """Fail."""

            def work(args):
                raise error

            return work

        monkeypatch.setitem(cli.COMMANDS, "fails", cli.Command(function))
        return cli.main(["fails"]), capsys.readouterr().err

    assert fails(OfThisPackage("a: b")) == (2, "mclip fails: error: a: b\n")
    assert fails(WrongResult("a: b")) == (1, "mclip fails: error: a: b\n")
    missing = FileNotFoundError(2, "No such file or directory", "a.txt")
    assert fails(missing) == (2, "mclip fails: error: a.txt: No such file or directory\n")
    assert fails(KeyboardInterrupt()) == (130, "mclip fails: stopped\n")
    with pytest.raises(ZeroDivisionError):  # a defect of ours is not hidden
        fails(ZeroDivisionError())


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error():
    line = f"{sys.executable} -m mclip sets | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and not done.stderr


def shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def test_check_counts_names_what_is_skipped_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shard("a.tar", {"0.png": png(1), "0.txt": b"one", "1.png": b"broken", "1.txt": b"two"})
    shard("b.tar", {"0.png": png(2), "0.txt": b"again", "2.png": png(3), "2.txt": b" "})
    words = ["check", "[ab].tar", "none.tar", "--workers", "1"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 shards read: 1 samples can be used\n4 skipped:\n")
    for line in (
        "          1  corrupt image",
        "          1  duplicate key",
        "a.tar: 1: corrupt image: ",
        "none.tar: (no key): missing shard: No such file or directory",
    ):
        assert f"\n{line}" in said
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar", "b.tar"}

    assert cli.main([*words, "--json", "--manifest", "pairs"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["samples"] == 1 and len(manifest["skipped"]) == 4
    assert manifest["shards"][0]["file"] == "../a.tar"
    assert json.loads(Path("pairs/manifest.json").read_text()) == manifest

    assert cli.main(["check", "none.tar", "--manifest", "other"]) == 1
    assert "0 shards read: 0 samples" in capsys.readouterr().out and not Path("other").exists()


def test_sets_and_params(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wds_vtab-pets").mkdir()
    assert cli.main(["sets", "robustness", "pets", "--root", "."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][-1] == "pets" and len(lines) == 6
    assert lines[-1].endswith(" here") and "hf download" in lines[0]
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    assert cli.main(["params", "check"]) == 0
    Path("mine.yaml").write_text("distill:\n  trian: {}\n")
    before = Path("params.yaml").read_bytes()
    assert cli.main(["params", "apply", "mine.yaml"]) == 2
    assert "distill.trian" in capsys.readouterr().err and Path("params.yaml").read_bytes() == before
    assert cli.main(["params", "apply", str(ROOT / "params/smoke.yaml")]) == 0
    assert Path("params.yaml").read_bytes() != before
    Path("params.yaml").write_text("a: [")
    assert cli.main(["params", "apply", "mine.yaml"]) == 2
    assert "not valid YAML" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ["balance", "evaluate", "export", "params"])
def test_python_m_is_the_subcommand(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"mclip.{name}", run_name="__main__", alter_sys=True)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mclip {name} ")


@pytest.mark.slow
def test_workers_start_from_the_command_too(tmp_path):
    """Processes that are spawned import the main module again: it must not run then."""
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.tar", {f"{name}.png": png(1), f"{name}.txt": b"one"})
    done = subprocess.run(
        [sys.executable, "-m", "mclip", "check", "a.tar", "b.tar", "--workers", "2"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 shards read: 2 samples can be used\n0 skipped\n"


@pytest.mark.slow
def test_the_wheel_has_all_files_and_the_command(tmp_path):
    """`pip install .` without an index: built by setuptools from a copy, which stays as it was."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "mclip", source / "mclip", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    files = {p.relative_to(source).as_posix() for p in (source / "mclip").rglob("*") if p.is_file()}
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=source, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("mclip-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "mclip = mclip.cli:main" in archive.read(entry).decode()
        archive.extractall(tmp_path / "site")
    assert names == files
    # the command and what it reads of the package, from there and not from the clone
    code = (
        "import sys, mclip; from mclip.cli import main; print(mclip.__file__)\n"
        "sys.exit(main(['sets', 'demo']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site")) and "emoji-unseen" in done.stdout
