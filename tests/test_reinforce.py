"""mclip.reinforce: what is stored is what the teachers say of the replayed pictures; a killed run
goes on.
"""

import json

import numpy as np
import open_clip
import pytest
import torch

from mclip import models, reinforce
from mclip.data import augment, shards
from mclip.data.shards import in_part
from mclip.data.stores import balance as balance_store
from mclip.data.stores import reinforced
from mclip.distill import targets
from mclip.distill.pairs import TrainingSet, open_pairs
from mclip.params import Reinforce
from tests.world import PX, N

SETTINGS = Reinforce(
    pairs="kept",
    ensemble=["a", "b"],
    n_aug=2,
    n_syn=0,
    image_px=PX,
    scale_min=0.08,
    randaugment_ops=2,
    randaugment_magnitude=9,
    caption_top_p=0.9,
    caption_candidates=2,
    batch_size=3,
    precision="fp32",
    seed=0,
)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    out = {}
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        cfg = {
            "embed_dim": 5 + i,
            "vision_cfg": {
                "image_size": 16 + 8 * i,
                "layers": 1,
                "width": 16,
                "head_width": 8,
                "patch_size": 8,
            },
            "text_cfg": {
                "context_length": 8,
                "vocab_size": 49408,
                "width": 8,
                "heads": 2,
                "layers": 1,
            },
        }
        folder = tmp_path_factory.mktemp(name)
        preprocess = {
            "mean": [0.4, 0.5, 0.6],
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        }
        models.export(open_clip.CLIP(**cfg), folder, config=cfg, preprocess=preprocess)
        out[name] = f"local-dir:{folder}"
    return out


def run(world, out, teachers, *, balance=None, captioner="", fraction=1.0, **changes):
    return reinforce.run(
        SETTINGS.model_copy(update=changes),
        teachers,
        captioner,
        pairs=world / "pairs",
        balance=balance or world / "balance",
        fraction=fraction,
        out=out,
        cache=out.parent / "cache",
        decoders=0,
    )


def keeping(folder, keys):
    """A balance folder that keeps all of some keys."""
    balance_store.write(
        folder,
        balance_store.Balance(
            np.arange(len(keys)),
            np.ones(len(keys), bool),
            np.zeros(len(keys)),
            np.array(keys),
            0.1,
            "sql2",
        ),
    )
    return folder


@pytest.mark.slow
def test_embeddings_are_the_teachers_of_the_replayed_pictures(world, teachers, tmp_path):
    meta = run(world, tmp_path / "r", teachers)
    assert meta["samples"] == N - 1 and [t["slice"] for t in meta["teachers"]] == [[0, 5], [5, 11]]
    shard = reinforced.read_shard(tmp_path / "r", 0)
    assert "k005" not in shard.keys and len(shard.keys) == 7
    samples = {s.key: s for s in shards.iter_samples(world / "pairs", shards=[0])}
    for name, t in zip("ab", meta["teachers"], strict=True):
        model, _, _, tokenizer = models.create(teachers[name])
        assert t["logit_scale"] == pytest.approx(models.logit_scale(model))
        for i in (0, 4):
            image = shards.decode(samples[shard.keys[i]])
            views = torch.from_numpy(augment.replay_all(image, shard.augment[i], PX))
            x = augment.to_input(views, models.image_size(model), (0.4, 0.5, 0.6), (0.5,) * 3)
            expected = models.encode_images(model, [x], precision="fp32")
            stored = shard.image_emb[i, :, slice(*t["slice"])].float()
            assert torch.allclose(stored, expected, atol=5e-3)
            text = models.encode_texts(model, tokenizer, [shard.captions[i]], precision="fp32")
            assert torch.allclose(shard.text_emb[i, :, slice(*t["slice"])].float(), text, atol=5e-3)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(world, teachers, tmp_path, monkeypatch):
    run(world, tmp_path / "whole", teachers)
    write, written = reinforced.write_shard, []

    def dies(folder, index, shard):
        if index == 2:
            raise KeyboardInterrupt
        written.append(index)
        write(folder, index, shard)

    monkeypatch.setattr(reinforced, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "killed", teachers)
    assert not json.loads((tmp_path / "killed" / "meta.json").read_text())["complete"]
    again = []
    monkeypatch.setattr(
        reinforced, "write_shard", lambda f, i, s: (again.append(i), write(f, i, s))
    )
    run(world, tmp_path / "killed", teachers)
    assert written == [0, 1] and again == [2]
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


@pytest.mark.slow
def test_many_processes_write_the_same_bytes(world, teachers, tmp_path):
    run(world, tmp_path / "one", teachers)
    run(world, tmp_path / "two", teachers, workers=2)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    reinforced.paths(tmp_path / "two", 1)[
        0
    ].unlink()  # a killed run goes on, whatever the number of processes
    whole = reinforced.paths(tmp_path / "two", 0)[0].stat().st_mtime_ns
    run(world, tmp_path / "two", teachers)
    assert reinforced.paths(tmp_path / "two", 0)[0].stat().st_mtime_ns == whole
    assert (
        reinforced.paths(tmp_path / "two", 1)[0].read_bytes()
        == reinforced.paths(tmp_path / "one", 1)[0].read_bytes()
    )


