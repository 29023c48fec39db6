"""params.yaml's schema: what it refuses and how it says so, overlays, and what a stage gets to see."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mclip import params, studies
from mclip.params import ParamsError, ablations
from mclip.report.build import asked

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The default with its other studies: every kind of section."""
    path = tmp_path_factory.mktemp("full") / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    params.apply_overlay(ROOT / "params/full.yaml", path)
    return params.read_yaml(path)


def changed(tree, key, value):
    tree = copy.deepcopy(tree)
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        node = node[part]
    node[last] = value
    return tree


def test_the_default_is_valid(tree):
    assert params.check(tree).distill.recipes["clip"].weight["clip"] == 1.0


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "balance.treshold",
            0.07,
            "balance.treshold: unknown key; did you mean 'threshold'? (allowed: backend, curve, ",
        ),
        ("balance.threshold", -1, "balance.threshold: Input should be greater than 0 (found -1)"),
        ("balance.threshold", float("inf"), "balance.threshold: Input should be a finite number"),
        ("balance.threshold", "false", "balance.threshold: Input should be a valid number"),
        (
            "balance.metric",
            "euclid",
            "balance.metric: Input should be 'l2', 'sql2' or 'cosine' (found 'euclid')",
        ),
        (
            "distill.recipes.clip.foo",
            1,
            "distill.recipes.clip.foo: unknown key (allowed: affinity, cluster, instance, lambda, ",
        ),
        (
            "evaluate.sets.cifar10.tsk",
            1,
            "evaluate.sets.cifar10.tsk: unknown key; did you mean 'task'?",
        ),
        (
            "teachers.captioner_train.widht",
            64,
            "teachers.captioner_train.widht: unknown key; did you mean 'width'?",
        ),
        ("blance", 1, "blance: unknown key; did you mean 'balance'?"),
        (
            "embed.teachers",
            ["huge"],
            "embed.teachers: no such teacher 'huge' (allowed: base, large, small)",
        ),
        (
            "balance.teacher",
            "huge",
            "balance.teacher: no such embedded teacher 'huge' (allowed: base, large, small)",
        ),
        (
            "ablations.studies.terms.recipe",
            "cid",
            "ablations.studies.terms.recipe: no such recipe 'cid' (allowed: clip, clip-cid, ",
        ),
        (
            "ablations.studies.terms.variants.full",
            {"clusers": 3},
            "ablations.studies.terms.variants.full.clusers: unknown key; did you mean 'clusters'?",
        ),
        (
            "ablations.studies.terms.variants.full",
            {"recipe": {"wieght": {}}},
            "ablations.studies.terms.variants.full.recipe.wieght: unknown key",
        ),
        (
            "ablations.studies.teacher.variants.small",
            {"teacher": "huge"},
            "variants.small.teacher: no such embedded teacher 'huge'",
        ),
        (
            "ablations.studies.threshold.variants.lower",
            {"keep": {}},
            "variants.lower.keep: either threshold or prune",
        ),
        (
            "ablations.studies.reinforcement.variants.one",
            {"keep": {"prune": "random"}},
            "variants.one.keep: needs a recipe with pairs: kept",
        ),
        (
            "ablations.studies.clusters.variants.few",
            {"fraction": 0.5, "clusters": 3},
            "fraction is of the default's pairs: not with clusters",
        ),
        (
            "ablations.studies.reinforcement.variants.one",
            {"clusters": 3},
            "variants.one.clusters: needs a recipe with weight.cluster or ",
        ),
        (
            "ablations.studies.terms.variants.full",
            {"reinforced": {"n_aug": 1}},
            "variants.full.reinforced: needs a recipe with reinforced: true",
        ),
        (
            "ablations.studies.reinforcement.variants.one",
            {"reinforced": {"n_aug": 9}},
            "n_aug: 5 are stored (reinforce.n_aug)",
        ),
        (
            "ablations.studies.reinforcement.variants.one",
            {"reinforced": {"ensemble": ["large"]}},
            "variants.one.reinforced.ensemble: no such stored teacher 'large'",
        ),
        (
            "ablations.studies.reinforcement.variants.one",
            {"reinforced": {"captions": "synthetic"}},
            "variants.one.reinforced.captions: synthetic needs a recipe with synthetic: false",
        ),
        (
            "ablations.learning.efficiency.baseline",
            "clpi",
            "ablations.learning.efficiency.baseline: no such recipe 'clpi'; did you mean 'clip'?",
        ),
        (
            "embed.teachers",
            ["large", "small"],
            "variants.base.teacher: no such embedded teacher 'base'",
        ),
        ("data.source", "webdataset", "data: source webdataset needs at least one path"),
        (
            "ablations.students.recipe",
            "cilp",
            "ablations.students.recipe: no such recipe 'cilp'; did you mean 'clip'? (allowed: clip, ",
        ),
        (
            "ablations.students.models",
            [],
            "ablations.students.models: List should have at least 1 item",
        ),
        (
            "ablations.pca.baseline",
            "cid",
            "ablations.pca.baseline: no such recipe 'cid' (allowed: clip, clip-cid, ",
        ),
        (
            "ablations.search.set",
            "emoji",
            "ablations.search.set: no such evaluation set 'emoji' (allowed: cifar10, emoji-subgroup, ",
        ),
        (
            "ablations.pca.shown",
            {"cifar": None},
            "ablations.pca.shown: no such evaluation set 'cifar'; did you mean 'cifar10'?",
        ),
        (
            "ablations.pca.teacher",
            "huge",
            "ablations.pca.teacher: no such teacher 'huge' (allowed: base, large, small)",
        ),
        (
            "ablations.weights.baseline",
            "clpi",
            "ablations.weights.baseline: no such recipe 'clpi'; did you mean 'clip'?",
        ),
        (
            "ablations.epoch.recipe",
            "clpi",
            "ablations.epoch.recipe: no such recipe 'clpi'; did you mean 'clip'?",
        ),
        (
            "ablations.latency.runtimes",
            ["egar"],
            "ablations.latency.runtimes.0: Input should be 'unfolded', 'eager', ",
        ),
        (
            "ablations.amuont",
            {},
            "ablations.amuont: unknown key; did you mean 'amount'? (allowed: amount, epoch, latency, ",
        ),
        (
            "ablations.amount.stored",
            {"n_agu": 3},
            "ablations.amount.stored.n_agu: unknown key; did you",
        ),
        (
            "ablations.amount.stored.n_aug",
            0,
            "ablations.amount.stored.n_aug: Input should be greater ",
        ),
        (
            "ablations.amount.stored.ensemble",
            ["huge"],
            "ablations.amount.stored.ensemble: no such teacher 'huge'",
        ),
        (
            "ablations.amount.n_aug",
            [1, 40],
            "ablations.amount.n_aug: 40 is not below the ",
        ),
        (
            "distill.recipes.mobileclip.synthetic",
            False,
            "ablations.amount.recipe: needs one with synthetic: true",
        ),
        (
            "distill.train.processes",
            3,
            "distill.train: batch_size 256 is no multiple of processes 3",
        ),
        (
            "distill.train.loss_kernel",
            "fast",
            "Input should be 'auto', 'plain', 'tiled' or 'triton' (found 'fast')",
        ),
        (
            "distill.recipes.clip.weight",
            {"affinity": 1},
            "distill.recipes.clip: reinforced: true is needed for weight.affinity",
        ),
        (
            "distill.recipes.mobileclip.pairs",
            "reinforced",
            "distill.recipes.mobileclip.pairs: write pairs: all or kept, and reinforced: true",
        ),
        (
            "reinforce.pairs",
            "kept",
            "recipes.mobileclip.pairs: all with reinforced: true needs reinforce.pairs: all",
        ),
        (
            "distill.recipes.mobileclip.affinity",
            {"scale": {"huge": 70}},
            "recipes.mobileclip.affinity.scale: no such stored teacher 'huge'",
        ),
        (
            "distill.recipes.clip.weight",
            {"clip": 1, "cluster": 1, "instance": 1},
            "pairs: kept is needed for weight.cluster",
        ),
        (
            "distill.recipes.clip.weight",
            {"clpi": 1},
            "distill.recipes.clip.weight.clpi: unknown key; did you mean 'clip'? (allowed: affinity, ",
        ),
        (
            "distill.recipes.clip.weight",
            {"clip": -1},
            "distill.recipes.clip.weight.clip: Input should be greater than or equal to 0 (found -1)",
        ),
        (
            "distill.recipes.combined.cluster",
            {"alhpa": 1},
            "distill.recipes.combined.cluster.alhpa: unknown key; did you mean 'alpha'?",
        ),
        (
            "distill.recipes.combined.cluster",
            {"reading": "both"},
            "combined.cluster.reading: Input should be 'convex' or 'additive' (found 'both')",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tree, key, value, said):
    with pytest.raises(ParamsError) as caught:
        params.check(changed(tree, key, value))
    assert str(caught.value).startswith("params.yaml: ")
    assert said in str(caught.value)


