"""The section `ablations`: the papers' studies, learning curves, what students cost and see."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from mclip.params.tree import Section


class StudentsAblation(Section):
    models: list[str] = Field(min_length=1)


class LatencyAblation(Section):
    models: list[str] = Field(min_length=1)
    runtimes: list[
        Literal[
            "unfolded",
            "eager",
            "eager-bf16",
            "compile",
            "compile-bf16",
            "onnxruntime",
            "onnxruntime-int8",
        ]
    ] = Field(min_length=1)
    batches: list[PositiveInt] = Field(min_length=1)
    rounds: PositiveInt


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


class Learning(Section):
    fraction: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # of the pairs, the same ones for every recipe
    )
    recipes: list[str] = Field(min_length=1)
    baseline: str
    samples: list[PositiveInt] = Field(min_length=1)
    longer: list[PositiveInt]
    longer_seeds: list[NonNegativeInt]


class Amount(Section):
    fraction: Annotated[float, Field(gt=0, le=1)]  # of the pairs: few ones are seen many times
    samples: PositiveInt
    stored: dict[str, Any]  # laid over `reinforce`, for these pairs
    n_aug: list[PositiveInt]
    n_syn: list[NonNegativeInt]


class PcaPictures(Section):
    baseline: str
    teacher: str
    image_px: Annotated[int, Field(ge=32)]
    shown: dict[str, str | None] = Field(min_length=1)
    columns: Annotated[int, Field(ge=2)]
    classes: PositiveInt
    captions: str
    mosaics: PositiveInt


class EpochCost(Section):
    baseline: str
    rounds: PositiveInt


class WeightsPictures(Section):
    near_zero: PositiveFloat


class SearchPictures(Section):
    baseline: str
    set: str
    queries: list[str]
    rows: PositiveInt
    top: PositiveInt


class Ablations(Section):
    samples: PositiveInt
    seeds: list[NonNegativeInt] = Field(min_length=1)
    studies: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], Study]
    learning: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], Learning]
    # at most one entry: its stage writes one report; {}: no such stage
    students: dict[str, StudentsAblation] = Field(max_length=1)
    latency: dict[Literal["cpu", "cuda"], LatencyAblation] = Field(max_length=1)
    amount: dict[str, Amount] = Field(max_length=1)
    epoch: dict[str, EpochCost] = Field(max_length=1)
    pca: dict[str, PcaPictures] = Field(max_length=1)
    weights: dict[str, WeightsPictures] = Field(max_length=1)
    search: dict[str, SearchPictures] = Field(max_length=1)