@pytest.mark.slow
def test_a_fraction_of_the_kept_pairs(world, teachers, tmp_path):
    meta = run(world, tmp_path / "r", teachers, fraction=0.5)
    keys = [key for i in range(3) for key in reinforced.read_keys(tmp_path / "r", i)]
    assert keys == [
        key for key in (f"k{i:03d}" for i in range(N)) if key != "k005" and in_part(key, 0.5)
    ]
    assert (
        meta["samples"] == len(keys)
        and meta["kept"] != run(world, tmp_path / "all", teachers)["kept"]
    )


@pytest.mark.slow
def test_other_settings_start_anew(world, teachers, tmp_path):
    run(world, tmp_path / "r", teachers)
    run(world, tmp_path / "r", teachers, n_aug=1)
    assert reinforced.read_shard(tmp_path / "r", 1).augment.shape[1] == 1


def test_a_shard_of_which_nothing_is_kept_is_as_wide_as_the_others(world, teachers, tmp_path):
    keys = [f"k{i:03d}" for i in range(N) if i // 8 != 1]
    assert run(world, tmp_path / "r", teachers, balance=keeping(tmp_path / "balance", keys))[
        "samples"
    ] == len(keys)
    empty, full = (reinforced.read_shard(tmp_path / "r", i) for i in (1, 0))
    for name in ("augment", "image_emb", "text_emb"):
        assert getattr(empty, name).shape == (0, *getattr(full, name).shape[1:])
    (tmp_path / "out").mkdir()
    reinforced.select(tmp_path / "r", tmp_path / "out", n_aug=1, ensemble=["b"])
    assert reinforced.read_shard(tmp_path / "out", 1).image_emb.shape == (0, 1, 6)
    spec = TrainingSet(
        "all", True, image_px=PX, pairs=str(world / "pairs"), reinforced=str(tmp_path / "r")
    )
    assert targets.load_side(open_pairs(spec)).keys == keys


def test_all_pairs_without_balance(world, teachers, tmp_path):
    meta = run(world, tmp_path / "r", teachers, pairs="all", balance=tmp_path / "nowhere")
    assert meta["samples"] == N and "k005" in reinforced.read_keys(tmp_path / "r", 0)


def test_nothing_kept_is_said(world, teachers, tmp_path):
    with pytest.raises(ValueError, match="no pair is kept"):
        run(world, tmp_path / "r", teachers, balance=keeping(tmp_path / "balance", ["elsewhere"]))


@pytest.mark.slow
def test_captions_come_from_the_captioner(world, teachers, tmp_path, monkeypatch):
    """n_syn captions an image, in its row; the captioner itself is tested in test_teachers."""
    from mclip.teachers import captioner

    def generate(model, images, *, n, top_p, seed, precision, prepare, done):
        images = prepare(images)
        assert images.shape[1:] == (3, 16, 16)
        done(len(images))
        return [[f"caption {j} of {np.asarray(im).sum():.4f}" for j in range(n)] for im in images]

    bars, bar = [], reinforce.bar
    monkeypatch.setattr(captioner, "generate", generate)
    monkeypatch.setattr(reinforce, "bar", lambda **options: bars.append(bar(**options)) or bars[-1])
    run(
        world,
        tmp_path / "r",
        teachers,
        captioner=teachers["a"],
        n_syn=2,
        caption_candidates=2,
        balance=keeping(tmp_path / "balance", [f"k{i:03d}" for i in range(N)]),
    )
    assert bars[0].n == bars[0].total == 2 * N
    shard = reinforced.read_shard(tmp_path / "r", 0)
    assert shard.text_emb.shape == (8, 3, 11) and len({s[0] for s in shard.syn_text}) == 8
    assert all(sorted(t[8] for t in s) == ["0", "1"] for s in shard.syn_text)
    near = (shard.image_emb.float().mean(1)[:, None] * shard.text_emb.float()).sum(-1)
    assert (near[:, 1] >= near[:, 2] - 1e-3).all()  # reranked by the teachers
    model, _, _, tokenizer = models.create(teachers["b"])
    text = models.encode_texts(model, tokenizer, [shard.syn_text[3][1]])
    assert torch.allclose(shard.text_emb[3, 2, 5:].float(), text[0], atol=5e-3)


@pytest.mark.parametrize(
    ("written", "n", "chosen"),
    [
        (["a", "b", "c"], 2, [2, 0]),
        (["a", "b", "a"], 2, [2, 1]),
        (["a", "a", "a"], 2, [2, 2]),
        (["a", "b", "c"], 0, []),
    ],
)
def test_distinct_captions_that_are_nearest_are_kept(written, n, chosen):
    pictures = torch.tensor([[1.0, 0.0]])
    texts = torch.tensor([[[0.6, 0.8], [0.0, 1.0], [0.8, 0.6]]])
    assert reinforce.best_captions([written], pictures, texts, n) == [chosen]
