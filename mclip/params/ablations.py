"""The section `ablations`: studies of recipe variants, learning curves, and the other studies.

Variants and curves: mclip/studies/ablate.py. The others are files of their own in mclip/studies,
found by their names.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from mclip.params import terms
from mclip.params.sections import Claim, Recipe, reinforced_as_asked, unknown_claims
from mclip.params.tree import Section, absent, explain, varied

Name = Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]


def studies() -> dict[str, type[Section]]:
    """The `Settings` of every study that is a file of its own, by its name: that of the file, of
    its key in `ablations` and of its notebook.
    """
    found = {}
    for place, name, _ in pkgutil.iter_modules(importlib.import_module("mclip.studies").__path__):
        file = Path(place.path, f"{name}.py")  # type: ignore[union-attr]
        # asked of the text: what has none, such as ablate.py, imports torch
        if file.is_file() and "\nclass Settings(" in file.read_text():
            found[name] = importlib.import_module(f"mclip.studies.{name}").Settings
    return found


class KeptPairs(Section):
    """Another choice of pairs than the balance stage's: by its threshold, or as many by another
    method.
    """

    threshold: PositiveFloat | None = None
    prune: Literal["semdedup", "density", "random"] | None = None

    @pydantic.model_validator(mode="after")
    def _one_of_both(self):
        if (self.threshold is None) == (self.prune is None):
            raise ValueError("either threshold or prune")
        return self


class Selection(Section):
    """A part of the stored reinforced set; null: all of it."""

    n_aug: NonNegativeInt | None = None
    n_syn: PositiveInt | None = None
    ensemble: Annotated[list[str], Field(min_length=1)] | None = None
    captions: Literal["true", "synthetic"] = "true"

    def check(self, p: Any) -> Iterator[str]:
        for key in ("n_aug", "n_syn"):
            if (getattr(self, key) or 0) > (stored := getattr(p.reinforce, key)):
                yield f"{key}: {stored} are stored (reinforce.{key})"
        ensemble = self.ensemble or p.reinforce.ensemble
        yield from absent("ensemble", ensemble, p.reinforce.ensemble, "stored teacher")
        if self.n_aug == 0 and (rest := sorted(set(ensemble) - set(p.embed.teachers))):
            yield f"n_aug: 0 takes embed's embeddings: embed.teachers lacks {', '.join(rest)}"
        if self.captions == "synthetic" and not p.reinforce.n_syn:
            yield "captions: synthetic needs reinforce.n_syn"


class Variant(Section):
    title: str | None = None
    recipe: dict[str, Any] = Field(default={})
    keep: KeptPairs | None = None
    clusters: PositiveInt | None = None
    teacher: str | None = None
    reinforced: Selection | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # of the pairs, the same ones for every recipe
    )
    samples: PositiveInt | None = None

    @pydantic.model_validator(mode="after")
    def _a_part_is_of_the_default(self):
        other = [key for key in ("keep", "clusters", "teacher", "reinforced") if getattr(self, key)]
        if self.fraction < 1 and other:
            raise ValueError(f"fraction is of the default's pairs: not with {other[0]}")
        return self


class Study(Section):
    recipe: str
    samples: PositiveInt | None = None
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    variants: dict[str, Variant] = Field(min_length=1)
    claims: list[Claim] = Field(default=[], max_length=5)

    def check(self, p: Any) -> Iterator[str]:
        yield from absent("recipe", [self.recipe], p.distill.recipes, "recipe")
        yield from unknown_claims(self.claims, self.variants, p)
        if recipe := p.distill.recipes.get(self.recipe):
            for name, variant in self.variants.items():
                yield from (
                    f"variants.{name}.{line}" for line in _contradictions(variant, recipe, p)
                )


def _contradictions(variant: Variant, recipe: Recipe, p: Any) -> Iterator[str]:
    """As `Section.check`, of a variant of a recipe."""
    try:
        recipe = varied(recipe, variant.recipe)
    except pydantic.ValidationError as err:
        yield from (f"recipe.{line}" for line in explain(err, Recipe))
        return
    yield from (f"recipe.{line}" for line in reinforced_as_asked(recipe, p))
    if variant.keep and recipe.pairs != "kept":
        yield "keep: needs a recipe with pairs: kept"
    if variant.keep and recipe.reinforced and p.reinforce.pairs == "kept":
        yield "keep: of a recipe with reinforced: true needs reinforce.pairs: all"
    for key in ("clusters", "teacher"):
        if getattr(variant, key) and "teacher" not in terms.needed(recipe.weight):
            named = terms.needed(dict.fromkeys(recipe.weight, 1.0))["teacher"]
            yield f"{key}: needs a recipe with {' or '.join(named)}"
    teacher = [variant.teacher] if variant.teacher else []
    yield from absent("teacher", teacher, p.embed.teachers, "embedded teacher")
    if not variant.reinforced:
        return
    if not recipe.reinforced:
        yield "reinforced: needs a recipe with reinforced: true"
    yield from (f"reinforced.{line}" for line in variant.reinforced.check(p))
    if variant.reinforced.captions == "synthetic" and recipe.synthetic:
        yield "reinforced.captions: synthetic needs a recipe with synthetic: false"


class Learning(Section):
    fraction: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # of the pairs, the same ones for every recipe
    )
    recipes: list[str] = Field(min_length=1)
    baseline: str
    samples: list[PositiveInt] = Field(min_length=1)
    longer: list[PositiveInt]
    longer_seeds: list[NonNegativeInt]

    def check(self, p: Any) -> Iterator[str]:
        yield from absent("recipes", self.recipes, p.distill.recipes, "recipe")
        yield from absent("baseline", [self.baseline], p.distill.recipes, "recipe")


class Ablations(Section):
    """Beside these keys every study of `studies` has its own; null: the study is left out."""

    samples: PositiveInt
    seeds: list[NonNegativeInt] = Field(min_length=1)
    studies: dict[Name, Study]
    learning: dict[Name, Learning]

    def check(self, p: Any) -> Iterator[str]:
        studies: dict[str, Section] = {
            f"studies.{name}": study for name, study in self.studies.items()
        }
        studies |= {f"learning.{name}": curve for name, curve in self.learning.items()}
        studies |= {name: value for name, value in self if isinstance(value, Section)}
        for key, study in studies.items():
            yield from (f"{key}.{line}" for line in study.check(p))
