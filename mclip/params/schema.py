"""params.yaml as a whole: what its sections say of each other; read, checked, with an overlay laid
over it.
"""

import io
from pathlib import Path
from typing import Any

import pydantic
from ruamel.yaml import YAML

from mclip.params.ablations import Ablations, Amount, Variant
from mclip.params.sections import (
    Balance,
    Cluster,
    Data,
    Distill,
    Embed,
    Evaluate,
    Recipe,
    Reinforce,
    Teachers,
)
from mclip.params.tree import ParamsError, Section, explain, merge, read_yaml, varied
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

    @pydantic.model_validator(mode="after")
    def _names_exist(self):
        models, embedded = sorted(self.teachers.models), self.embed.teachers
        for key, names in {
            "embed.teachers": embedded,
            "reinforce.ensemble": self.reinforce.ensemble,
        }.items():
            if unknown := sorted(set(names) - set(models)):
                raise ValueError(
                    f"{key}: no such teacher {unknown[0]!r}; teachers.models has {models}"
                )
        for key, name in {"balance": self.balance.teacher, "cluster": self.cluster.teacher}.items():
            if name not in embedded:
                raise ValueError(
                    f"{key}.teacher: {name!r} is not embedded; embed.teachers has {embedded}"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _pictures_can_be_made(self):
        a, recipes, sets = self.ablations, sorted(self.distill.recipes), sorted(self.evaluate.sets)
        by_recipe = ("students", "amount", "epoch", "pca", "weights", "search")
        named = [
            (f"{key}.{entry}", entry, recipes) for key in by_recipe for entry in getattr(a, key)
        ]
        named += [
            (f"epoch.{entry}.baseline", epoch.baseline, recipes) for entry, epoch in a.epoch.items()
        ]
        for entry, pca in a.pca.items():
            named += [
                (f"pca.{entry}.baseline", pca.baseline, recipes),
                (f"pca.{entry}.teacher", pca.teacher, sorted(self.teachers.models)),
                *((f"pca.{entry}.shown.{name}", name, sets) for name in pca.shown),
                (f"pca.{entry}.captions", pca.captions, sets),
            ]
        for entry, search in a.search.items():
            named += [
                (f"search.{entry}.baseline", search.baseline, recipes),
                (f"search.{entry}.set", search.set, sets),
            ]
        for key, name, known in named:
            if name not in known:
                raise ValueError(
                    f"ablations.{key}: no such entry {name!r}; there are {', '.join(known)}"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _ablations_can_be_made(self):
        for name, study in self.ablations.studies.items():
            key = f"ablations.studies.{name}"
            self._recipe_exists(f"{key}.recipe", study.recipe)
            for which, variant in study.variants.items():
                self._variant_can_be_made(
                    f"{key}.variants.{which}", self.distill.recipes[study.recipe], variant
                )
        for name, study in self.ablations.amount.items():
            self._amount_can_be_made(f"ablations.amount.{name}", study)
        for name, curve in self.ablations.learning.items():
            for recipe in [*curve.recipes, curve.baseline]:
                self._recipe_exists(f"ablations.learning.{name}", recipe)
        return self

    def _recipe_exists(self, key: str, recipe: str) -> None:
        if recipe not in self.distill.recipes:
            raise ValueError(
                f"{key}: no such recipe {recipe!r}; distill.recipes has "
                f"{', '.join(sorted(self.distill.recipes))}"
            )

    def _amount_can_be_made(self, key: str, study: Amount) -> None:
        recipe = key.rpartition(".")[2]
        if recipe in self.distill.recipes and not self.distill.recipes[recipe].synthetic:
            raise ValueError(f"{key}: the recipe needs synthetic: true")
        try:
            stored = varied(self.reinforce, study.stored)
        except pydantic.ValidationError as err:
            raise ValueError(
                "; ".join(f"{key}.stored.{explain(e, Reinforce)}" for e in err.errors())
            ) from None
        if unknown := sorted(set(stored.ensemble) - set(self.teachers.models)):
            raise ValueError(f"{key}.stored.ensemble: no such teacher {unknown[0]!r}")
        for what in ("n_aug", "n_syn"):
            if more := [n for n in getattr(study, what) if n >= (most := getattr(stored, what))]:
                raise ValueError(
                    f"{key}.{what}: {more[0]} is not below the {most} that are stored (stored.{what})"
                )

    def _variant_can_be_made(self, key: str, recipe: Recipe, variant: Variant) -> None:
        try:
            recipe = varied(recipe, variant.recipe)
        except pydantic.ValidationError as err:
            raise ValueError(
                "; ".join(explain(e, Params, f"{key}.recipe") for e in err.errors())
            ) from None
        embedded, chosen = self.embed.teachers, variant.reinforced
        if variant.teacher is not None and variant.teacher not in embedded:
            raise ValueError(
                f"{key}.teacher: {variant.teacher!r} is not embedded; embed.teachers has {embedded}"
            )
        if variant.keep and recipe.pairs != "kept":
            raise ValueError(f"{key}.keep needs a recipe with pairs: kept")
        if (variant.clusters or variant.teacher) and not (
            recipe.weight.cluster or recipe.weight.instance
        ):
            raise ValueError(
                f"{key}: clusters and teacher need a recipe with weight.cluster or weight.instance"
            )
        if chosen is None:
            return
        ensemble = chosen.ensemble or self.reinforce.ensemble
        if recipe.pairs != "reinforced":
            raise ValueError(f"{key}.reinforced needs a recipe with pairs: reinforced")
        for what in ("n_aug", "n_syn"):
            if (getattr(chosen, what) or 0) > (stored := getattr(self.reinforce, what)):
                raise ValueError(f"{key}.reinforced.{what}: {stored} are stored (reinforce.{what})")
        if unknown := sorted(set(ensemble) - set(self.reinforce.ensemble)):
            raise ValueError(
                f"{key}.reinforced.ensemble: {unknown[0]!r} is not in reinforce.ensemble"
            )
        if chosen.n_aug == 0 and (unknown := sorted(set(ensemble) - set(embedded))):
            raise ValueError(f"{key}.reinforced: n_aug 0 needs {unknown[0]!r} in embed.teachers")
        if chosen.captions == "synthetic" and (recipe.synthetic or not self.reinforce.n_syn):
            raise ValueError(
                f"{key}.reinforced.captions: synthetic needs reinforce.n_syn and synthetic: false"
            )


def check(data: dict[str, Any], source: str = "params.yaml") -> Params:
    """Validate a whole tree of parameters; ParamsError lists each bad key and what is allowed."""
    try:
        return Params.model_validate(data)
    except pydantic.ValidationError as err:
        lines = [explain(e, Params) for e in err.errors()]
        raise ParamsError("\n".join(f"{source}: {line}" for line in lines)) from None


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
