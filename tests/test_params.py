"""params.yaml's schema: what it refuses and how it says so, overlays, and what a stage gets to see."""

import copy
import os
from pathlib import Path

import pytest

from mclip import params
from mclip.params import ParamsError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tree():
    return params.read_yaml(ROOT / "params.yaml")


def changed(tree, key, value):
    tree = copy.deepcopy(tree)
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        node = node[part]
    node[last] = value
    return tree


def test_the_default_is_valid(tree):
    assert params.check(tree).distill.recipes["clip"].weight.clip == 1.0


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
            "distill.recipes.clip.foo: unknown key (allowed: cluster, instance, lambda, ",
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
            "embed.teachers: no such teacher 'huge'; teachers.models has ['base', ",
        ),
        (
            "balance.teacher",
            "huge",
            "balance.teacher: 'huge' is not embedded; embed.teachers has ['large', 'base', 'small']",
        ),
        (
            "ablations.studies.terms.recipe",
            "cid",
            "ablations.studies.terms.recipe: no such recipe 'cid'; distill.recipes has ",
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
            "variants.small.teacher: 'huge' is not embedded; ",
        ),
        (
            "ablations.studies.threshold.variants.lower",
            {"keep": {}},
            "variants.lower.keep: either threshold or prune",
        ),
        (
            "ablations.studies.reinforcement.variants.one",
            {"keep": {"prune": "random"}},
            "keep needs a recipe with pairs: kept",
        ),
        (
            "ablations.studies.clusters.variants.few",
            {"fraction": 0.5, "clusters": 3},
            "fraction is of the default's pairs: not with clusters",
        ),
        (
            "ablations.studies.reinforcement.variants.one",
            {"clusters": 3},
            "clusters and teacher need a recipe with ",
        ),
        (
            "ablations.studies.terms.variants.full",
            {"reinforced": {"n_aug": 1}},
            "reinforced needs a recipe with pairs: reinf",
        ),
        (
            "ablations.studies.reinforcement.variants.one",
            {"reinforced": {"n_aug": 9}},
            "n_aug: 2 are stored (reinforce.n_aug)",
        ),
        (
            "ablations.studies.reinforcement.variants.one",
            {"reinforced": {"ensemble": ["small"]}},
            "'small' is not in reinforce",
        ),
        (
            "ablations.studies.reinforcement.variants.one",
            {"reinforced": {"captions": "synthetic"}},
            "and synthetic: false",
        ),
        (
            "ablations.learning.efficiency.baseline",
            "clpi",
            "ablations.learning.efficiency: no such recipe 'clpi'",
        ),
        ("embed.teachers", ["large", "small"], "variants.base.teacher: 'base' is not embedded"),
        ("data.source", "webdataset", "data: source webdataset needs at least one path"),
        (
            "ablations.students",
            {"cilp": {"models": ["demo-vit"]}},
            "ablations.students.cilp: no such entry 'cilp'; there are clip, clip-cid, ",
        ),
        (
            "ablations.students.clip-cid.models",
            [],
            "ablations.students.clip-cid.models: List should have at least 1 item",
        ),
        (
            "ablations.pca.clip-cid.baseline",
            "cid",
            "ablations.pca.clip-cid.baseline: no such entry 'cid'; there are clip, clip-cid, ",
        ),
        (
            "ablations.search.clip-cid.set",
            "emoji",
            "ablations.search.clip-cid.set: no such entry 'emoji'; there are cifar10, emoji-subgroup, ",
        ),
        (
            "ablations.pca.clip-cid.shown",
            {"cifar": None},
            "ablations.pca.clip-cid.shown.cifar: no such entry 'cifar'; there are cifar10, ",
        ),
        (
            "ablations.amount.mobileclip.stored",
            {"n_agu": 3},
            "ablations.amount.mobileclip.stored.n_agu: unknown key; did you",
        ),
        (
            "ablations.amount.mobileclip.stored.n_aug",
            0,
            "ablations.amount.mobileclip.stored.n_aug: Input should be greater ",
        ),
        (
            "ablations.amount.mobileclip.stored.ensemble",
            ["huge"],
            "mobileclip.stored.ensemble: no such teacher 'huge'",
        ),
        (
            "ablations.amount.mobileclip.n_aug",
            [1, 40],
            "ablations.amount.mobileclip.n_aug: 40 is not below the ",
        ),
        (
            "distill.recipes.mobileclip.synthetic",
            False,
            "ablations.amount.mobileclip: the recipe needs synthetic: true",
        ),
        (
            "distill.train.processes",
            3,
            "distill.train: batch_size 64 is no multiple of processes 3",
        ),
        (
            "distill.train.loss_kernel",
            "fast",
            "Input should be 'auto', 'plain', 'tiled' or 'triton' (found 'fast')",
        ),
        (
            "distill.recipes.clip.weight",
            {"affinity": 1},
            "weight.affinity and synthetic need pairs: reinforced",
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


def test_a_stage_sees_what_it_picked_and_nothing_else(tree):
    p = params.stage(
        params.pick(
            tree, ["balance", "distill.train", "distill.recipes.combined", "teachers.models"]
        )
    )
    assert isinstance(p.balance, params.Balance)
    assert p.distill.train.betas == (0.9, 0.98)
    assert p.distill.recipes["combined"].lambda_ == 0.7
    assert p.teachers.models["base"] == "local-dir:models/teachers/base"
    for touch, key in [
        (lambda: p.cluster, "cluster"),
        (lambda: p.distill.student, "distill.student"),
        (lambda: p.distill.recipes["clip"], "distill.recipes.clip"),
    ]:
        with pytest.raises(
            ParamsError, match=f"^{key} is not among this stage's params in dvc.yaml$"
        ):
            touch()
    with pytest.raises(ParamsError, match="did you mean 'train'"):
        p.distill.tran  # noqa: B018
    assert not hasattr(p, "_repr_html_")
    assert f"threshold={p.balance.threshold}" in repr(p)


def test_a_stage_is_checked_too(tree):
    with pytest.raises(ParamsError, match=r"balance\.threshold: Input should be greater than 0"):
        params.stage(changed(params.pick(tree, ["balance"]), "balance.threshold", 0))
    with pytest.raises(ParamsError, match=r"balanec: unknown key; did you mean 'balance'"):
        params.stage({"balanec": {}})


def test_opened_by_hand_a_notebook_runs_in_the_root_with_all_parameters(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    p = params.stage(None)
    assert Path.cwd() == ROOT
    assert isinstance(p, params.Params)
    os.chdir(ROOT)
