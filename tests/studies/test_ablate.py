"""mclip.studies.ablate, mclip.studies.derive: a run is known by what its bytes depend on, and
shared; derived data are what they say.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mclip import balance, cluster, embed
from mclip.data.shards import in_part
from mclip.data.stores import reinforced
from mclip.distill import plan as distill
from mclip.distill import targets
from mclip.distill.pairs import TrainingSet, open_pairs
from mclip.params import Balance, Cluster, EvalSet, Learning, Study, Variant, varied
from mclip.studies import ablate, derive
from mclip.system import source
from tests.world import PX, RECIPES, TRAIN, WIDTHS

FOLDERS = ("pairs", "balance", "clusters", "embeddings", "reinforced")


@pytest.fixture
def shared(world, student, tmp_path):
    """The tiny world's, with a cache of its own."""
    return ablate.Shared(
        student,
        TRAIN.model_copy(update={"samples": 24}),
        Balance(teacher="large", metric="sql2", threshold=1e-3, curve=[]),
        Cluster(teacher="large", clusters=4, iterations=5, seed=0),
        {name: str(world / name) for name in (*FOLDERS, "cache")},
        tmp_path / "cache",
    )


def study(recipe="clip-cid", **variants) -> Study:
    return Study(recipe=recipe, variants=variants)


def plan(shared, recipe="clip-cid", seeds=(0,), samples=24, **variants):
    return ablate.plan(
        study(recipe, **variants), RECIPES[recipe], shared, samples=samples, seeds=seeds
    )


# --- which runs are the same ------------------------------------------------------------------------------------


def test_equal_runs_are_one_whatever_they_are_called(shared, monkeypatch):
    made = derived(shared, clusters=4)[
        "clusters"
    ]  # the world's are of all pairs, the stage's of those kept
    shared = replace(shared, data=shared.data | {"clusters": made})
    first = plan(shared, a={}, b={"title": "the same", "clusters": 4})
    second = plan(shared, c={"recipe": {"title": "other words"}})
    assert first["a"][0].out == second["c"][0].out
    assert first["b"][0].out == first["a"][0].out  # the same centres, made again
    assert first["a"][0].name != second["c"][0].name
    parallel = replace(shared, train=shared.train.model_copy(update={"parallel_runs": 7}))
    assert plan(parallel, a={})["a"][0].out == first["a"][0].out


def test_what_a_silent_term_would_read_is_no_part_of_a_run(shared):
    silent = {"weight": {"cluster": 0.0, "instance": 0.0}}
    clip = Study(
        recipe="clip",
        variants={
            "a": {"recipe": {"pairs": "kept", "multi_positive": RECIPES["clip-cid"].multi_positive}}
        },
    )
    (own,) = ablate.plan(clip, RECIPES["clip"], shared, samples=24, seeds=[0])["a"]
    (other,) = plan(shared, a={"recipe": silent})["a"]
    assert own.recipe != other.recipe and own.out == other.out


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"weight": {"instance": 0.0}}},
        {"clusters": 3},
        {"keep": {"prune": "random"}},
        {"keep": {"threshold": 0.7}, "clusters": 2},
        {"recipe": {"cluster": {"scale": 3.0}}},
    ],
)
def test_another_recipe_or_other_data_is_another_run(shared, change):
    runs = plan(shared, a={}, b=change)
    assert runs["a"][0].out != runs["b"][0].out


def test_seed_settings_data_and_code_are_part_of_a_run(shared, world, tmp_path, monkeypatch):
    base = plan(shared, a={}, seeds=[0, 1], samples=24)["a"]
    assert base[0].out != base[1].out
    assert plan(shared, a={}, samples=32)["a"][0].out != base[0].out
    faster = replace(shared, train=shared.train.model_copy(update={"lr": 0.1}))
    assert plan(faster, a={})["a"][0].out != base[0].out
    (tmp_path / "embeddings").mkdir()
    for name in ("img_emb", "text_emb", "metadata"):  # other data in the same form
        (tmp_path / "embeddings" / "large" / name).mkdir(parents=True)
        for file in (world / "embeddings" / "large" / name).iterdir():
            content = file.read_bytes()
            (tmp_path / "embeddings" / "large" / name / file.name).write_bytes(content)
    moved = replace(shared, data=shared.data | {"embeddings": str(tmp_path / "embeddings")})
    assert plan(moved, a={})["a"][0].out == base[0].out  # where they lie does not matter
    file = tmp_path / "embeddings" / "large" / "text_emb" / "text_emb_0000.npy"
    np.save(file, np.load(file)[::-1])
    assert plan(moved, a={})["a"][0].out != base[0].out
    clip = plan(shared, "clip", a={})["a"][0].out
    assert plan(moved, "clip", a={})["a"][0].out == clip  # which reads no embeddings
    before = source.code_digest
    monkeypatch.setattr(
        "mclip.distill.identity.code_digest",
        lambda module: before(module) + "edited" * (module == "mclip.distill.trainer"),
    )
    assert plan(shared, a={})["a"][0].out != base[0].out


