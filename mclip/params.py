"""The schema of params.yaml: every key, its type and its range; overlays; errors that name the key.

    python -m mclip.params check                          # is params.yaml valid?
    python -m mclip.params apply params/smoke.yaml        # lay a setting over params.yaml, comments kept
    git checkout params.yaml                              # and back

In a notebook::

    from mclip import params
    p = params.stage(sections) # what the stage picked of params.yaml; all of it when opened by hand
    p.balance.threshold
"""

import argparse
import difflib
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from ruamel.yaml import YAML, YAMLError

from mclip.data.registry import filled
from mclip.files import write_whole

Metric = Literal["l2", "sql2", "cosine"]
Precision = Literal["auto", "fp32", "bf16"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ParamsError(ValueError):
    """A parameter is unknown, of a wrong type or out of range; the message names the key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class DemoData(_Section):
    styles: list[Literal["noto", "twemoji", "fluent"]] = Field(min_length=1)
    cifar_train: Annotated[int, Field(ge=0, le=40_000)]
    cifar_probe: Annotated[int, Field(ge=20, le=10_000)]
    cifar_test: Annotated[int, Field(ge=10, le=10_000)]
    holdout_every: Annotated[int, Field(ge=2)]
    openmoji_every: PositiveInt
    max_concepts: Annotated[int, Field(ge=20)] | None
    image_px: Annotated[int, Field(ge=16, le=64)]
    seed: NonNegativeInt


class Data(_Section):
    source: Literal["demo", "webdataset"]
    shards: list[str]
    shard_size: PositiveInt
    demo: DemoData

    @pydantic.model_validator(mode="after")
    def _shards_given(self):
        if self.source == "webdataset" and not self.shards:
            raise ValueError("source webdataset needs at least one path, glob or URL in data.shards")
        return self


class TeacherParts(_Section):
    tower: Literal["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
    image_px: Annotated[int, Field(ge=32, le=512)]


class Align(_Section):
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


class CaptionerTrain(_Section):
    tower: Literal["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
    vocabulary: Annotated[int, Field(ge=300)]
    image_px: Annotated[int, Field(ge=32)]
    width: Annotated[int, Field(ge=64, multiple_of=64)]
    layers: PositiveInt
    text_context: Annotated[int, Field(ge=4)]
    steps: PositiveInt
    batch_size: PositiveInt
    lr: PositiveFloat
    seed: NonNegativeInt


class Teachers(_Section):
    models: dict[str, str] = Field(min_length=1)
    assemble: dict[str, TeacherParts]
    align: Align
    captioner: str
    captioner_train: CaptionerTrain | None

    @pydantic.model_validator(mode="after")
    def _assembled_are_models(self):
        for name in self.assemble:
            if not self.models.get(name, "").startswith("local-dir:"):
                raise ValueError(f"assemble.{name} needs a local-dir: entry of its name in teachers.models")
        return self


class Embed(_Section):
    teachers: list[str] = Field(min_length=1)
    batch_size: PositiveInt
    precision: Precision


class Balance(_Section):
    teacher: str
    metric: Metric
    threshold: PositiveFloat
    curve: list[PositiveFloat]


class Cluster(_Section):
    teacher: str
    clusters: PositiveInt
    iterations: PositiveInt
    seed: NonNegativeInt


class Reinforce(_Section):
    ensemble: list[str] = Field(min_length=1)
    n_aug: PositiveInt
    n_syn: NonNegativeInt
    image_px: PositiveInt
    scale_min: Annotated[float, Field(gt=0, le=1)]
    randaugment_ops: NonNegativeInt
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)]
    caption_top_p: Annotated[float, Field(gt=0, le=1)]
    batch_size: PositiveInt
    precision: Precision
    seed: NonNegativeInt


class ClusterLossParams(_Section):
    alpha: Fraction = 0.999
    reading: Literal["convex", "additive"] = "convex"
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    scale: PositiveFloat = 20.0


class InstanceLossParams(_Section):
    beta: Fraction = 0.5


class Weights(_Section):
    clip: NonNegativeFloat = 0.0
    cluster: NonNegativeFloat = 0.0
    instance: NonNegativeFloat = 0.0
    affinity: NonNegativeFloat = 0.0


class Recipe(_Section):
    title: str
    pairs: Literal["all", "kept", "reinforced"]
    weight: Weights
    lambda_: Fraction = Field(1.0, alias="lambda")
    synthetic: bool = False
    multi_positive: bool = False
    cluster: ClusterLossParams = ClusterLossParams()
    instance: InstanceLossParams = InstanceLossParams()

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        if not any(self.weight.model_dump().values()):
            raise ValueError("weight: at least one loss needs a weight above 0")
        if (self.weight.affinity or self.synthetic) and self.pairs != "reinforced":
            raise ValueError("weight.affinity and synthetic need pairs: reinforced")
        if self.pairs == "all" and (self.weight.cluster or self.weight.instance):
            raise ValueError("weight.cluster and weight.instance need pairs: kept or reinforced")
        return self


class Train(_Section):
    samples: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]
    accumulate: PositiveInt
    grad_checkpoint: bool
    loss_kernel: Literal["auto", "plain", "tiled", "triton"]
    lr: PositiveFloat
    lr_min: NonNegativeFloat
    lr_centres: PositiveFloat
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    betas: tuple[Fraction, Fraction]
    grad_clip: PositiveFloat | None
    ema: Annotated[float, Field(gt=0, lt=1)] | None
    precision: Precision
    logit_scale_init: PositiveFloat
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
            raise ValueError(f"batch_size {self.batch_size} is no multiple of processes {self.processes}")
        return self


class Distill(_Section):
    student: str
    seeds: list[NonNegativeInt] = Field(min_length=1)
    train: Train
    recipes: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], Recipe] = Field(min_length=1)


EvalMetric = Literal["top1", "mean_per_class", "mean_r1", "f1_macro", "worst_group_top1", "worst_group_top5"]


class EvalSet(_Section):
    """A set of `evaluate.sets`: what it does not say is the registry's (mclip/data/registry.py), found by its name."""

    path: str
    task: Literal["classification", "retrieval"] = "classification"
    metric: EvalMetric | None = None  # the one that stands for the set; None: see `main`
    captions: Literal["each", "distinct"] = "each"  # retrieval: what is an entry, see mclip.metrics.caption_pairs
    groups: NonNegativeInt | None = None  # the column of KEY.npy that worst_group metrics group by
    probe: bool = False
    kind: str = ""

    @pydantic.model_validator(mode="after")
    def _metric_fits(self):
        if (self.metric == "mean_r1") != (self.task == "retrieval") and self.metric:
            raise ValueError(f"metric: {self.metric} is none of {self.task}")
        if (self.metric or "").startswith("worst_group") and self.groups is None:
            raise ValueError(f"metric: {self.metric} needs groups, a column of KEY.npy")
        return self

    @classmethod
    def named(cls, name: str, values: Any) -> Any:
        """An entry of `evaluate.sets`, a map, a path or nothing, filled up."""
        return filled(name, values) if values is None or isinstance(values, dict | str) else values

    @property
    def main(self) -> str:
        """The metric that stands for the set: top1, for retrieval mean_r1, if it has none of its own."""
        return self.metric or {"classification": "top1", "retrieval": "mean_r1"}[self.task]


class Evaluate(_Section):
    batch_size: PositiveInt
    sets: dict[str, EvalSet] = Field(min_length=1)
    probe_c: list[PositiveFloat] = Field(min_length=1)
    probe_halvings: NonNegativeInt
    shots: list[PositiveInt]
    seed: NonNegativeInt

    @pydantic.field_validator("sets", mode="before")
    @classmethod
    def _from_registry(cls, sets: Any) -> Any:
        return {k: EvalSet.named(k, v) for k, v in sets.items()} if isinstance(sets, dict) else sets


class StudentsAblation(_Section):
    seeds: list[NonNegativeInt] = Field(min_length=1)
    models: list[str]


class LatencyAblation(_Section):
    models: list[str] = Field(min_length=1)
    runtimes: list[Literal["unfolded", "eager", "eager-bf16", "compile", "compile-bf16", "onnxruntime",
                           "onnxruntime-int8"]] = Field(min_length=1)
    batches: list[PositiveInt] = Field(min_length=1)
    rounds: PositiveInt


class KeptPairs(_Section):
    """Another choice of pairs than the balance stage's: by its threshold, or as many by another method."""

    threshold: PositiveFloat | None = None
    prune: Literal["semdedup", "density", "random"] | None = None

    @pydantic.model_validator(mode="after")
    def _one_of_both(self):
        if (self.threshold is None) == (self.prune is None):
            raise ValueError("either threshold or prune")
        return self


class Selection(_Section):
    """A part of the stored reinforced set; null: all of it."""

    n_aug: NonNegativeInt | None = None
    n_syn: PositiveInt | None = None
    ensemble: Annotated[list[str], Field(min_length=1)] | None = None
    captions: Literal["true", "synthetic"] = "true"


class Variant(_Section):
    title: str | None = None
    recipe: dict[str, Any] = {}
    keep: KeptPairs | None = None
    clusters: PositiveInt | None = None
    teacher: str | None = None
    reinforced: Selection | None = None


class Study(_Section):
    recipe: str
    samples: PositiveInt | None = None
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    variants: dict[str, Variant] = Field(min_length=1)


class Learning(_Section):
    recipes: list[str] = Field(min_length=1)
    baseline: str
    samples: list[PositiveInt] = Field(min_length=1)
    longer: list[PositiveInt]
    longer_seeds: list[NonNegativeInt]


class PcaPictures(_Section):
    baseline: str
    teacher: str
    image_px: Annotated[int, Field(ge=32)]
    shown: dict[str, str | None] = Field(min_length=1)
    columns: Annotated[int, Field(ge=2)]
    classes: PositiveInt
    captions: str
    mosaics: PositiveInt


class WeightsPictures(_Section):
    near_zero: PositiveFloat


class SearchPictures(_Section):
    baseline: str
    set: str
    queries: list[str]
    rows: PositiveInt
    top: PositiveInt


class Ablations(_Section):
    samples: PositiveInt
    seeds: list[NonNegativeInt] = Field(min_length=1)
    studies: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], Study]
    learning: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], Learning]
    # at most one entry: its stage writes one report; {}: no such stage
    students: dict[str, StudentsAblation] = Field(max_length=1)
    latency: dict[Literal["cpu", "cuda"], LatencyAblation] = Field(max_length=1)
    pca: dict[str, PcaPictures] = Field(max_length=1)
    weights: dict[str, WeightsPictures] = Field(max_length=1)
    search: dict[str, SearchPictures] = Field(max_length=1)


