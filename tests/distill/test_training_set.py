"""mclip.distill.targets: both loaders serve the same content; rows of all the parts belong
together.
"""

import dataclasses
import shutil

import numpy as np
import open_clip
import pytest
import torch

from mclip.data import augment, shards
from mclip.data.shards import in_part
from mclip.data.stores import clusters as cluster_store
from mclip.data.stores import reinforced
from mclip.distill import loaders, targets
from mclip.distill.captions import caption_id
from mclip.distill.pairs import FOLDERS, KINDS, open_pairs
from mclip.distill.pixels import pixel_cache
from tests.world import PX, N

TOKENIZER = open_clip.get_tokenizer("ViT-B-32", context_length=8)


def loaded(spec):
    pairs = open_pairs(spec)
    side = targets.load_side(pairs)
    targets.add_tokens(side, TOKENIZER, synthetic=spec.synthetic)
    return side, pixel_cache(pairs, workers=0)


def side_of(spec):
    return targets.load_side(open_pairs(spec))


def shard_side(spec, index, samples):
    return targets.shard_side(open_pairs(spec), index, samples)


def test_kinds_of_pairs(training_set):
    assert len(side_of(training_set("all"))) == N
    kept = side_of(training_set("kept"))
    assert len(kept) == N - 1 and "k005" not in kept.keys
    assert side_of(training_set("kept", True)).keys == kept.keys
    assert side_of(training_set("all", True)).keys == side_of(training_set("all")).keys
    assert open_pairs(training_set("kept", True)).count() == N - 1


def test_kept_and_all_pairs_of_the_reinforced_set_share_its_pictures(training_set):
    whole, pixels = loaded(training_set("all", True))
    kept, shared = loaded(training_set("kept", True))
    assert shared.filename == pixels.filename
    assert kept.row.tolist() == [i for i, key in enumerate(whole.keys) if key != "k005"]
    for name, rows in kept.arrays.items():
        assert torch.equal(rows, whole.arrays[name][kept.row])


def test_pixels_are_the_replayed_augmentations(training_set, world):
    spec = training_set("kept", True)
    side, pixels = loaded(spec)
    assert pixels.shape == (N, 3, 3, PX, PX) and pixels.dtype == np.uint8
    stored = reinforced.read_shard(world / "reinforced", 1)
    sample = next(
        s for s in shards.iter_samples(world / "pairs", shards=[1]) if s.key == stored.keys[2]
    )
    expected = augment.replay_all(shards.decode(sample), stored.augment[2], PX)
    assert np.array_equal(pixels[side.row[side.keys.index(stored.keys[2])]], expected)


def test_kept_rows_point_into_the_cache_of_all(training_set):
    (everything, pixels), (kept, same) = loaded(training_set("all")), loaded(training_set("kept"))
    assert np.shares_memory(pixels, same) or pixels.filename == same.filename
    for key, row in zip(kept.keys, kept.row, strict=True):
        assert everything.row[everything.keys.index(key)] == row


def test_a_batch_holds_one_sample_a_row(training_set):
    spec = training_set("kept", True, teacher="large", synthetic=True)
    side, pixels = loaded(spec)
    loader = loaders.CachedLoader(side, pixels, 8, seed=0, teacher_slice=[6, 11])
    batch = loader.batch(1)
    assert batch["image"].shape == (8, 3, PX, PX) and batch["tokens"].shape == (8, 8)
    assert torch.equal(batch["teacher_image"], batch["ensemble_image"][:, 6:11])
    for i in range(8):
        at = [
            j
            for j in range(len(side))
            if torch.equal(side.arrays["ensemble_texts"][j, 0].float(), batch["ensemble_text"][i])
        ]
        assert len(at) == 1
        j = at[0]
        assert int(batch["ids"][i]) == caption_id(side.captions[j])
        assert torch.equal(batch["tokens"][i], TOKENIZER([side.captions[j]])[0])
        view = next(
            v for v in range(3) if np.array_equal(pixels[side.row[j], v], batch["image"][i].numpy())
        )
        assert torch.equal(
            batch["ensemble_image"][i], side.arrays["ensemble_image"][j, view].float()
        )
        syn = [int(v) for v in batch["syn_ids"]][i]
        assert syn in [caption_id(t) for t in side.syn_text[j]]


@pytest.mark.slow
def test_batches_are_a_function_of_seed_and_step_and_cover_an_epoch(training_set):
    side, pixels = loaded(training_set("all"))
    a, b = (loaders.CachedLoader(side, pixels, 8, seed=3) for _ in range(2))
    a.batch(0)
    assert all(torch.equal(v, b.batch(2)[k]) for k, v in a.batch(2).items())
    images = torch.cat(
        [loaders.CachedLoader(side, pixels[:, :1], 8, seed=3).batch(i)["image"] for i in range(3)]
    )
    assert len({bytes(x.numpy()) for x in images}) == N