def test_missing_data_name_their_stage(shared, tmp_path):
    gone = replace(shared, data=shared.data | {"clusters": str(tmp_path / "clusters")})
    with pytest.raises(
        FileNotFoundError, match=r"clusters is missing: run `dvc repro cluster` first"
    ):
        plan(gone, a={})


# --- training and scores ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_trains_and_scores_what_no_other_has(shared, tmp_path, monkeypatch, capsys):
    started = []

    def train_all(runs):
        started.extend(run.out for run in runs)
        from mclip.distill import trainer

        for run in runs:
            trainer.train(run)

    monkeypatch.setattr(distill, "train_all", train_all)
    runs = plan(
        shared,
        a={},
        b={"recipe": {"weight": {"instance": 0.0}}},
        same={"title": "a again"},
        seeds=[0, 1],
    )
    assert ablate.train(runs, cache=shared.cache) == {"trained": 4, "reused": 0}
    assert ablate.train(runs, cache=shared.cache) == {"trained": 0, "reused": 4}
    more = plan(shared, a={}, c={"clusters": 3})
    assert ablate.train(more, cache=shared.cache) == {"trained": 1, "reused": 1}
    assert len(started) == 5 and started[-1] == more["c"][0].out
    assert ablate.pairs(more) == {"a": 23, "c": 23}

    seen = []

    def evaluate_many(students, preprocess, tokenizer, sets, **options):
        assert not any(spec.probe for spec in sets.values())
        seen.append(len(students))
        values = [{"there": {"top1": 0.1 * (i + 1)}, "gone": {}} for i in range(len(students))]
        items = [{"there": {"a": 1.0, "b": 0.0}} for _ in students]
        return ablate.evaluate.Result(
            values, {"there": {"top1": 0.05}}, ["gone: missing"], {}, {}, {}, {}, {}, [], items, {}
        )

    monkeypatch.setattr(ablate.evaluate, "evaluate_many", evaluate_many)
    (tmp_path / "set/test").mkdir(parents=True)
    sets = {
        "there": EvalSet(path=str(tmp_path / "set"), probe=True, kind="unseen"),
        "gone": EvalSet(path=str(tmp_path / "gone")),
    }
    options = {"batch_size": 2, "folder": tmp_path / "metrics", "cache": shared.cache}
    frame = ablate.score("s", runs, sets, **options)
    assert capsys.readouterr().out == "gone: missing\n"
    assert seen == [4]  # `same` is `a`
    table = frame.set_index(["recipe", "seed"])["value"]
    assert table.to_dict() == pytest.approx(
        {
            ("a", 0): 0.1,
            ("a", 1): 0.2,
            ("b", 0): 0.3,
            ("b", 1): 0.4,
            ("same", 0): 0.1,
            ("same", 1): 0.2,
        }
    )
    assert json.loads((tmp_path / "metrics/s.json").read_text())["b"]["mean"][
        "mean"
    ] == pytest.approx(0.35)
    assert len((tmp_path / "metrics/s.csv").read_text().splitlines()) == 7

    written = (tmp_path / "metrics/s.csv").read_bytes()
    ablate.score("s", runs, sets, **options)  # another study of the same runs
    assert seen == [4] and (tmp_path / "metrics/s.csv").read_bytes() == written
    assert capsys.readouterr().out == "gone: missing\n"
    assert ablate.score("t", more, sets, **options).set_index("recipe")["value"].to_dict() == {
        "a": 0.1,
        "c": 0.1,
    }
    assert seen == [4, 1]  # c alone
    (tmp_path / "set/test/0.tar").write_bytes(b"other pictures")
    ablate.score("s", runs, sets, **options)
    (tmp_path / "set/classnames.txt").write_text("other classes")
    ablate.score("s", runs, sets, **options)
    ablate.score("s", runs, {"there": sets["there"]}, **options)
    ablate.score("s", runs, sets, **options | {"batch_size": 3})
    assert seen == [4, 1, 4, 4, 4, 4]
    (tmp_path / "copy").symlink_to(runs["a"][0].out)  # the same weights elsewhere
    copied = {"copy": [replace(runs["a"][0], out=str(tmp_path / "copy"))]}
    assert ablate.score("u", copied, sets, **options)["value"].tolist() == [0.1] and len(seen) == 6