def test_every_wrong_value_is_listed(tree):
    with pytest.raises(ParamsError) as caught:
        params.check(changed(changed(tree, "balance.threshold", 0), "cluster.clusters", 0))
    assert len(str(caught.value).splitlines()) == 2


def test_every_contradiction_is_listed(tree):
    for key, value in [
        ("balance.teacher", "huge"),
        ("ablations.studies.terms.recipe", "cid"),
        ("ablations.learning.efficiency.recipes", ["clip", "x", "y"]),
        ("ablations.pca.baseline", "cid"),
        ("ablations.search.set", "emoji"),
    ]:
        tree = changed(tree, key, value)
    with pytest.raises(ParamsError) as caught:
        params.check(tree)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6 and len(set(lines)) == 6


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: 1\nb: ]\n")
    with pytest.raises(ParamsError, match=r"bad\.yaml: line 2 not valid YAML"):
        params.read_yaml(tmp_path / "bad.yaml")
    with pytest.raises(ParamsError, match="no such file"):
        params.read_yaml(tmp_path / "none.yaml")


def test_merge_goes_into_maps_and_replaces_lists_and_marked_maps():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": {"old": 1}, "c": {"d": 1}}
    params.merge(
        base, {"a": {"y": [3]}, "b": {"_replace": True, "new": {"z": 2}}, "c": {"_replace": True}}
    )
    assert base == {"a": {"x": 1, "y": [3]}, "b": {"new": {"z": 2}}, "c": {}}


