"""The sections of params.yaml that the stages read: every key, its type and its range."""

import pkgutil
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mclip.params import registry, terms
from mclip.params.tree import Section, absent, keys

Metric = Literal["l2", "sql2", "cosine"]
Precision = Literal["auto", "fp32", "bf16"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Spread(Section):
    """A stage whose work goes to several processes; what comes out is the same, see
    mclip.system.workers.
    """

    workers: PositiveInt = 1
    backend: Literal["processes", "ray"] = "processes"


class AltText(Section):
    """Share of each sort of alt text."""

    name: Fraction
    unicode: Fraction
    shortcode: Fraction
    keywords: Fraction
    file: Fraction

    @pydantic.model_validator(mode="after")
    def _shares_of_one(self):
        if abs(sum(self.model_dump().values()) - 1) > 1e-6:
            raise ValueError("the shares must sum to 1")
        return self


class DemoData(Section):
    styles: list[Literal["noto", "twemoji", "fluent"]] = Field(min_length=1)
    cifar_train: Annotated[int, Field(ge=0, le=40_000)]
    cifar_probe: Annotated[int, Field(ge=20, le=10_000)]
    cifar_align: Annotated[int, Field(ge=0, le=40_000)]
    cifar_test: Annotated[int, Field(ge=10, le=10_000)]
    captions: Literal["web", "clean"]
    alt_text: AltText
    skin_tones: Fraction
    copies: Fraction
    holdout_every: Annotated[int, Field(ge=2)]
    openmoji_probe: Annotated[int, Field(ge=2)]
    class_min: PositiveInt
    max_concepts: Annotated[int, Field(ge=20)] | None
    image_px: Annotated[int, Field(ge=16, le=64)]
    seed: NonNegativeInt

    @pydantic.model_validator(mode="after")
    def _enough_photos(self):
        if self.cifar_train + self.cifar_probe + self.cifar_align > 50_000:
            raise ValueError(
                "cifar_train, cifar_probe and cifar_align share CIFAR-10's 50,000 training images"
            )
        return self


class Data(Spread):
    workers: PositiveInt | None = None  # type: ignore[assignment]
    source: Literal["demo", "webdataset"]
    shards: list[str]
    # the file that has a sample's caption, or json.KEY
    captions: Annotated[str, Field(pattern=r"^([a-z0-9_]+|json\.[^.]+)$")] = "txt"
    # a table of pairs to skip, with a column `key`
    leave_out: str | None = None
    shard_size: PositiveInt
    demo: DemoData

    @pydantic.model_validator(mode="after")
    def _shards_given(self):
        if self.source == "webdataset" and not self.shards:
            raise ValueError(
                "source webdataset needs at least one path, glob or URL in data.shards"
            )
        if self.leave_out and self.source != "webdataset":
            raise ValueError("leave_out is of source webdataset")
        return self


class TeacherParts(Section):
    tower: Literal["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
    image_px: Annotated[int, Field(ge=32, le=512)]


class Align(Section):
    embed_dim: PositiveInt
    image_components: PositiveInt
    steps: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]
    lr: PositiveFloat
    text_lr_ratio: NonNegativeFloat
    weight_decay: NonNegativeFloat
    logit_scale_max: PositiveFloat
    text_context: Annotated[int, Field(ge=4, le=512)]
    seed: NonNegativeInt


class CaptionerTrain(Section):
    tower: Literal["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
    vocabulary: Annotated[int, Field(ge=8)]
    image_px: Annotated[int, Field(ge=32)]
    width: Annotated[int, Field(ge=64, multiple_of=64)]
    layers: PositiveInt
    text_context: Annotated[int, Field(ge=4)]
    steps: PositiveInt
    batch_size: PositiveInt
    lr: PositiveFloat
    lr_adamw: PositiveFloat
    precision: Precision
    seed: NonNegativeInt


class Teachers(Section):
    models: dict[str, str] = Field(min_length=1)
    assemble: dict[str, TeacherParts]
    align: Align
    captioner: str
    captioner_train: CaptionerTrain | None

    @pydantic.model_validator(mode="after")
    def _assembled_are_models(self):
        for name in self.assemble:
            if not self.models.get(name, "").startswith("local-dir:"):
                raise ValueError(
                    f"assemble.{name} needs a local-dir: entry of its name in teachers.models"
                )
        return self


class Embed(Spread):
    teachers: list[str] = Field(min_length=1)
    batch_size: PositiveInt
    precision: Precision


class Balance(Spread):
    teacher: str
    metric: Metric
    threshold: PositiveFloat | None = None
    remove: Annotated[float, Field(gt=0, lt=1)] | None = None  # a fraction of the images
    curve: list[PositiveFloat]

    @pydantic.model_validator(mode="after")
    def _one_of_both(self):
        if (self.threshold is None) == (self.remove is None):
            raise ValueError("either threshold or remove: write null for the other one")
        return self


class Cluster(Section):
    teacher: str
    clusters: PositiveInt
    iterations: PositiveInt
    points_per_centre: PositiveInt | None = None
    seed: NonNegativeInt


class Reinforce(Spread):
    pairs: Literal["all", "kept"] = "all"
    ensemble: list[str] = Field(min_length=1)
    n_aug: PositiveInt
    n_syn: NonNegativeInt
    image_px: PositiveInt
    scale_min: Annotated[float, Field(gt=0, le=1)]
    randaugment_ops: NonNegativeInt
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)]
    caption_top_p: Annotated[float, Field(gt=0, le=1)]
    caption_candidates: PositiveInt
    batch_size: PositiveInt
    precision: Precision
    seed: NonNegativeInt