def test_a_learning_curve_has_each_length_and_the_finished_students(shared, tmp_path):
    curve = Learning(
        recipes=["clip", "clip-cid"],
        samples=[8, 16],
        baseline="clip",
        longer=[48],
        longer_seeds=[0],
    )
    runs = ablate.plan_learning(curve, RECIPES, shared, seeds=[0, 1], finished_seeds=[0, 1, 2])
    assert {name: len(own) for name, own in runs.items()} == {
        "clip 8": 2,
        "clip 16": 2,
        "clip 24": 3,
        "clip 48": 1,
        "clip-cid 8": 2,
        "clip-cid 16": 2,
        "clip-cid 24": 3,
    }
    (own,) = distill.runs_of(  # the stage's own: trained once
        "clip",
        RECIPES["clip"],
        shared.student,
        shared.train,
        [1],
        teacher="large",
        data=derive.FOLDERS | shared.data,
        cache=shared.cache,
    )
    assert runs["clip 24"][1].out == own.out
    assert {run.train.samples for run in runs["clip 48"]} == {48}
    assert (
        runs["clip-cid 16"][0].out == plan(shared, samples=16, x={})["x"][0].out
    )  # shared with the studies
    main = ablate.pd.DataFrame({"recipe": ["clip-cid 16"], "value": [0.1]})
    assert ablate.by_samples(main)[["recipe", "samples"]].to_dict("records") == [
        {"recipe": "clip-cid", "samples": 16}
    ]


def test_a_curve_on_a_part_of_the_pairs_stands_beside_the_students_of_all(shared, tmp_path):
    curve = Learning(
        fraction=0.6,
        recipes=["clip", "clip-cid"],
        samples=[8, 24],
        baseline="clip",
        longer=[48],
        longer_seeds=[0],
    )
    runs = ablate.plan_learning(curve, RECIPES, shared, seeds=[0, 1], finished_seeds=[0])
    assert {name: len(own) for name, own in runs.items()} == {
        "clip 8": 2,
        "clip 24": 2,
        "clip on all pairs 24": 1,
        "clip 48": 1,
        "clip-cid 8": 2,
        "clip-cid 24": 2,
        "clip-cid on all pairs 24": 1,
    }
    assert (
        runs["clip on all pairs 24"][0].data.fraction == 1
        and runs["clip 24"][0].data.fraction == 0.6
    )
    assert runs["clip 24"][0].out != plan(shared, "clip", x={})["x"][0].out
    for recipe in curve.recipes:  # a study's variant with as many pairs is the same run
        assert (
            runs[f"{recipe} 8"][0].out
            == plan(shared, recipe, x={"fraction": 0.6, "samples": 8})["x"][0].out
        )
    parts = {run.data.clusters for run in runs["clip-cid 8"]}
    found = cluster.read(parts.pop())
    assert not parts and len(found.centres) == 2  # 0.6 of 4
    kept = balance.read(shared.data["balance"])
    assert sorted(found.keys) == sorted(key for key in kept.keys[kept.keep] if in_part(key, 0.6))
    main = ablate.pd.DataFrame(
        {"recipe": ["clip on all pairs 24", "clip 8"], "set": "s", "seed": 0, "value": 0.1}
    )
    assert ablate.by_samples(main)["recipe"].tolist() == ["clip on all pairs", "clip"]
    counts = ablate.seed_counts(ablate.by_samples(main))
    assert counts.loc[24, "clip on all pairs"] == 1 and counts.index.tolist() == [8, 24]


# --- derived data -----------------------------------------------------------------------------------------------


def derived(shared, recipe="clip-cid", **variant) -> dict[str, str]:
    variant = Variant(**variant)
    return derive.folders(
        variant,
        varied(RECIPES[recipe], variant.recipe),
        shared.balance,
        shared.cluster,
        cache=shared.cache,
        data=shared.data,
    )[0]


def test_the_default_derives_nothing(shared):
    assert derived(shared) == shared.data and not shared.cache.exists()