@pytest.mark.slow
def test_apply_keeps_comments_and_checks_before_it_writes(tmp_path):
    path, overlay = tmp_path / "params.yaml", tmp_path / "o.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    overlay.write_text("balance: {threshold: 0.1}\n")
    params.apply_overlay(overlay, path)
    assert params.load(path).balance.threshold == 0.1
    assert path.read_text().count("#") == (ROOT / "params.yaml").read_text().count("#")
    before = path.read_text()
    overlay.write_text("balance: {threshold: no}\n")
    with pytest.raises(ParamsError, match=r"balance\.threshold"):
        params.apply_overlay(overlay, path)
    assert path.read_text() == before


def test_pick_keeps_the_nesting():
    tree = {"a": {"b": {"c": 1, "d": 2}, "e": 3}}
    assert params.pick(tree, ["a.b.c", "a.e"]) == {"a": {"b": {"c": 1}, "e": 3}}
    with pytest.raises(ParamsError, match=r"params\.yaml has no 'a\.x'"):
        params.pick(tree, ["a.x"])


@pytest.fixture
def picked(tree, monkeypatch):
    """What `mclip.pipeline.run` puts into a notebook: a part of the validated values."""
    monkeypatch.chdir(ROOT)
    values = params.check(tree).model_dump(by_alias=True, mode="json")
    return lambda *keys: params.pick(values, [*keys])


def test_a_stage_sees_what_it_picked_and_nothing_else(picked):
    p = params.stage(
        picked(
            "balance",
            "distill.train",
            "distill.recipes.combined",
            "teachers.models",
            "ablations.studies.terms",
            "ablations.amount",
        )
    )
    assert p.balance == params.load().balance
    assert p.distill.train.betas == (0.9, 0.98)
    assert p.distill.recipes["combined"].lambda_ == 0.7
    assert p.teachers.models["base"] == "local-dir:models/teachers/base"
    assert p.ablations.studies["terms"].variants["full"].title == "+ instance"
    assert p.ablations.amount.recipe == "mobileclip"
    for touch, key in [
        (lambda: p.cluster, "cluster"),
        (lambda: p.distill.student, "distill.student"),
        (lambda: p.distill.recipes["clip"], "distill.recipes.clip"),
        (lambda: p.ablations.studies["teacher"], "ablations.studies.teacher"),
        (lambda: p.ablations.pca, "ablations.pca"),
    ]:
        with pytest.raises(
            ParamsError, match=f"^{key} is not among this stage's params in dvc.yaml$"
        ):
            touch()
    with pytest.raises(ParamsError, match=r"^distill\.tran: unknown key; did you mean 'train'"):
        p.distill.tran  # noqa: B018
    assert not hasattr(p, "_repr_html_")
    assert f"threshold={p.balance.threshold}" in repr(p)
    assert pickle.loads(pickle.dumps(p.distill)) == p.distill


