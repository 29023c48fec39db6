"""Read and check params.yaml as a whole, and lay overlays over it."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
from ruamel.yaml import YAML

from mclip.params.ablations import Ablations, studies
from mclip.params.sections import (
    Balance,
    Cluster,
    Data,
    Distill,
    Embed,
    Evaluate,
    Reinforce,
    Teachers,
)
from mclip.params.tree import ParamsError, Section, absent, explain, merge, read_yaml
from mclip.system.files import write_whole


class Params(Section):
    data: Data
    teachers: Teachers
    embed: Embed
    balance: Balance
    cluster: Cluster
    reinforce: Reinforce
    distill: Distill
    evaluate: Evaluate
    ablations: Ablations

    def check(self, p: "Params") -> Iterator[str]:
        """Find names in one section that another section lacks."""
        models, embedded = self.teachers.models, self.embed.teachers
        yield from absent("embed.teachers", embedded, models, "teacher")
        yield from absent("reinforce.ensemble", self.reinforce.ensemble, models, "teacher")
        yield from absent("balance.teacher", [self.balance.teacher], embedded, "embedded teacher")
        yield from absent("cluster.teacher", [self.cluster.teacher], embedded, "embedded teacher")
        yield from (f"distill.{line}" for line in self.distill.check(p))
        yield from (f"ablations.{line}" for line in self.ablations.check(p))


def check(data: dict[str, Any], source: str = "params.yaml") -> Params:
    """Validate a whole tree of parameters.

    Parameters
    ----------
    data : dict
        Content of params.yaml as plain dicts and lists.
    source : str, default "params.yaml"
        What the messages call it.

    Returns
    -------
    Params
        The parameters as attributes.

    Raises
    ------
    ParamsError
        Lists each wrong key, what is wrong with it and what is allowed, one a line.

    Examples
    --------
    >>> from mclip import params
    >>> tree = params.read_yaml("params.yaml")
    >>> tree["balance"]["metric"] = "l1"
    >>> params.check(tree)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    mclip.params.tree.ParamsError: params.yaml: balance.metric: Input should be 'l2', 'sql2' or ...
    """
    own: dict[str, Any] = {name: (settings | None, None) for name, settings in studies().items()}
    ablations = pydantic.create_model("Ablations", __base__=Ablations, **own)
    whole = pydantic.create_model("Params", __base__=Params, ablations=ablations)
    try:
        params = whole.model_validate(data)
        lines = list(params.check(params))
    except pydantic.ValidationError as err:
        lines = explain(err, whole)
    if lines:
        raise ParamsError("\n".join(f"{source}: {line}" for line in lines))
    return params


def load(path: str | Path = "params.yaml") -> Params:
    """Read and validate params.yaml.

    Parameters
    ----------
    path : path, default "params.yaml"
        Of the file.

    Returns
    -------
    Params
        The parameters as attributes.

    Raises
    ------
    ParamsError
        If the file is missing, is not YAML, or has wrong keys or values.

    Examples
    --------
    >>> from mclip import params
    >>> params.load().balance.metric
    'sql2'
    """
    return check(read_yaml(path), str(path))


def apply_overlay(overlay: str | Path, path: str | Path = "params.yaml") -> None:
    """Rewrite params.yaml with an overlay laid over it; comments stay.

    Parameters
    ----------
    overlay : path
        A part of params.yaml, such as params/smoke.yaml. Maps are merged, lists replaced; a map
        with the key `_replace: true` replaces the one below it.
    path : path, default "params.yaml"
        The file that is rewritten.

    Raises
    ------
    ParamsError
        If the result is not valid; then nothing is written.

    Examples
    --------
    >>> import pathlib, shutil, tempfile
    >>> from mclip import params
    >>> path = shutil.copy("params.yaml", tempfile.mkdtemp())
    >>> params.apply_overlay("params/smoke.yaml", path)
    >>> params.load(path).cluster.clusters
    10
    """
    yaml = YAML()
    yaml.width = 120
    tree = yaml.load(Path(path).read_text())
    merge(tree, read_yaml(overlay))
    buffer = io.StringIO()
    yaml.dump(tree, buffer)
    check(YAML(typ="safe").load(buffer.getvalue()), f"{path} + {overlay}")
    write_whole(path, buffer.getvalue())
