"""Evaluation sets named on a command line: from the registry, as a suite, or as a folder."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from mclip.data.evalsets import EvalError, task_of
from mclip.evaluate import tasks
from mclip.params import EvalSet, registry


def named_sets(
    names: Sequence[str], root: str | Path = registry.ROOT, *, probe: bool = False
) -> dict[str, EvalSet]:
    """Sets by name.

    Parameters
    ----------
    names : sets or suites of the registry, or folders
    root : folder of the registry's sets, each under the copy's or the set's name
    probe : with linear probes, for tasks that can have one

    Returns
    -------
    sets : by name; a set that is missing has the path where it is expected

    Raises
    ------
    UnknownSet : neither a name nor a folder; the message suggests the nearest name
    EvalError : a folder whose task is none of ours, or not the task of the set it is a copy of
    """
    sets: dict[str, EvalSet] = {}
    for name in registry.members(names):
        key, values = _folder(Path(name)) if Path(name).is_dir() else (name, _place(name, root))
        values = registry.filled(key, values, root)
        try:
            spec = EvalSet.model_validate(values)
        except ValidationError as err:
            raise EvalError(f"{name}: {err.errors()[0]['msg']}") from None
        if (
            key in sets and Path(sets[key].path).resolve() != Path(spec.path).resolve()
        ):  # another folder of the same name
            key = spec.path
        probed = {"probe": probe and tasks.get(spec.task).PROBE}
        sets[key] = spec.model_copy(update=probed)
    return sets


def _folder(path: Path) -> tuple[str, dict[str, str]]:
    """The name and the settings of a set in a folder; the registry's name if it is a copy of it."""
    task = task_of(path)
    if task not in tasks.names():
        file = path / "dataset_type.txt"
        said = f"{file}: {task!r}" if file.exists() else f"{path}: its samples say {task!r}, which"
        raise EvalError(f"{said} is none of {', '.join(tasks.names())}")
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
