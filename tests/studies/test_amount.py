"""mclip.studies.amount: a part of the pairs is reinforced once, variants take the first few, the
verdict follows the numbers.
"""

import shutil

import pandas as pd
import pytest
import torch

from mclip import balance
from mclip.data.shards import in_part
from mclip.data.stores import reinforced
from mclip.params import Balance, Cluster, Reinforce
from mclip.report import published
from mclip.report.compare import HELD_OUT
from mclip.studies import ablate, amount
from tests.world import PX, RECIPES, TRAIN, N

SETTINGS = Reinforce(
    pairs="kept",
    ensemble=["a"],
    n_aug=2,
    n_syn=0,
    image_px=PX,
    scale_min=0.9,
    randaugment_ops=0,
    randaugment_magnitude=9,
    caption_top_p=0.9,
    caption_candidates=2,
    batch_size=4,
    precision="fp32",
    seed=0,
)
STUDY = amount.Settings(
    recipe="mobileclip",
    fraction=0.6,
    samples=16,
    stored={"n_aug": 3, "scale_min": 0.4},
    n_aug=[1, 2],
    n_syn=[],
)


@pytest.fixture
def data(world):
    return {
        name: str(world / name)
        for name in ("pairs", "balance", "clusters", "embeddings", "reinforced", "cache")
    }


@pytest.fixture
def make(data, student, tmp_path):
    def part(study=STUDY, settings=SETTINGS):
        return amount.reinforced_part(
            study, settings, {"a": student}, "", data=data, cache=tmp_path / "cache"
        )

    return part


@pytest.mark.slow
def test_the_part_is_reinforced_with_more_than_the_stage_stores(make, data):
    folder = make()
    meta = reinforced.read_meta(folder)
    kept = balance.read(data["balance"])
    keys = [key for i in range(3) for key in reinforced.read_shard(folder, i).keys]
    assert sorted(keys) == sorted(
        key for key in kept.keys[kept.keep] if in_part(key, 0.6)
    ) and meta["samples"] == len(keys)
    assert (
        reinforced.read_shard(folder, 0).augment.shape[1] == 3
        and meta["settings"]["scale_min"] == 0.4
    )
    before = (folder / "meta.json").stat().st_mtime_ns
    assert make() == folder and (folder / "meta.json").stat().st_mtime_ns == before
    assert make(STUDY.model_copy(update={"fraction": 0.9})) != folder


def test_a_killed_run_keeps_its_shards(make, monkeypatch):
    write, written = reinforced.write_shard, []

    def killed(folder, index, shard):
        if index == 2:
            raise KeyboardInterrupt
        written.append(index)
        write(folder, index, shard)

    monkeypatch.setattr(reinforced, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        make()
    monkeypatch.setattr(
        reinforced,
        "write_shard",
        lambda folder, index, shard: written.append(index) or write(folder, index, shard),
    )
    folder = make()
    assert written == [0, 1, 2] and reinforced.read_meta(folder)["complete"]
    assert not list(folder.parent.glob("*.part"))


def test_all_pairs_and_nothing_else_stored_is_the_stages_own(make, data, tmp_path):
    whole = STUDY.model_copy(update={"fraction": 1.0, "stored": {}})
    assert str(make(whole)) == data["reinforced"] and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_variants_take_the_first_few_of_the_same_set(data, world, student, tmp_path):
    shared = ablate.Shared(
        student,
        TRAIN,
        Balance(teacher="large", metric="sql2", threshold=1e-3, curve=[]),
        Cluster(teacher="large", clusters=4, iterations=5, seed=0),
        data,
        tmp_path / "cache",
    )
    study = amount.Settings(
        recipe="mobileclip", fraction=0.6, samples=16, stored={}, n_aug=[1, 2], n_syn=[0, 1]
    )
    source = tmp_path / "source"
    shutil.copytree(world / "reinforced", source)
    runs = amount.plan(study, RECIPES["mobileclip"], shared, source, seeds=[0, 1])
    assert list(runs) == ["all", "aug 1", "aug 2", "syn 0", "syn 1"]
    assert len({run.out for own in runs.values() for run in own}) == 10
    whole = reinforced.read_shard(source, 0)
    for name, shape in {
        "all": (3, 3),
        "aug 1": (1, 3),
        "aug 2": (2, 3),
        "syn 0": (3, 3),
        "syn 1": (3, 2),
    }.items():
        run = runs[name][1]
        found = reinforced.read_shard(run.data.reinforced, 0)
        assert (found.image_emb.shape[1], found.text_emb.shape[1]) == shape
        assert torch.equal(found.image_emb, whole.image_emb[:, : shape[0]])
        assert torch.equal(found.text_emb, whole.text_emb[:, : shape[1]])
        assert (run.seed, run.train.samples, run.data.fraction) == (1, 16, 0.6)
        assert run.recipe.synthetic == run.data.synthetic == (name != "syn 0")
    ablate.train({"syn 0": runs["syn 0"][:1], "aug 1": runs["aug 1"][:1]}, cache=shared.cache)
    assert ablate.pairs({"aug 1": runs["aug 1"]})["aug 1"] == sum(
        in_part(f"k{i:03d}", 0.6) for i in range(N)
    )


def frame(gaps: dict[str, float], name: str = HELD_OUT) -> pd.DataFrame:
    noise = iter([0.001, -0.001, 0.0, 0.002, 0.0, -0.002] * 9)
    return pd.DataFrame(
        [
            (variant, name, seed, 0.3 + gap + 0.1 * seed + next(noise))
            for variant, gap in gaps.items()
            for seed in range(3)
        ],
        columns=["recipe", "set", "seed", "value"],
    )


def test_where_more_stops_to_help():
    study = STUDY.model_copy(
        update={"stored": {"n_aug": 10, "n_syn": 5}, "n_aug": [1, 2, 5], "n_syn": [0, 1]}
    )
    most = amount.most(study, SETTINGS)
    assert most == {"augmentations": 10, "captions": 5}
    assert amount.titles(study, most) == {
        "all": "10 augmentations and 5 captions",
        "aug 1": "1 augmentation",
        "aug 2": "2 augmentations",
        "aug 5": "5 augmentations",
        "syn 0": "0 captions",
        "syn 1": "1 caption",
    }
    main = frame({"all": 0, "aug 1": -0.05, "aug 2": -0.04, "aug 5": 0, "syn 0": 0, "syn 1": -0.05})
    points = amount.curve(main, most, [HELD_OUT])
    assert points["number"].tolist() == [1, 2, 5, 10, 0, 1, 5]
    assert points.loc[points["number"] == 10, "mean"].tolist() == [0]
    assert points.loc[0, "mean"] == pytest.approx(-5, abs=0.2) and points.loc[0, "high"] < 0
    said = amount.verdict(points, published.ENOUGH)
    assert (
        f"on {HELD_OUT} 2 augmentations are " in said
        and "points below 10 and 5 is within noise of them" in said
    )
    assert "1 caption is" in said and "points below 5." in said  # nothing was tried between
    assert said.endswith("The paper has 5 augmentations and 2 captions as enough.")
    same = amount.curve(frame({name: 0.0 for name in amount.variants(study)}), most, [HELD_OUT])
    assert "no smaller number of captions can be told from 5." in amount.verdict(
        same, published.ENOUGH
    )


def test_one_seed_tells_nothing():
    main = frame({"all": 0, "aug 1": -0.05})
    points = amount.curve(main[main["seed"] == 0], {"augmentations": 2, "captions": 0}, [HELD_OUT])
    assert "no smaller number of augmentations can be told from 2" in amount.verdict(
        points, published.ENOUGH
    )
