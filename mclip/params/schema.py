"""params.yaml as a whole: read, checked, with an overlay laid over it."""

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
        """The names in one section that another does not have."""
        models, embedded = self.teachers.models, self.embed.teachers
        yield from absent("embed.teachers", embedded, models, "teacher")
        yield from absent("reinforce.ensemble", self.reinforce.ensemble, models, "teacher")
        yield from absent("balance.teacher", [self.balance.teacher], embedded, "embedded teacher")
        yield from absent("cluster.teacher", [self.cluster.teacher], embedded, "embedded teacher")
        yield from (f"ablations.{line}" for line in self.ablations.check(p))


def check(data: dict[str, Any], source: str = "params.yaml") -> Params:
    """Validate a whole tree of parameters; ParamsError lists each bad key and what is allowed."""
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
    """Read and validate params.yaml."""
    return check(read_yaml(path), str(path))


def apply_overlay(overlay: str | Path, path: str | Path = "params.yaml") -> None:
    """Rewrite params.yaml with an overlay laid over it; comments stay; checked before it is
    written.
    """
    yaml = YAML()
    yaml.width = 120
    tree = yaml.load(Path(path).read_text())
    merge(tree, read_yaml(overlay))
    buffer = io.StringIO()
    yaml.dump(tree, buffer)
    check(YAML(typ="safe").load(buffer.getvalue()), f"{path} + {overlay}")
    write_whole(path, buffer.getvalue())