class Params(_Section):
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
        for key, names in {"embed.teachers": embedded, "reinforce.ensemble": self.reinforce.ensemble}.items():
            if unknown := sorted(set(names) - set(models)):
                raise ValueError(f"{key}: no such teacher {unknown[0]!r}; teachers.models has {models}")
        for key, name in {"balance": self.balance.teacher, "cluster": self.cluster.teacher}.items():
            if name not in embedded:
                raise ValueError(f"{key}.teacher: {name!r} is not embedded; embed.teachers has {embedded}")
        return self

    @pydantic.model_validator(mode="after")
    def _pictures_can_be_made(self):
        a, recipes, sets = self.ablations, sorted(self.distill.recipes), sorted(self.evaluate.sets)
        named = [(f"{key}.{entry}", entry, recipes) for key in ("students", "pca", "weights", "search")
                 for entry in getattr(a, key)]
        for entry, pca in a.pca.items():
            named += [(f"pca.{entry}.baseline", pca.baseline, recipes),
                      (f"pca.{entry}.teacher", pca.teacher, sorted(self.teachers.models)),
                      *((f"pca.{entry}.shown.{name}", name, sets) for name in pca.shown),
                      (f"pca.{entry}.captions", pca.captions, sets)]
        for entry, search in a.search.items():
            named += [(f"search.{entry}.baseline", search.baseline, recipes), (f"search.{entry}.set", search.set, sets)]
        for key, name, known in named:
            if name not in known:
                raise ValueError(f"ablations.{key}: no such entry {name!r}; there are {', '.join(known)}")
        for entry, students in a.students.items():
            if unknown := sorted(set(students.seeds) - set(self.distill.seeds)):
                raise ValueError(f"ablations.students.{entry}.seeds: {unknown[0]} is not among distill.seeds "
                                 f"({', '.join(map(str, self.distill.seeds))}), which train the student compared with")
        return self

    @pydantic.model_validator(mode="after")
    def _ablations_can_be_made(self):
        for name, study in self.ablations.studies.items():
            key = f"ablations.studies.{name}"
            self._recipe_exists(f"{key}.recipe", study.recipe)
            for which, variant in study.variants.items():
                self._variant_can_be_made(f"{key}.variants.{which}", self.distill.recipes[study.recipe], variant)
        for name, curve in self.ablations.learning.items():
            for recipe in [*curve.recipes, curve.baseline]:
                self._recipe_exists(f"ablations.learning.{name}", recipe)
        return self

    def _recipe_exists(self, key: str, recipe: str) -> None:
        if recipe not in self.distill.recipes:
            raise ValueError(f"{key}: no such recipe {recipe!r}; distill.recipes has "
                             f"{', '.join(sorted(self.distill.recipes))}")

    def _variant_can_be_made(self, key: str, recipe: Recipe, variant: Variant) -> None:
        try:
            recipe = varied(recipe, variant.recipe)
        except pydantic.ValidationError as err:
            raise ValueError("; ".join(_explain(e, f"{key}.recipe") for e in err.errors())) from None
        embedded, chosen = self.embed.teachers, variant.reinforced
        if variant.teacher is not None and variant.teacher not in embedded:
            raise ValueError(f"{key}.teacher: {variant.teacher!r} is not embedded; embed.teachers has {embedded}")
        if variant.keep and recipe.pairs != "kept":
            raise ValueError(f"{key}.keep needs a recipe with pairs: kept")
        if (variant.clusters or variant.teacher) and not (recipe.weight.cluster or recipe.weight.instance):
            raise ValueError(f"{key}: clusters and teacher need a recipe with weight.cluster or weight.instance")
        if chosen is None:
            return
        ensemble = chosen.ensemble or self.reinforce.ensemble
        if recipe.pairs != "reinforced":
            raise ValueError(f"{key}.reinforced needs a recipe with pairs: reinforced")
        for what in ("n_aug", "n_syn"):
            if (getattr(chosen, what) or 0) > (stored := getattr(self.reinforce, what)):
                raise ValueError(f"{key}.reinforced.{what}: {stored} are stored (reinforce.{what})")
        if unknown := sorted(set(ensemble) - set(self.reinforce.ensemble)):
            raise ValueError(f"{key}.reinforced.ensemble: {unknown[0]!r} is not in reinforce.ensemble")
        if chosen.n_aug == 0 and (unknown := sorted(set(ensemble) - set(embedded))):
            raise ValueError(f"{key}.reinforced: n_aug 0 needs {unknown[0]!r} in embed.teachers")
        if chosen.captions == "synthetic" and (recipe.synthetic or not self.reinforce.n_syn):
            raise ValueError(f"{key}.reinforced.captions: synthetic needs reinforce.n_syn and synthetic: false")


