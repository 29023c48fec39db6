"""mclip.embed: clip-retrieval's layout, resuming, foreign folders, broken rows."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mclip import embed, models
from mclip.data import shards
from mclip.data.stores import embeddings as embedding_store
from mclip.data.stores import features
from tests.models.test_models import CONFIG, tiny


def picture(i):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (10 * i, 255 - 10 * i, 50)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def world(tmp_path):
    samples = [shards.Sample(f"k{i}", picture(i), "png", f"picture {i % 3}", {}) for i in range(7)]
    shards.write_shards(samples, tmp_path / "pairs", shard_size=3)
    models.export(tiny(), tmp_path / "tiny", config=CONFIG)
    return tmp_path


def run(world, **options):
    return embed.run(
        {"t": f"local-dir:{world / 'tiny'}"},
        pairs=world / "pairs",
        out=world / "emb",
        cache=world / "features",
        batch_size=2,
        precision="fp32",
        decoders=0,
        **options,
    )


def test_run_and_load(world):
    meta = run(world)["t"]
    e = embed.load(world / "emb/t")
    assert e.keys == [f"k{i}" for i in range(7)] and e.captions == [
        f"picture {i % 3}" for i in range(7)
    ]
    assert e.image.shape == e.text.shape == (7, 16) and e.image.dtype == np.float16
    assert np.allclose(np.linalg.norm(e.image.astype(np.float32), axis=1), 1, atol=2e-3)
    assert np.array_equal(e.text[0], e.text[3])
    assert e.logit_scale == pytest.approx(1 / 0.07, rel=1e-4) and e.model == meta["model"]
    assert sorted(p.name for p in (world / "emb/t/img_emb").iterdir()) == [
        f"img_emb_{i:04d}.npy" for i in range(3)
    ]


@pytest.mark.slow
def test_resumes_by_shard_with_the_same_bytes(world, monkeypatch):
    run(world)
    files = {p: p.read_bytes() for p in (world / "emb").rglob("*") if p.is_file()}
    gone = world / "emb/t/text_emb/text_emb_0001.npy"
    gone.unlink()
    with pytest.raises(embed.EmbeddingsError, match="text rows"):
        embed.load(world / "emb/t")
    read, plain = [], shards.iter_samples
    monkeypatch.setattr(
        shards,
        "iter_samples",
        lambda f, *, shards: (read.extend(shards), plain(f, shards=shards))[1],
    )
    run(world)
    assert (
        read == [1]
        and {p: p.read_bytes() for p in (world / "emb").rglob("*") if p.is_file()} == files
    )
    models.export(tiny(seed=1), world / "tiny", config=CONFIG)  # other weights: all anew
    run(world)
    assert read == [1, 0, 1, 2]


def read_shard(world, i):
    pairs = world / "pairs"
    return list(shards.iter_samples(pairs, shards=[i])), shards.read_manifest(pairs)["shards"][i]


def keep_features(world, i, **options):
    """What the stage `teachers` leaves of a shard, as `run` will look for it."""
    model, *_ = models.create(f"local-dir:{world / 'tiny'}")
    options = {"precision": "fp32", "batch_size": 2, "cache": world / "features"} | options
    return features.image_features(
        models.for_inference(model), *read_shard(world, i), keep=True, **options
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_features_give_the_same_bytes(world, monkeypatch, precision):
    def embedded(out):
        options = {"precision": precision, "batch_size": 2, "cache": world / "features"}
        names = {"t": f"local-dir:{world / 'tiny'}"}
        embed.run(names, pairs=world / "pairs", out=out, decoders=0, **options)
        return {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}

    computed = embedded(world / "computed")
    assert not (world / "features").exists()  # who embeds keeps nothing: a web set has no room
    for shard in range(3):
        rows = keep_features(world, shard, precision=precision)
        again = keep_features(world, shard, precision=precision)
        assert rows.dtype == again.dtype and rows.equal(again)
    assert len(list((world / "features").iterdir())) == 3
    monkeypatch.setattr(shards.Pictures, "__getitem__", lambda *_: pytest.fail("decodes"))
    assert embedded(world / "read") == computed


def test_features_are_kept_by_all_that_they_depend_on(world):
    model, *_ = models.create(f"local-dir:{world / 'tiny'}")

    def path(i=0, **options):
        options = {"precision": "fp32", "batch_size": 2} | options
        return features.path(models.for_inference(model), read_shard(world, i)[1], **options)

    assert path() == path()
    paths = {path(), path(1), path(precision="bf16"), path(batch_size=3)}
    model.visual.preprocess_cfg["mean"] = [0.4] * 3
    paths.add(path())
    model.visual.image_size = (40, 40)
    paths.add(path())
    with torch.no_grad():
        model.visual.trunk.conv1[0].weight[0, 0, 0, 0] += 1
    paths.add(path())
    assert len(paths) == 7
    with torch.no_grad():
        model.visual.head.proj.weight.add_(1)  # the head is not the trunk's
    assert path() in paths


def test_features_with_their_head_are_the_embeddings(world):
    model, _, preprocess, _ = models.create(f"local-dir:{world / 'tiny'}")
    fast, (samples, shard) = models.for_inference(model), read_shard(world, 1)
    pictures = torch.stack([preprocess(shards.decode(s)) for s in samples])
    rows = features.image_features(fast, samples, shard, precision="fp32", cache=world / "none")
    embedded = features.embed_images(fast, rows, precision="fp32")
    assert torch.equal(embedded, models.encode_images(fast, [pictures], precision="fp32"))


@pytest.mark.slow
def test_teachers_together_as_each_alone(world, monkeypatch):
    models.export(tiny(seed=1), world / "other", config=CONFIG)
    names = {"t": f"local-dir:{world / 'tiny'}", "u": f"local-dir:{world / 'other'}"}
    options = dict(pairs=world / "pairs", batch_size=2, precision="fp32", decoders=0)
    for name, model in names.items():
        embed.run({name: model}, out=world / "alone", **options)
    embed.run(names, out=world / "emb", **options)
    files = [p.relative_to(world / "alone") for p in (world / "alone").rglob("*") if p.is_file()]
    assert len(files) == 2 * (3 * 3 + 1)
    assert all(
        (world / "alone" / f).read_bytes() == (world / "emb" / f).read_bytes() for f in files
    )
    (world / "emb/u/img_emb/img_emb_0002.npy").unlink()
    seen, plain = [], features.image_features
    monkeypatch.setattr(
        features, "image_features", lambda *args, **kw: (seen.append(1), plain(*args, **kw))[1]
    )
    embed.run(names, out=world / "emb", **options)
    assert len(seen) == 1  # one shard of one teacher
    assert all(
        (world / "alone" / f).read_bytes() == (world / "emb" / f).read_bytes() for f in files
    )


@pytest.mark.slow
def test_many_processes_write_the_same_bytes(world):
    models.export(tiny(seed=1), world / "other", config=CONFIG)
    names = {"t": f"local-dir:{world / 'tiny'}", "u": f"local-dir:{world / 'other'}"}
    options = dict(pairs=world / "pairs", batch_size=2, precision="fp32", decoders=0)
    one, two = (embed.run(names, out=world / str(n), workers=n, **options) for n in (1, 2))
    files = [p.relative_to(world / "1") for p in (world / "1").rglob("*") if p.is_file()]
    assert len(files) == 2 * (3 * 3 + 1) and one == two
    assert all((world / "1" / f).read_bytes() == (world / "2" / f).read_bytes() for f in files)


@pytest.mark.slow
def test_a_worker_that_fails_says_why(world):
    tar = sorted((world / "pairs").glob("*.tar"))[1]
    tar.unlink()
    with pytest.raises(shards.ShardError, match=tar.name):
        embed.run(
            {"t": f"local-dir:{world / 'tiny'}"},
            pairs=world / "pairs",
            out=world / "emb",
            workers=2,
        )


def foreign(folder, parts, **names):
    (folder / "img_emb").mkdir(parents=True)
    for name, rows in parts.items():
        np.save(folder / "img_emb" / f"img_emb_{name}.npy", rows)


def test_foreign_folder(tmp_path):
    rows = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
    foreign(
        tmp_path, {str(i): rows[i : i + 1] for i in range(11)}
    )  # img_emb_10 comes after img_emb_9
    e = embed.load(tmp_path)
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert (
        np.allclose(e.image, expected, atol=1e-3) and e.text is None and e.keys[10] == "000000010"
    )
    (tmp_path / "metadata").mkdir()
    for i in range(11):
        pd.DataFrame({"image_path": [f"p{i}"]}).to_parquet(
            tmp_path / f"metadata/metadata_{i}.parquet"
        )
    assert embed.load(tmp_path).keys[-1] == "p10"


@pytest.mark.parametrize(("value", "word"), [(np.nan, "not finite"), (0.0, "all zeros")])
def test_bad_row_is_named(tmp_path, value, word):
    rows = np.ones((5, 4), np.float16)
    rows[3] = value
    foreign(tmp_path, {"00": np.ones((2, 4), np.float16), "01": rows})
    with pytest.raises(embed.EmbeddingsError, match=rf"img_emb_01.npy: row 3 .*{word}"):
        embed.load(tmp_path)


def test_missing_and_truncated(tmp_path):
    with pytest.raises(embed.EmbeddingsError, match="img_emb is missing .clip-retrieval"):
        embed.load(tmp_path)
    foreign(tmp_path, {"0": np.ones((5, 4), np.float16)})
    file = tmp_path / "img_emb/img_emb_0.npy"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(embed.EmbeddingsError, match=r"img_emb_0.npy: not a whole"):
        embed.load(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"caption": ["a", "b"]}, "no column key, uid, image_path to name samples .there are capt"),
        ({"key": ["a", None]}, "metadata_1.parquet: row 1 has no key"),
        ({"key": ["a"]}, "metadata_1.parquet has 1 rows, img_emb_1.npy has 2"),
        (None, "metadata: there is no parquet file for img_emb_1.npy"),
        (b"", "metadata_1.parquet: not a whole parquet file"),
    ],
)
@pytest.mark.parametrize("read", [embedding_store.load, embedding_store.index])
def test_broken_metadata_is_named(tmp_path, table, message, read):
    foreign(tmp_path, {i: np.ones((2, 4), np.float16) for i in range(2)})
    (tmp_path / "metadata").mkdir()
    pd.DataFrame({"key": ["c", "d"]}).to_parquet(tmp_path / "metadata/metadata_0.parquet")
    file = tmp_path / "metadata/metadata_1.parquet"
    if isinstance(table, dict):
        pd.DataFrame(table).to_parquet(file)
    elif table is not None:
        file.write_bytes(table)
    with pytest.raises(embed.EmbeddingsError, match=message):
        read(tmp_path)


def test_broken_text_rows_and_numbers_are_named(tmp_path):
    foreign(tmp_path, {"0": np.ones((2, 4), np.float16)})
    (tmp_path / "text_emb").mkdir()
    np.save(tmp_path / "text_emb/text_emb_0.npy", np.ones((3, 4), np.float16))
    with pytest.raises(
        embed.EmbeddingsError, match=r"text_emb_0.npy: 3 text rows, img_emb_0.npy has 2"
    ):
        embed.load(tmp_path)
    np.save(tmp_path / "img_emb/img_emb_00.npy", np.ones((2, 4), np.float16))
    with pytest.raises(embed.EmbeddingsError, match=r"img_emb_00.npy: img_emb_0.npy has the same"):
        embed.load(tmp_path)


def test_an_index_has_the_keys_and_no_row(world):
    run(world)
    index = embedding_store.index(world / "emb/t")
    assert index.keys.tolist() == [f"k{i}" for i in range(7)] and index.shard.tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
    ]
    assert np.array_equal(
        np.concatenate([np.load(path) for path in index.image]), embed.load(world / "emb/t").image
    )
    shutil.rmtree(world / "emb/t/metadata")
    assert embedding_store.index(world / "emb/t").keys.tolist() == [f"{i:09d}" for i in range(7)]


def test_a_shard_and_a_few_of_them(world):
    run(world)
    whole = embed.load(world / "emb/t")
    keys, image, text = embedding_store.load_shard(world / "emb/t", 1)
    assert (
        keys == ["k3", "k4", "k5"]
        and np.array_equal(image, whole.image[3:6])
        and np.array_equal(text, whole.text[3:6])
    )
    some = embed.load(world / "emb/t", limit=6)
    assert some.keys == ["k0", "k1", "k2", "k6"] and some.shard.tolist() == [0, 0, 0, 2]
    assert some.captions == ["picture 0", "picture 1", "picture 2", "picture 0"]
    assert np.array_equal(some.image, whole.image[[0, 1, 2, 6]]) and np.array_equal(
        some.text, whole.text[[0, 1, 2, 6]]
    )
    assert (
        embed.load(world / "emb/t", limit=7).keys == whole.keys
        and len(embed.load(world / "emb/t", limit=1).keys) == 3
    )
    (world / "emb/t/text_emb/text_emb_0001.npy").unlink()
    with pytest.raises(
        embed.EmbeddingsError, match=r"text_emb_0001.npy is missing: run `dvc repro embed` first"
    ):
        embedding_store.load_shard(world / "emb/t", 1)


@pytest.mark.slow
def test_no_file_of_a_folder_stays_open(tmp_path):
    """A web set's embeddings are tens of thousands of files, more than a process may have open."""
    (tmp_path / "img_emb").mkdir()
    rows = np.eye(4, dtype=np.float16)
    for i in range(400):
        np.save(tmp_path / f"img_emb/img_emb_{i}.npy", rows[[i % 4]])
    code = (
        "import resource, sys, numpy; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "from mclip.data.stores import embeddings\n"
        "assert embeddings.load(sys.argv[1]).image.argmax(1).tolist() == [i % 4 for i in range(400)]\n"
        "assert len(embeddings.index(sys.argv[1]).image) == 400"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[1]
    )
