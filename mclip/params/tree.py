"""Parameters as plain trees: read, lay one over another, pick; and what to say of a key that is
wrong.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from ruamel.yaml import YAML, YAMLError


class ParamsError(ValueError):
    """A parameter is unknown, of a wrong type or out of range; the message names the key."""


class NotThere(ParamsError, AttributeError):
    """A key of a section is touched that does not exist, or that the stage did not pick."""


class Section(BaseModel):
    """A part of params.yaml: no unknown keys, never changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
    _path: str = PrivateAttr("")  # where a section lies of which a stage picked some keys only

    def check(self, p: Any) -> Iterator[str]:
        """What contradicts the rest of params.yaml.

        Parameters
        ----------
        p : Params
            All of params.yaml.

        Yields
        ------
        str
            "KEY: what is wrong with it", the key as it is written below this section.
        """
        yield from ()

    def __getattr__(self, name: str) -> Any:
        """Only called for what is not there."""
        if name.startswith("_"):  # pydantic's own, or what IPython and pickle ask any object for
            return super().__getattr__(name)  # type: ignore[misc]
        if name in (more := self.__pydantic_extra__ or {}):  # of sections that allow more keys
            return more[name]
        spelled = keys(type(self))
        key = self._path + spelled.get(name, name)
        if name in spelled:
            raise NotThere(f"{key} is not among this stage's params in dvc.yaml")
        raise NotThere(f"{key}: unknown key{nearest(name, spelled.values())}")


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
    """The part of a tree that dotted keys name: ["a.b"] -> {"a": {"b": ...}}."""
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


def keys(kind: type[Section]) -> dict[str, str]:
    """The attributes of a section and how each is spelled in params.yaml."""
    return {name: field.alias or name for name, field in kind.model_fields.items()}


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say after a name that is wrong: the one that was meant, and all there are."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (allowed: {', '.join(known)})"


def absent(key: str, names: Iterable[str], known: Iterable[str], what: str) -> Iterator[str]:
    """A line for each name that is none of the known ones, for `Section.check`.

    >>> list(absent("baseline", ["clpi"], {"clip": 1, "combined": 2}, "recipe"))
    ["baseline: no such recipe 'clpi'; did you mean 'clip'? (allowed: clip, combined)"]
    """
    for name in names:
        if name not in known:
            yield f"{key}: no such {what} {name!r}{nearest(name, known)}"


def explain(error: ValidationError, kind: type[Section]) -> list[str]:
    """pydantic's errors of a section, each a line that starts with the key."""
    lines = []
    for e in error.errors():
        key, message = ".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")
        if e["type"] == "extra_forbidden":
            message = f"unknown key{nearest(str(e['loc'][-1]), _allowed(kind, e['loc'][:-1]))}"
        elif e["type"] == "missing":
            message = "missing"
        elif e["type"] != "value_error":
            message += f" (found {e['input']!r})"
        lines.append(f"{key}: {message}" if key else message)
    return lines


def _allowed(kind: type[Section], path: Sequence[int | str]) -> list[str]:
    """The keys of the section at a path, by pydantic's JSON schema."""
    whole = node = kind.model_json_schema()
    for part in path:
        entries = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
        node = node.get("properties", {}).get(part) or entries[0]  # of a section, of a map
        for either in [node, *node.get("anyOf", [])]:  # a section or null
            if "$ref" in either:
                node = whole["$defs"][either["$ref"].rpartition("/")[2]]
    return list(node["properties"])