def test_ranks_share_a_global_batch(training_set):
    side, pixels = loaded(training_set("all"))
    whole = loaders.CachedLoader(side, pixels, 8, seed=0).batch(0)
    parts = [
        loaders.CachedLoader(side, pixels, 8, seed=0, rank=r, world=2).batch(0) for r in range(2)
    ]
    together = torch.stack([parts[0]["image"], parts[1]["image"]], 1).flatten(0, 1)
    assert torch.equal(together, whole["image"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fraction_is_the_same_pairs_of_every_kind(training_set, kind):
    whole, _ = loaded(training_set(*kind))
    options = {"teacher": "large", "synthetic": kind[1]}
    side, pixels = loaded(training_set(*kind, fraction=0.5, **options))
    assert side.keys == [key for key in whole.keys if in_part(key, 0.5)] and 0 < len(side) < len(
        whole
    )
    assert open_pairs(training_set(*kind, fraction=0.5)).count() == len(side)
    assert all(len(values) == len(side) for values in side.arrays.values())
    everything, all_pixels = loaded(training_set(*kind, **options))
    place = [everything.keys.index(key) for key in side.keys]
    for name in ("teacher_image", "label", "ids"):
        assert torch.equal(side.arrays[name], everything.arrays[name][place])
    assert (pixels[side.row] == all_pixels[everything.row[place]]).all()
    smaller = side_of(training_set(*kind, fraction=0.25))
    assert set(smaller.keys) <= set(side.keys)


def test_a_fraction_without_pairs_is_told(training_set):
    with pytest.raises(ValueError, match="no pair to train on"):
        side_of(training_set("all", fraction=1e-9))


@pytest.mark.slow
@pytest.mark.parametrize("kind, fraction", [*((kind, 1) for kind in KINDS), (("kept", True), 0.6)])
def test_streamed_content_equals_cached(training_set, kind, fraction):
    spec = training_set(
        *kind,
        teacher=None if kind[0] == "all" else "large",
        synthetic=kind[1],
        fraction=fraction,
    )
    side, pixels = loaded(spec)
    stream = loaders.StreamedLoader(
        open_pairs(spec), TOKENIZER, 8, seed=0, workers=0, teacher_slice=[6, 11]
    )
    seen = set()
    for step in range(6):
        batch = stream.batch(step)
        for i in range(8):
            where = np.argwhere((pixels[side.row] == batch["image"][i].numpy()).all(axis=(2, 3, 4)))
            j, view = where[0]
            seen.add(side.keys[j])
            assert int(batch["ids"][i]) == caption_id(side.captions[j])
            if kind[0] == "kept" and not kind[1]:
                assert torch.equal(
                    batch["teacher_image"][i], side.arrays["teacher_image"][j].float()
                )
                assert batch["label"][i] == side.arrays["label"][j]
            if kind[1]:
                assert torch.equal(
                    batch["ensemble_image"][i], side.arrays["ensemble_image"][j, view].float()
                )
    assert len(seen) == len(side)  # two epochs' worth: nothing is left out


@pytest.mark.parametrize("kind", KINDS)
def test_more_in_a_batch_than_there_are_pairs_is_refused(training_set, kind):
    spec = training_set(*kind)
    count = len(side_of(spec))
    with pytest.raises(
        ValueError, match=f"batch_size {count + 1} is more than the {count} pairs there are"
    ):
        loaders.StreamedLoader(open_pairs(spec), TOKENIZER, count + 1, seed=0, workers=0)
    side, pixels = loaded(spec)
    with pytest.raises(
        ValueError, match=f"batch_size {count + 1} is more than the {count} pairs there are"
    ):
        loaders.CachedLoader(side, pixels, count + 1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_a_function_of_its_seed(training_set, workers):
    spec = training_set("kept", True, teacher="large", synthetic=True)

    def batches(seed, workers):
        loader = loaders.StreamedLoader(open_pairs(spec), TOKENIZER, 8, seed=seed, workers=workers)
        return [loader.batch(step) for step in range(5)]

    first, again, other = batches(3, workers), batches(3, workers), batches(4, 0)
    for one, two in zip(first, again, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
    assert any(not torch.equal(a["image"], b["image"]) for a, b in zip(first, other, strict=True))


@pytest.mark.slow
def test_streaming_reads_each_shard_once_and_decodes_what_it_gives(training_set, monkeypatch):
    read, decoded = [], []
    iter_samples, decode = shards.iter_samples, shards.decode
    monkeypatch.setattr(
        shards, "iter_samples", lambda *a, **k: read.append(k) or iter_samples(*a, **k)
    )
    monkeypatch.setattr(
        shards, "decode", lambda sample: decoded.append(sample.key) or decode(sample)
    )
    stream = loaders.StreamedLoader(
        open_pairs(training_set("all")), TOKENIZER, 12, seed=0, workers=0
    )
    for step in range(2):
        stream.batch(step)
    assert len(read) == 3 and sorted(decoded) == sorted(set(decoded)) and len(decoded) == N


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_opens_a_shard_and_what_belongs_to_it_only(
    training_set, world, tmp_path, monkeypatch, kind
):
    root = shutil.copytree(world, tmp_path / "world")
    spec = training_set(*kind, teacher="large", **{k: str(root / k) for k in FOLDERS})
    whole = side_of(spec)
    pairs = open_pairs(spec)
    pairs.open_tables()
    for path in [
        *root.glob("embeddings/large/*/*_000[02].*"),
        *root.glob("reinforced/*_000[02].*"),
    ]:
        path.unlink()
    for of in (
        "balance.read",
        "balance.kept",
        "clusters.read",
        "clusters.labels",
        "embeddings.load",
    ):
        monkeypatch.setattr(f"mclip.data.stores.{of}", None)  # the tables are not read again either
    open_pairs(spec).open_tables()
    side, _ = targets.shard_side(pairs, 1, list(shards.iter_samples(root / "pairs", shards=[1])))
    place = [i for i, key in enumerate(whole.keys) if key in {f"k{i:03d}" for i in range(8, 16)}]
    assert side.keys == [whole.keys[i] for i in place] and side.captions == [
        whole.captions[i] for i in place
    ]
    assert side.arrays.keys() == whole.arrays.keys()
    for name, values in side.arrays.items():
        assert torch.equal(values, whole.arrays[name][place])
    with pytest.raises((ValueError, FileNotFoundError), match="_0002"):
        targets.shard_side(pairs, 2, list(shards.iter_samples(root / "pairs", shards=[2])))


def test_a_pair_without_a_label_or_an_embedding_is_named(training_set, world, tmp_path):
    few = cluster_store.read(world / "clusters")
    cluster_store.write(
        tmp_path / "clusters",
        dataclasses.replace(
            few, labels=few.labels[:-2], keys=few.keys[:-2], similarity=few.similarity[:-2]
        ),
    )
    spec = training_set(
        "kept", teacher="large", clusters=str(tmp_path / "clusters"), cache=str(tmp_path)
    )
    samples = list(shards.iter_samples(spec.pairs, shards=[2]))
    for call in (lambda: side_of(spec), lambda: shard_side(spec, 2, samples)):
        with pytest.raises(
            ValueError,
            match="no cluster label for 2 pairs, the first is k022; run `dvc repro cluster`",
        ):
            call()
    strange = [samples[0]._replace(key="k001")]
    with pytest.raises(
        ValueError, match="no embedding of 1 pairs, the first is k001; run `dvc repro embed`"
    ):
        shard_side(training_set("all", teacher="large", cache=str(tmp_path)), 2, strange)


def test_missing_parts_are_named(training_set, tmp_path):
    with pytest.raises(FileNotFoundError, match="dvc repro reinforce"):
        side_of(training_set("kept", True, reinforced=str(tmp_path)))
    side, pixels = loaded(training_set("all"))
    with pytest.raises(ValueError, match="distill.train.batch_size 99 is more than the 24 pairs"):
        loaders.CachedLoader(side, pixels, 99, seed=0)
    with pytest.raises(ValueError, match="synthetic captions wanted"):
        targets.add_tokens(side, TOKENIZER, synthetic=True)


def test_the_cache_is_rebuilt_when_what_it_was_made_of_changes(training_set):
    spec = training_set("all")
    first = pixel_cache(open_pairs(spec), workers=0)
    other = pixel_cache(open_pairs(dataclasses.replace(spec, light_views=1)), workers=0)
    assert other.shape[1] == 1 and first.shape[1] == 4 and first.filename != other.filename


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_reads_its_manifest_once(training_set, monkeypatch, kind):
    spec = training_set(*kind, teacher="large")
    loaded(spec)  # the caches are there
    reads = []
    read_manifest = shards.read_manifest
    monkeypatch.setattr(
        shards, "read_manifest", lambda folder: reads.append(folder) or read_manifest(folder)
    )
    pairs = open_pairs(spec)
    side = targets.load_side(pairs)
    pixel_cache(pairs, workers=0)
    assert pairs.count() == len(side) and reads == [spec.pairs]


def test_a_kind_says_which_folders_it_reads(training_set):
    reads = {kind: set(open_pairs(training_set(*kind)).folders) for kind in KINDS}
    assert reads == {
        ("all", False): {"pairs"},
        ("kept", False): {"pairs", "balance"},
        ("all", True): {"pairs", "reinforced"},
        ("kept", True): {"pairs", "balance", "reinforced"},
    }
    taught = open_pairs(training_set("all", teacher="large")).folders
    assert set(taught) == {"pairs", "clusters", "embeddings"}
    assert taught["embeddings"].endswith("/large")
