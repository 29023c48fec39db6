"""Parameters as plain trees: read, merge, pick; and messages about keys that are wrong."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from ruamel.yaml import YAML, YAMLError


class ParamsError(ValueError):
    """A parameter is unknown, of a wrong type or out of range; the message names the key."""


class NotThere(ParamsError, AttributeError):
    """A key was read that does not exist, or that the stage did not pick."""


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
    """Read a YAML file as plain dicts and lists.

    Parameters
    ----------
    path : path
        Of the file.

    Returns
    -------
    dict
        Its sections.

    Raises
    ------
    ParamsError
        If the file is missing or is not YAML; the message names file and line.

    Examples
    --------
    >>> from mclip import params
    >>> sorted(params.read_yaml("params.yaml"))[:3]
    ['ablations', 'balance', 'cluster']
    """
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
    """Lay the leaves of one tree over another, in place.

    Parameters
    ----------
    base : dict
        The tree that is changed.
    overlay : dict
        Maps are merged, lists replaced. A map with the key `_replace: true` replaces the one below
        it whole.

    Returns
    -------
    dict
        The changed `base`.

    Examples
    --------
    >>> from mclip import params
    >>> base = {"a": {"b": 1, "c": 2}, "d": {"e": 3}}
    >>> params.merge(base, {"a": {"b": 5}, "d": {"_replace": True}})
    {'a': {'b': 5, 'c': 2}, 'd': {}}
    """
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
    """Lay some keys over a section, such as a recipe.

    Parameters
    ----------
    section : Section
        It is not changed.
    changes : dict
        As in `merge`.

    Returns
    -------
    Section
        Of the same class, validated.

    Raises
    ------
    pydantic.ValidationError
        If a key or a value is wrong.

    Examples
    --------
    >>> from mclip import params
    >>> recipe = params.load().distill.recipes["clip-cid"]
    >>> params.varied(recipe, {"weight": {"cluster": 0.0}}).weight
    {'clip': 1.0, 'cluster': 0.0, 'instance': 1.0, 'affinity': 0.0, 'feature': 0.0}
    """
    return type(section).model_validate(merge(section.model_dump(by_alias=True), changes))


def pick(tree: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """Pick the part of a tree that dotted keys name.

    Parameters
    ----------
    tree : dict
        Such as params.yaml.
    keys : list of str
        Such as "distill.train.lr".

    Returns
    -------
    dict
        Nested as the tree.

    Raises
    ------
    ParamsError
        If the tree has no such key.

    Examples
    --------
    >>> from mclip import params
    >>> params.pick({"a": {"b": 1, "c": 2}, "d": 3}, ["a.b"])
    {'a': {'b': 1}}
    """
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
    """The end of a message about a wrong name: the likeliest one, and all that are allowed."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (allowed: {', '.join(known)})"


def absent(key: str, names: Iterable[str], known: Iterable[str], what: str) -> Iterator[str]:
    """Say which names are not among the known ones, for `Section.check`.

    Parameters
    ----------
    key : str
        Where params.yaml has the names.
    names : iterable of str
        Names that must exist.
    known : iterable of str
        Those that do.
    what : str
        What they name, such as "recipe".

    Yields
    ------
    str
        A line for each unknown name, with the nearest known one.

    Examples
    --------
    >>> from mclip.params import absent
    >>> list(absent("baseline", ["clpi"], {"clip": 1, "combined": 2}, "recipe"))
    ["baseline: no such recipe 'clpi'; did you mean 'clip'? (allowed: clip, combined)"]
    """
    for name in names:
        if name not in known:
            yield f"{key}: no such {what} {name!r}{nearest(name, known)}"


def explain(error: ValidationError, kind: type[Section]) -> list[str]:
    """Put pydantic's errors about a section into lines that begin with the key.

    Parameters
    ----------
    error : pydantic.ValidationError
        Of the section.
    kind : type of Section
        Its class.

    Returns
    -------
    list of str
        One line an error.

    Examples
    --------
    >>> import pydantic
    >>> from mclip import params
    >>> try:
    ...     params.EvalSet.model_validate({"path": "a", "taks": "retrieval"})
    ... except pydantic.ValidationError as error:
    ...     print(params.explain(error, params.EvalSet)[0].partition(" (")[0])
    taks: unknown key; did you mean 'task'?
    """
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
