"""The parameters that a stage's notebook sees: those that dvc.yaml lists for it, as attributes."""

import os
from pathlib import Path
from typing import Any

from mclip.params.schema import check
from mclip.params.tree import ParamsError, Section, keys, merge, read_yaml


def stage(injected: dict[str, Any] | None) -> Any:
    """Give a stage's notebook its parameters, as attributes.

    The working folder becomes the repository's root, where every stage runs.

    Parameters
    ----------
    injected : dict or None
        What `mclip.pipeline.run` put into the notebook: the part of params.yaml that the stage
        picks, nested as there. None where the notebook is opened by hand: all of params.yaml.

    Returns
    -------
    Params
        Touching a key that the stage did not pick raises ParamsError.

    Raises
    ------
    ParamsError
        If params.yaml with what was injected is not valid.

    Examples
    --------
    >>> from mclip import params
    >>> params.stage({"balance": {"threshold": 0.2}}).balance.threshold
    0.2
    """
    here = Path.cwd()
    if root := next((d for d in (here, *here.parents) if (d / "params.yaml").exists()), None):
        os.chdir(root)
    whole = check(merge(read_yaml("params.yaml"), injected or {}))
    return whole if injected is None else _only(whole, injected, "")


class _Entries(dict):
    """A map of sections of which a stage picked some entries, such as distill.recipes["clip"]."""

    def __init__(self, path: str, entries: dict[str, Any]):
        super().__init__(entries)
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise ParamsError(f"{self._path}{name} is not among this stage's params in dvc.yaml")


def _only(value: Any, picked: Any, path: str) -> Any:
    """A value without the keys below it that were not picked."""
    if isinstance(value, Section):
        spelled = keys(type(value))
        kept = {
            name: _only(getattr(value, name), picked[key], f"{path}{key}.")
            for name, key in spelled.items()
            if key in picked
        }
        if len(kept) < len(spelled):
            value = value.model_copy()
            value.__dict__.clear()
            value._path = path
        value.__dict__.update(kept)
        return value
    if isinstance(value, dict) and set(picked) < set(value):
        return _Entries(path, {k: _only(value[k], v, f"{path}{k}.") for k, v in picked.items()})
    return value
