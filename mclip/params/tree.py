"""Parameters as plain trees: read, lay one over another, pick; and what to say of a key that is
wrong.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML, YAMLError


class ParamsError(ValueError):
    """A parameter is unknown, of a wrong type or out of range; the message names the key."""


class Section(BaseModel):
    """A part of params.yaml: no unknown keys, never changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


S = TypeVar("S", bound=Section)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as plain dicts and lists; ParamsError names file and line when it isn't YAML."""
    try:
        data = YAML(typ="safe").load(Path(path).read_text())
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file (run from the repository's root)") from None
    except YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ParamsError(
            f"{path}:{where} not valid YAML: {getattr(err, 'problem', err)}"
        ) from None
    if not isinstance(data, dict):
        raise ParamsError(
            f"{path}: expected sections such as data:, balance:, found {type(data).__name__}"
        )
    return data


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """base with overlay's leaves laid over it, in place. Maps are merged, lists replaced;
    a map with the key `_replace: true` replaces the one below it whole."""
    for key, value in overlay.items():
        if (
            isinstance(value, dict)
            and isinstance(base.get(key), dict)
            and not value.get("_replace")
        ):
            merge(base[key], value)
        elif isinstance(value, dict):
            base[key] = {k: v for k, v in value.items() if k != "_replace"}
        else:
            base[key] = value
    return base


def varied(section: S, changes: dict[str, Any]) -> S:
    """A section, such as a recipe, with some keys laid over it: {"weight": {"cluster": 0.0}}."""
    return type(section).model_validate(merge(section.model_dump(by_alias=True), changes))


def pick(tree: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """The part of a tree that dotted keys name: ["distill.train"] -> {"distill": {"train": ...}}."""
    out: dict[str, Any] = {}
    for key in keys:
        source, target = tree, out
        *parents, last = key.split(".")
        for part in parents:
            if not isinstance(source, dict) or part not in source:
                raise ParamsError(f"params.yaml has no {key!r}")
            source, target = source[part], target.setdefault(part, {})
        if not isinstance(source, dict) or last not in source:
            raise ParamsError(f"params.yaml has no {key!r}")
        target[last] = source[last]
    return out


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def keys(kind: Any) -> dict[str, Any]:
    """The keys of a section as they are spelled in params.yaml, with pydantic's field of each."""
    return {f.alias or n: f for n, f in kind.model_fields.items()} if is_section(kind) else {}


def child(kind: Any, key: str) -> Any:
    """The type of a key of a section or of a map of sections; None where there is no such key."""
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    field = keys(kind).get(key)
    alternatives = [field.annotation, *get_args(field.annotation)] if field else []
    if field and get_origin(field.annotation) is dict:
        return field.annotation
    return next((a for a in alternatives if is_section(a)), field.annotation if field else None)


def unknown(key: str, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key{hint} (allowed: {', '.join(sorted(allowed))})"


def explain(error: Any, whole: type[Section], path: str = "") -> str:
    """One of pydantic's errors in a line that starts with the key; whole: the schema of the tree
    that path is in.
    """
    loc = (
        [*path.split("."), *map(str, error["loc"])]
        if path
        else [str(part) for part in error["loc"]]
    )
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        kind: Any = whole
        for part in loc[:-1]:
            kind = child(kind, part)
        return f"{key}: {unknown(loc[-1], keys(kind))}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (found {error['input']!r})"