class Recipe(Section, extra="allow"):
    """A recipe; besides these keys it has the options of each term that has some, by its name
    (mclip/distill/terms, which know the schema of theirs).
    """

    title: str
    pairs: Literal["all", "kept"]
    reinforced: bool = False
    weight: dict[str, NonNegativeFloat]  # of each term
    lambda_: Fraction = Field(1.0, alias="lambda")
    synthetic: bool = False
    multi_positive: bool = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _options_of_terms(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = keys(cls).values()
        options = {key: value for key, value in values.items() if key not in own}
        return {k: v for k, v in values.items() if k in own} | terms.options(options, own)

    @pydantic.field_validator("weight")
    @classmethod
    def _weight_of_every_term(cls, weight: dict[str, float]) -> dict[str, float]:
        return terms.weights(weight)

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        if not any(self.weight.values()):
            raise ValueError("weight: at least one loss needs a weight above 0")
        needs = terms.needed(self.weight)
        stored = needs.get("ensemble", []) + ["synthetic"] * self.synthetic
        if stored and not self.reinforced:
            raise ValueError(f"reinforced: true is needed for {' and '.join(stored)}")
        if "label" in needs and self.pairs == "all":  # only pairs that are kept are clustered
            raise ValueError(f"pairs: kept is needed for {' and '.join(needs['label'])}")
        return self

    @pydantic.field_validator("pairs", mode="before")
    @classmethod
    def _two_keys(cls, pairs: Any) -> Any:
        if pairs == "reinforced":
            raise ValueError("write pairs: all or kept, and reinforced: true")
        return pairs


class Train(Section):
    samples: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]
    accumulate: PositiveInt
    grad_checkpoint: bool
    loss_kernel: Literal["auto", "plain", "tiled", "triton"]
    optimizer: Literal["muon", "adamw"]
    lr: PositiveFloat
    lr_adamw: PositiveFloat
    lr_min: NonNegativeFloat
    lr_centres: PositiveFloat
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    betas: tuple[Fraction, Fraction]
    grad_clip: PositiveFloat | None
    ema: Annotated[float, Field(gt=0, lt=1)] | None
    precision: Precision
    logit_scale_init: PositiveFloat | None  # None: the student's own
    logit_scale_max: PositiveFloat
    light_scale_min: Annotated[float, Field(gt=0, le=1)]
    cache_pixels: bool
    light_views: PositiveInt
    processes: PositiveInt
    parallel_runs: PositiveInt
    threads: NonNegativeInt
    workers: NonNegativeInt
    checkpoint_every: PositiveInt

    @pydantic.model_validator(mode="after")
    def _equal_shares(self):
        if self.batch_size % self.processes:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of processes {self.processes}"
            )
        return self


class Probe(Section):
    probe: str  # a set with a linear probe


class Claim(Section):
    """What a paper says, fixed before the run: `better` is above `worse` on `outcome`."""

    claim: str
    better: str
    worse: str
    paper: str = ""
    outcome: str | Probe = "held-out mean"  # or the name of a set, or {probe: SET}


def unknown_claims(claims: list[Claim], names: Iterable[str], p: Any) -> Iterator[str]:
    """As `Section.check`: claims about recipes or variants, or on sets, that there are not."""
    for claim in claims:
        yield from absent("claims", [claim.better, claim.worse], names, "recipe or variant")
        wanted = claim.outcome.probe if isinstance(claim.outcome, Probe) else claim.outcome
        if wanted != "held-out mean":
            yield from absent("claims.outcome", [wanted], p.evaluate.sets, "evaluation set")


