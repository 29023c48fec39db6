"""What the documents name exists: modules and what is in them, files, subcommands and their options."""

import importlib
import json
import re
from pathlib import Path

import pytest

from mclip import cli

ROOT = Path(__file__).parents[1]
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "params.yaml", "dvc.yaml")),
    *sorted(ROOT.glob("params/*.yaml")),
    *sorted(ROOT.glob("benchmarks/*.md")),
    *sorted(ROOT.glob("notebooks/**/*.ipynb")),
    *sorted(ROOT.glob("mclip/**/*.py")),
]
DOTTED = re.compile(r"(?<![\w./-])mclip(?:\.[a-z_]\w*)+", re.IGNORECASE)
IMPORT = re.compile(r"from (mclip[\w.]*) import ([\w, ]+)")
FOLDERS = "mclip|tests|notebooks|benchmarks|params"
PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w")
# "`FILE::test_one`, `::test_two`"
TESTS = re.compile(r"`(tests/[\w/]+\.py)((?:(?:`,\s`)?::\w+)+)`")
# a command stands at the beginning of a line, or in backticks
COMMAND = re.compile(r"(?:^ *(?:# *)?|`)(?:python -m )?mclip ([a-z]+)([^`\n#]*)", re.MULTILINE)
YOURS = {"params/mine.yaml"}  # README's names for files of the reader


def text_of(path: Path) -> str:
    """The text; of a notebook that of its cells."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def is_placeholder(name: str) -> bool:
    """NAME, TASK or X stand for any name."""
    return any(part.isupper() for part in re.split(r"[./]", name))


def exists(dotted: str) -> bool:
    """Is there such a module, or such a thing in a module?"""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            break
    if length == len(parts):
        return True
    found = importlib.import_module(".".join(parts[:length]))
    for part in parts[length:]:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(path):
    text = text_of(path)
    dotted = {name for name in DOTTED.findall(text) if not is_placeholder(name)}
    for package, names in IMPORT.findall(text):
        dotted |= {f"{package}.{name.split()[0]}" for name in names.split(",") if name.strip()}
    paths = {name for name in PATH.findall(text) if not is_placeholder(name)} - YOURS
    wrong = [name for name in dotted if not exists(name)]
    wrong += [name for name in paths if not (ROOT / name).exists()]
    for file, tests in TESTS.findall(text):
        written = (ROOT / file).read_text()
        wrong += [name for name in re.findall(r"::(\w+)", tests) if f"def {name}(" not in written]
    for command, rest in COMMAND.findall(text):
        wrong += [f"mclip {command}{' ' + what if what else ''}" for what in unknown(command, rest)]
    assert not wrong, "\n".join(sorted(wrong))


def unknown(command: str, rest: str) -> list[str]:
    """What a command line gets wrong: "" the subcommand itself, or an option of it."""
    if command not in cli.COMMANDS:
        return [""]
    if cli.COMMANDS[command].parses_itself:
        return []
    known = cli.COMMANDS[command].parser()[0]._option_string_actions
    return [word for word in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest) if word not in known]


def test_a_wrong_name_is_found():
    assert exists("mclip.losses.clip_loss") and exists("mclip.params.registry.SETS")
    assert not exists("mclip.losses.clop_loss") and not exists("mclip.kernels")
    assert COMMAND.findall("call `mclip balance A B --treshold 1`") == [
        ("balance", " A B --treshold 1")
    ]
    assert unknown("balance", "A B --treshold 1 --metric l2") == ["--treshold"]
    assert unknown("balence", "") == [""]
    assert not is_placeholder("mclip/studies/ablate.py") and is_placeholder("mclip/studies/NAME.py")


def test_readmes_tree_has_every_room():
    tree = (
        text_of(ROOT / "README.md").partition("    mclip/  ")[2].partition("\n    benchmarks/")[0]
    )
    listed = re.findall(r"^      (\w[\w.]*)/?  ", tree, re.MULTILINE)
    here = {
        path.name for path in (ROOT / "mclip").iterdir() if not path.name.startswith(("_", "."))
    }
    assert sorted(listed) == sorted(here)
    for name in re.findall(r"\b\w+\.py\b", tree):
        assert list((ROOT / "mclip").rglob(name)), name
    for name in re.findall(r"^        (\w+)/ ", tree, re.MULTILINE):
        assert list((ROOT / "mclip").glob(f"*/{name}/*")), name
