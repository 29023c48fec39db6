"""What a stage's notebook sees of the parameters: the parts that dvc.yaml lists for it, as
attributes.
"""

import os
from pathlib import Path
from typing import Any, get_args, get_origin

import pydantic

from mclip.params.schema import Params, load
from mclip.params.sections import EvalSet, from_registry
from mclip.params.tree import ParamsError, child, explain, is_section, keys, unknown


class _Part:
    """Some keys of a section, as attributes; touching one that the stage did not pick raises
    ParamsError.
    """

    def __init__(self, kind: Any, path: str, values: dict[str, Any]):
        self.__dict__.update(values)
        self._kind, self._path = kind, path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what IPython and pickle ask any object for
            raise AttributeError(name)
        key = f"{self._path}.{name}".lstrip(".").removesuffix("_")
        if name not in self._kind.model_fields:
            raise ParamsError(f"{key}: {unknown(name, keys(self._kind))}")
        raise ParamsError(f"{key} is not among this stage's params in dvc.yaml")

    def __repr__(self) -> str:
        return f"Part({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if not k.startswith('_'))})"


class _Entries(dict):
    """Some entries of a map of sections, such as distill.recipes["clip"]."""

    def __init__(self, path: str, values: dict[str, Any]):
        super().__init__(values)
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise ParamsError(f"{self._path}.{name} is not among this stage's params in dvc.yaml")


def stage(injected: dict[str, Any] | None) -> Any:
    """The parameters of a stage's notebook, as attributes.

    injected: what `mclip.pipeline.run` put into the notebook: the part of params.yaml that the
    stage picks, nested as there; None, when the notebook is opened by hand: all of params.yaml (the
    kernel then goes to the repository's root, where every stage runs). A whole section is its
    validated model.
    """
    if injected is not None:
        return _typed(Params, injected, "")
    here = Path.cwd()
    if root := next((d for d in (here, *here.parents) if (d / "params.yaml").exists()), None):
        os.chdir(root)
    return load()


def _typed(kind: Any, value: Any, path: str) -> Any:
    """value at a dotted path of the tree: a model where the section is whole, a part where it is
    not.
    """
    if get_origin(kind) is dict and get_args(kind)[1] is EvalSet:
        value = from_registry(value)
    if not isinstance(value, dict):
        return value
    below = {k: (child(kind, k), f"{path}.{k}".lstrip(".")) for k in value}
    if get_origin(kind) is dict:
        return _Entries(path, {k: _typed(below[k][0], v, below[k][1]) for k, v in value.items()})
    if not is_section(kind):
        return value
    if all(k in value for k, f in keys(kind).items() if f.is_required()):
        try:
            return kind.model_validate(value)
        except pydantic.ValidationError as err:
            raise ParamsError("\n".join(explain(e, Params, path) for e in err.errors())) from None
    if strange := next((k for k in value if k not in keys(kind)), None):
        raise ParamsError(f"{below[strange][1]}: {unknown(strange, keys(kind))}")
    names = {f.alias or n: n for n, f in kind.model_fields.items()}
    return _Part(
        kind, path, {names[k]: _typed(below[k][0], v, below[k][1]) for k, v in value.items()}
    )