class Distill(Section):
    """What is trained. Where `from` names weights, they are the student, logit scale included: both
    `student` and `train.logit_scale_init` say so, whatever params.yaml has there.
    """

    student: str
    from_: str | None = Field(None, alias="from")
    seeds: list[NonNegativeInt] = Field(min_length=1)
    train: Train
    recipes: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], Recipe] = Field(min_length=1)
    claims: list[Claim] = Field(default=[], max_length=5)  # settled by the report

    @pydantic.field_validator("from_")
    @classmethod
    def _has_weights(cls, name: str | None) -> str | None:
        if name is not None and "/" not in name and not name.startswith("local-dir:"):
            raise ValueError(f"{name} has no weights: NAME/TAG, NAME/FILE or local-dir:FOLDER")
        return name

    @pydantic.model_validator(mode="before")
    @classmethod
    def _starts_from(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("from"), str):
            return values
        values = values | {"student": values["from"]}
        if isinstance(values.get("train"), dict):
            values["train"] = values["train"] | {"logit_scale_init": None}
        return values

    def check(self, p: Any) -> Iterator[str]:
        yield from unknown_claims(self.claims, self.recipes, p)
        for name, recipe in self.recipes.items():
            yield from (f"recipes.{name}.{line}" for line in reinforced_as_asked(recipe, p))


def reinforced_as_asked(recipe: Recipe, p: Any) -> Iterator[str]:
    """As `Section.check`: does `reinforce` store what a recipe trains on?"""
    if recipe.reinforced and recipe.pairs == "all" and p.reinforce.pairs == "kept":
        yield "pairs: all with reinforced: true needs reinforce.pairs: all"
    scale = getattr(recipe, "affinity").scale  # noqa: B009 - of a term's options
    if recipe.weight["affinity"] and isinstance(scale, dict):
        yield from absent("affinity.scale", scale, p.reinforce.ensemble, "stored teacher")


# a task's metrics that may stand for a set, the default first; sets of other tasks name theirs
EVAL_METRICS = {
    "classification": [
        "top1",
        "mean_per_class",
        "f1_macro",
        "worst_group_top1",
        "worst_group_top5",
    ],
    "retrieval": ["mean_r1"],
}


def eval_tasks() -> list[str]:
    """The names of all tasks: the files of mclip/evaluate/tasks, which are not imported."""
    package = sys.modules.get("mclip.evaluate.tasks")
    evaluate: Any = find_spec("mclip.evaluate")
    folders = evaluate.submodule_search_locations
    paths = package.__path__ if package else [str(Path(folder) / "tasks") for folder in folders]
    return sorted(module.name for module in pkgutil.iter_modules(paths))


class EvalSet(Section):
    """A set of `evaluate.sets`: what it does not say is the registry's (mclip/params/registry.py),
    found by its name.
    """

    path: str
    task: str = "classification"  # a file of mclip/evaluate/tasks
    # the one that stands for the set; the first of EVAL_METRICS[task] if none is given
    metric: str = "top1"
    captions: Literal["each", "distinct"] = (
        "each"  # retrieval: what is an entry, see mclip.evaluate.tasks.retrieval
    )
    groups: NonNegativeInt | None = None  # the column of KEY.npy that worst_group metrics group by
    probe: bool = False
    kind: str = ""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _metric_of_the_task(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("metric") is not None:
            return values
        task = values.get("task", cls.model_fields["task"].default)
        return values | {"metric": EVAL_METRICS.get(task, [""])[0]}

    @pydantic.model_validator(mode="after")
    def _metric_fits(self):
        if self.task not in eval_tasks():
            raise ValueError(f"task: {self.task} is none of {', '.join(eval_tasks())}")
        if not self.metric:
            raise ValueError(f"metric: a set of the task {self.task} needs one")
        if self.metric not in EVAL_METRICS.get(self.task, [self.metric]):
            raise ValueError(f"metric: {self.metric} is none of {self.task}")
        if self.metric.startswith("worst_group") and self.groups is None:
            raise ValueError(f"metric: {self.metric} needs groups, a column of KEY.npy")
        return self


class Evaluate(Section):
    batch_size: PositiveInt
    sets: dict[str, EvalSet] = Field(min_length=1)
    probe_c: list[PositiveFloat] = Field(min_length=1)
    probe_halvings: NonNegativeInt
    shots: list[PositiveInt]
    seed: NonNegativeInt

    @pydantic.field_validator("sets", mode="before")
    @classmethod
    def _from_registry(cls, sets: Any) -> Any:
        """Each entry, a map, a path or nothing, filled up by its name."""
        if not isinstance(sets, dict):
            return sets
        return {
            k: registry.filled(k, v) if v is None or isinstance(v, dict | str) else v
            for k, v in sets.items()
        }