def test_a_stage_is_checked_too(picked):
    with pytest.raises(ParamsError, match=r"balance\.threshold: Input should be greater than 0"):
        params.stage(changed(picked("balance"), "balance.threshold", 0))
    with pytest.raises(ParamsError, match=r"balanec: unknown key; did you mean 'balance'"):
        params.stage({"balanec": {}})


def test_opened_by_hand_a_notebook_runs_in_the_root_with_all_parameters(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    p = params.stage(None)
    assert Path.cwd() == ROOT
    assert isinstance(p, params.Params)
    os.chdir(ROOT)


# --- studies that are a file of their own -----------------------------------------------------------------------

STUDY = """
from mclip.params import Section, absent


class Settings(Section):
    recipe: str
    steps: int = 3

    def check(self, p):
        yield from absent("recipe", [self.recipe], p.distill.recipes, "recipe")
"""


def test_a_study_is_one_file(tree, tmp_path, monkeypatch):
    """Its schema, what it needs elsewhere and its notebook's name are found by the file's name."""
    with pytest.raises(ParamsError, match=r"ablations\.colour: unknown key "):
        params.check(changed(tree, "ablations.colour", {"recipe": "clip"}))
    (tmp_path / "colour.py").write_text(STUDY)
    (tmp_path / "helper.py").write_text("raise AssertionError('it has no Settings')\n")
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(tmp_path)])
    p = params.check(changed(tree, "ablations.colour", {"recipe": "clip"}))
    assert p.ablations.colour.steps == 3 and p.ablations.amount.recipe == "mobileclip"
    assert "colour" in asked(p.ablations)
    assert params.check(changed(tree, "ablations.colour", None)).ablations.colour is None
    for key, value, said in [
        ("colour", {"recipe": "clpi"}, "colour.recipe: no such recipe 'clpi'; did you mean 'clip'"),
        ("colour", {"recipe": "clip", "step": 1}, "colour.step: unknown key; did you mean 'steps'"),
        ("colour", {}, "colour.recipe: missing"),
        ("coluor", {}, "coluor: unknown key; did you mean 'colour'"),
        ("helper", {}, "helper: unknown key"),
    ]:
        with pytest.raises(ParamsError) as caught:
            params.check(changed(tree, f"ablations.{key}", value))
        assert str(caught.value).startswith(f"params.yaml: ablations.{said}")


def test_a_study_has_a_notebook_and_a_key_of_its_name(tree):
    names = ablations.studies().keys()
    assert {"students", "latency", "amount", "epoch", "pca", "weights", "search"} <= names
    for name in names:
        assert (ROOT / f"notebooks/ablations/{name}.ipynb").is_file() and name in tree["ablations"]


@pytest.mark.slow
def test_parameters_are_checked_without_heavy_libraries():
    heavy = ["torch", "open_clip", "pandas", "sklearn", "matplotlib"]
    script = (
        "import sys; from mclip import params; params.load(); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# MobileCLIP's ablation, row by row, as variants of the recipe mobileclip
CLIP_LOSS = {"weight": {"clip": 1.0, "affinity": 0.0}}
FACTORS = {
    "clip": {"recipe": CLIP_LOSS | {"synthetic": False}, "reinforced": {"n_aug": 0}},
    "captions": {"recipe": CLIP_LOSS, "reinforced": {"n_aug": 0}},
    "distillation": {"reinforced": {"n_aug": 0, "ensemble": ["base"]}},
    "augmentation": {"reinforced": {"ensemble": ["base"]}},
    "ensemble": {},
    "lambda": {"recipe": {"weight": {"clip": 1.0}, "lambda": 0.7}},
    "balanced": {
        "recipe": CLIP_LOSS | {"pairs": "kept", "reinforced": False, "synthetic": False},
    },
}


def test_each_factor_of_mobileclip_is_a_variant(tree):
    study = {"recipe": "mobileclip", "variants": FACTORS}
    checked = params.check(changed(tree, "ablations.studies.reinforcement", study))
    assert set(checked.ablations.studies["reinforcement"].variants) == set(FACTORS)


def test_distill_from_is_the_student_with_its_own_scale():
    tree = params.read_yaml(ROOT / "params.yaml")
    tree["distill"]["from"] = "local-dir:mine"
    found = params.check(tree)
    assert found.distill.student == "local-dir:mine"
    assert found.distill.train.logit_scale_init is None
    picked = params.pick(found.model_dump(by_alias=True, mode="json"), ["distill.student"])
    assert picked == {"distill": {"student": "local-dir:mine"}}
    tree["distill"]["from"] = "demo-vit"
    with pytest.raises(params.ParamsError, match=r"distill.from: demo-vit has no weights"):
        params.check(tree)