def varied(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A recipe with some keys laid over it, such as {"weight": {"cluster": 0.0}}."""
    return Recipe.model_validate(merge(recipe.model_dump(by_alias=True), changes))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as plain dicts and lists; ParamsError names file and line when it isn't YAML."""
    try:
        data = YAML(typ="safe").load(Path(path).read_text())
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file (run from the repository's root)") from None
    except YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ParamsError(f"{path}:{where} not valid YAML: {getattr(err, 'problem', err)}") from None
    if not isinstance(data, dict):
        raise ParamsError(f"{path}: expected sections such as data:, balance:, found {type(data).__name__}")
    return data


def check(data: dict[str, Any], source: str = "params.yaml") -> Params:
    """Validate a whole tree of parameters; ParamsError lists each bad key and what is allowed."""
    try:
        return Params.model_validate(data)
    except pydantic.ValidationError as err:
        lines = [_explain(e) for e in err.errors()]
        raise ParamsError("\n".join(f"{source}: {line}" for line in lines)) from None


def load(path: str | Path = "params.yaml") -> Params:
    """Read and validate params.yaml."""
    return check(read_yaml(path), str(path))


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """base with overlay's leaves laid over it, in place. Maps are merged, lists replaced;
    a map with the key `_replace: true` replaces the one below it whole."""
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict) and not value.get("_replace"):
            merge(base[key], value)
        elif isinstance(value, dict):
            base[key] = {k: v for k, v in value.items() if k != "_replace"}
        else:
            base[key] = value
    return base


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


class _Part:
    """Some keys of a section, as attributes; touching one that the stage did not pick raises ParamsError."""

    def __init__(self, kind: Any, path: str, values: dict[str, Any]):
        self.__dict__.update(values)
        self._kind, self._path = kind, path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what IPython and pickle ask any object for
            raise AttributeError(name)
        key = f"{self._path}.{name}".lstrip(".").removesuffix("_")
        if name not in self._kind.model_fields:
            raise ParamsError(f"{key}: {_unknown(name, _keys(self._kind))}")
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

    injected: what `mclip.run` put into the notebook: the part of params.yaml that the stage picks, nested
    as there; None, when the notebook is opened by hand: all of params.yaml (the kernel then goes to the
    repository's root, where every stage runs). A whole section is its validated model.
    """
    if injected is not None:
        return _typed(Params, injected, "")
    here = Path.cwd()
    if root := next((d for d in (here, *here.parents) if (d / "params.yaml").exists()), None):
        os.chdir(root)
    return load()


def _typed(kind: Any, value: Any, path: str) -> Any:
    """value at a dotted path of the tree: a model where the section is whole, a part where it is not."""
    if get_origin(kind) is dict and hasattr(get_args(kind)[1], "named") and isinstance(value, dict):
        value = {k: get_args(kind)[1].named(k, v) for k, v in value.items()}
    if not isinstance(value, dict):
        return value
    below = {k: (_child(kind, k), f"{path}.{k}".lstrip(".")) for k in value}
    if get_origin(kind) is dict:
        return _Entries(path, {k: _typed(below[k][0], v, below[k][1]) for k, v in value.items()})
    if not _is_section(kind):
        return value
    if all(k in value for k, f in _keys(kind).items() if f.is_required()):
        try:
            return kind.model_validate(value)
        except pydantic.ValidationError as err:
            raise ParamsError("\n".join(_explain(e, path) for e in err.errors())) from None
    if strange := next((k for k in value if k not in _keys(kind)), None):
        raise ParamsError(f"{below[strange][1]}: {_unknown(strange, _keys(kind))}")
    names = {f.alias or n: n for n, f in kind.model_fields.items()}
    return _Part(kind, path, {names[k]: _typed(below[k][0], v, below[k][1]) for k, v in value.items()})


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _keys(kind: Any) -> dict[str, Any]:
    """The keys of a section as they are spelled in params.yaml, with pydantic's field of each."""
    return {f.alias or n: f for n, f in kind.model_fields.items()} if _is_section(kind) else {}


def _child(kind: Any, key: str) -> Any:
    """The type of a key of a section or of a map of sections; None where there is no such key."""
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    field = _keys(kind).get(key)
    alternatives = [field.annotation, *get_args(field.annotation)] if field else []
    if field and get_origin(field.annotation) is dict:
        return field.annotation
    return next((a for a in alternatives if _is_section(a)), field.annotation if field else None)


def _unknown(key: str, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key{hint} (allowed: {', '.join(sorted(allowed))})"


def _explain(error: Any, path: str = "") -> str:
    loc = [*path.split("."), *map(str, error["loc"])] if path else [str(part) for part in error["loc"]]
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        kind: Any = Params
        for part in loc[:-1]:
            kind = _child(kind, part)
        return f"{key}: {_unknown(loc[-1], _keys(kind))}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (found {error['input']!r})"


def apply_overlay(overlay: str | Path, path: str | Path = "params.yaml") -> None:
    """Rewrite params.yaml with an overlay laid over it; comments stay; checked before it is written."""
    yaml = YAML()
    yaml.width = 120
    tree = yaml.load(Path(path).read_text())
    merge(tree, read_yaml(overlay))
    buffer = io.StringIO()
    yaml.dump(tree, buffer)
    check(YAML(typ="safe").load(buffer.getvalue()), f"{path} + {overlay}")
    write_whole(path, buffer.getvalue())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mclip.params", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="validate params.yaml")
    commands.add_parser("apply", help="lay an overlay over params.yaml").add_argument("overlay")
    args = parser.parse_args(argv)
    try:
        if args.command == "apply":
            apply_overlay(args.overlay)
        else:
            load()
    except ParamsError as err:
        print(err, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