@pytest.mark.parametrize("method", ["semdedup", "density", "random"])
def test_pruned_pairs_are_as_many_and_have_clusters(shared, method):
    data = derived(shared, keep={"prune": method}, clusters=3)
    kept, default = balance.read(data["balance"]), balance.read(shared.data["balance"])
    assert kept.keep.sum() == default.keep.sum() and set(kept.keys) == set(default.keys)
    found = cluster.read(data["clusters"])
    assert len(found.centres) == 3 and sorted(found.keys) == sorted(kept.keys[kept.keep])
    spec = TrainingSet("kept", image_px=PX, teacher="large", **data)
    side = targets.load_side(open_pairs(spec))
    assert set(side.keys) == set(kept.keys[kept.keep]) and "label" in side.arrays


def test_another_threshold_is_that_of_the_balance(shared):
    variant = {"keep": {"threshold": 0.9}, "clusters": 2}
    data, table = derived(shared, **variant), embed.load(shared.data["embeddings"] + "/large")
    expected = balance.balance(table.image, table.keys, threshold=0.9, metric="sql2")
    assert np.array_equal(balance.read(data["balance"]).keep, expected.keep)
    assert 0 < expected.keep.sum() < balance.read(shared.data["balance"]).keep.sum()
    before = {path: path.stat().st_mtime_ns for path in shared.cache.rglob("*")}
    assert derived(shared, **variant) == data
    assert before == {
        path: path.stat().st_mtime_ns for path in shared.cache.rglob("*")
    }  # nothing made again


def selected(shared, **chosen):
    folder = derived(shared, "mobileclip", reinforced=chosen)["reinforced"]
    return reinforced.read_shard(folder, 1), reinforced.read_meta(folder)


def test_a_part_of_the_reinforced_set(shared):
    whole = reinforced.read_shard(shared.data["reinforced"], 1)
    one, _ = selected(shared, n_aug=1, ensemble=["large"], n_syn=1)
    assert np.array_equal(one.augment, whole.augment[:, :1]) and one.keys == whole.keys
    assert torch.equal(one.image_emb, whole.image_emb[:, :1, WIDTHS[0] :])
    assert torch.equal(one.text_emb, whole.text_emb[:, :2, WIDTHS[0] :]) and one.syn_text == [
        s[:1] for s in whole.syn_text
    ]
    swapped, meta = selected(shared, ensemble=["large", "base"])
    assert [t["slice"] for t in meta["teachers"]] == [[0, 5], [5, 11]]
    assert torch.equal(swapped.text_emb[..., :5], whole.text_emb[..., 6:])
    synthetic, meta = selected(shared, captions="synthetic")
    assert meta["settings"]["n_syn"] == 1 and {len(s) for s in synthetic.syn_text} == {1}
    assert synthetic.captions == [s[0] for s in whole.syn_text] and torch.equal(
        synthetic.text_emb, whole.text_emb[:, 1:]
    )


def test_without_augmentation_it_is_the_whole_picture_and_its_embedding(shared):
    plain, meta = selected(shared, n_aug=0, ensemble=["large"])
    table = embed.load(shared.data["embeddings"] + "/large")
    rows = [table.keys.index(key) for key in plain.keys]
    assert plain.augment.shape[1] == 1 and (plain.augment[:, 0, :4] == [0, 0, 20, 20]).all()
    assert not plain.augment[..., 4:].any() and meta["settings"]["n_aug"] == 1
    assert torch.equal(
        plain.image_emb[:, 0], torch.from_numpy(np.asarray(table.image[rows])).float().bfloat16()
    )


def test_sets_with_the_same_augmentations_share_their_pixels(shared):
    metas = {
        name: selected(shared, **chosen)[1]
        for name, chosen in {
            "one teacher": {"ensemble": ["base"]},
            "captions": {"captions": "synthetic"},
            "fewer": {"n_aug": 1},
            "none": {"n_aug": 0, "ensemble": ["large"]},
        }.items()
    }
    whole = reinforced.pictures(reinforced.read_meta(shared.data["reinforced"]))
    same = {name: reinforced.pictures(meta) == whole for name, meta in metas.items()}
    assert same == {"one teacher": True, "captions": True, "fewer": False, "none": False}


def test_more_than_is_stored_is_refused(shared, tmp_path):
    with pytest.raises(ValueError, match="3 stored, n_aug 4 wanted"):
        reinforced.select(shared.data["reinforced"], tmp_path / "x", n_aug=4)
    with pytest.raises(ValueError, match="no teacher 'huge', there are base, large"):
        reinforced.select(shared.data["reinforced"], tmp_path / "x", ensemble=["huge"])
