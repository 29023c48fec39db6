"""Evaluation sets that a command line names: of the registry, a suite, or a folder."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from mclip.data.evalsets import ANSWER, EvalError
from mclip.params import EvalSet, registry


def named_sets(
    names: Sequence[str], root: str | Path = registry.ROOT, *, probe: bool = False
) -> dict[str, EvalSet]:
    """Sets by name.

    Parameters
    ----------
    names : sets or suites of the registry, or folders
    root : folder of the registry's sets, each under the copy's or the set's name
    probe : with linear probes, for classification

    Returns
    -------
    sets : by name; a set that is missing has the path where it is expected

    Raises
    ------
    UnknownSet : neither a name nor a folder; the message suggests the nearest name
    EvalError : a folder whose task is none of ours, or not the task of the set it is a copy of
    """
    sets = {}
    for name in registry.members(names):
        key, values = _folder(Path(name)) if Path(name).is_dir() else (name, _place(name, root))
        values = registry.filled(key, values, root)
        try:
            sets[key] = EvalSet(**values | {"probe": probe and values.get("task") != "retrieval"})
        except ValidationError as err:
            raise EvalError(f"{name}: {err.errors()[0]['msg']}") from None
    return sets


def _folder(path: Path) -> tuple[str, dict[str, str]]:
    """The name and the settings of a set in a folder; the registry's name if it is a copy of it."""
    file = path / "dataset_type.txt"
    task = file.read_text().strip().lower() if file.exists() else "classification"
    if task not in ANSWER:
        raise EvalError(f"{file}: {task!r} is none of {', '.join(ANSWER)}")
    names = [key for key, entry in registry.SETS.items() if path.name in (key, entry.folder)]
    return (names or [path.name])[0], {"path": str(path), "task": task}


def _place(name: str, root: str | Path) -> dict[str, str]:
    """The first folder that holds a set of the registry; empty if there is none."""
    places = [Path(root) / name]
    if entry := registry.get(name):
        places.append(Path(entry.place(root)))
    if name in registry.SUITES["demo"]:  # a part of it, where there is no copy
        places.append(Path(registry.MADE) / name)
    return next(({"path": str(place)} for place in places if place.is_dir()), {})
