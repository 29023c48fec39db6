"""The stages of dvc.yaml as DVC resolves them, and which of them runs a notebook."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ruamel.yaml import YAML

from mclip.params.tree import ParamsError, read_yaml

CALL = re.compile(r"\bmclip(?:\.pipeline\.| )run (.+)")  # in a command: what the runner is told


def resolved(root: str | Path = ".") -> dict[str, dict[str, Any]]:
    """The stages by the names that DVC gives them, foreach spelled out, ${...} filled in.

    Without dvc.yaml there are none.

    Raises
    ------
    ParamsError : DVC can't fill in dvc.yaml from params.yaml.
    """
    from dvc.exceptions import DvcException  # here: a notebook that reads its parameters needs none
    from dvc.fs import localfs
    from dvc.parsing import DataResolver

    path = Path(root) / "dvc.yaml"
    if not path.exists():
        return {}
    try:
        repo = SimpleNamespace(fs=localfs, config={})  # all that DVC asks of a repository here
        return DataResolver(repo, str(root), read_yaml(path)).resolve()["stages"]
    except DvcException as err:
        raise ParamsError(" ".join(str(err).split())) from None


def running(notebook: str, values: dict[str, Any], root: str | Path = ".") -> dict[str, Any]:
    """The stage that runs a notebook with these values; empty where there is none."""
    for entry in resolved(root).values():
        if call(entry) == (notebook, values):
            return entry
    return {}


def call(entry: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The notebook that a stage runs, and the values that it sets; None where it runs none."""
    commands = entry["cmd"] if isinstance(entry["cmd"], list) else [entry["cmd"]]
    found = next((match for command in commands if (match := CALL.search(command))), None)
    if found is None:
        return None
    notebook, *options = shlex.split(found[1])
    return notebook, dict(setting(text) for text in options if text != "-s")


def setting(text: str) -> tuple[str, Any]:
    """NAME=V as a name and a value, V read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ParamsError(f"-s {text}: expected NAME=VALUE")
    return name, YAML(typ="safe").load(value)


def paths(entry: dict[str, Any], kind: str) -> list[str]:
    """A stage's `deps`, `outs` or `metrics` without their settings."""
    return [item if isinstance(item, str) else next(iter(item)) for item in entry.get(kind, [])]
