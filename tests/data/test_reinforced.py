"""mclip.data.stores.reinforced: what is written is read; broken parts are named; the published
layout is read.
"""

import gzip
import io
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save

from mclip.data.stores import codecs, reinforced


def shard(n=3):
    return reinforced.Shard(
        keys=[f"k{i}" for i in range(n)],
        captions=["a"] * n,
        syn_text=[["x", "y"]] * n,
        augment=np.arange(n * 2 * 8, dtype=np.float32).reshape(n, 2, 8),
        image_emb=torch.randn(n, 2, 6).bfloat16(),
        text_emb=torch.randn(n, 3, 6).bfloat16(),
    )


def test_round_trip_and_equal_bytes(tmp_path):
    written = shard()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        reinforced.write_shard(tmp_path / folder, 7, written)
    read = reinforced.read_shard(tmp_path / "a", 7)
    assert read.keys == written.keys and read.syn_text == written.syn_text
    assert np.array_equal(read.augment, written.augment) and torch.equal(
        read.image_emb, written.image_emb
    )
    for a, b in zip(
        reinforced.paths(tmp_path / "a", 7), reinforced.paths(tmp_path / "b", 7), strict=True
    ):
        assert a.read_bytes() == b.read_bytes()


def test_bf16_is_stored_as_it_always_was(tmp_path):
    written = shard()
    reinforced.write_shard(tmp_path, 0, written)
    content = {
        "augment": torch.from_numpy(written.augment),
        "image_emb": written.image_emb,
        "text_emb": written.text_emb,
    }
    assert reinforced.paths(tmp_path, 0)[0].read_bytes() == save(content)
    codec, rows = codecs.get("bf16"), torch.randn(5, 7)
    stored = codec.encode(rows)
    assert torch.equal(codec.decode(stored), rows.bfloat16())
    assert sum(t.nbytes for t in stored.values()) == 5 * codec.bytes_a_row(7)


HALVES = '''
"""Twice the rows, and a half for each number beside them: two tensors, as int8 with a scale has."""

import torch


def encode(rows):
    return {"": (2 * rows.float()).half(), "_scale": torch.full(rows.shape, 0.5)}


def decode(stored):
    return stored[""].float() * stored["_scale"]


def bytes_a_row(width):
    return 6 * width
'''


def test_a_codec_is_a_file_and_its_name_is_stored(tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(HALVES)
    monkeypatch.setattr(codecs, "__path__", [*codecs.__path__, str(tmp_path)])
    assert codecs.names() == ["bf16", "halves"]
    written = shard()
    reinforced.write_shard(tmp_path, 0, written, "halves")
    read = reinforced.read_shard(tmp_path, 0)
    assert torch.equal(read.image_emb, written.image_emb.float())
    assert torch.equal(read.text_emb, written.text_emb.float())
    del sys.modules["mclip.data.stores.codecs.halves"], codecs.halves


def test_an_unknown_codec_is_refused(tmp_path):
    assert "bf16" in codecs.names()
    with pytest.raises(ValueError, match="codec: expected one of .*bf16.*, found 'zip'"):
        reinforced.write_shard(tmp_path, 0, shard(), "zip")


def test_missing_and_unequal_parts(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"reinforced_0000.safetensors is missing: run `dvc repro reinforce`",
    ):
        reinforced.read_shard(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match=r"meta.json"):
        reinforced.read_meta(tmp_path)
    reinforced.write_shard(tmp_path, 0, shard(3))
    reinforced.write_shard(tmp_path, 1, shard(2))
    reinforced.paths(tmp_path, 1)[1].rename(reinforced.paths(tmp_path, 0)[1])
    with pytest.raises(ValueError, match="2 rows, but reinforced_0000.safetensors has 3"):
        reinforced.read_shard(tmp_path, 0)


PAUG = [[[1, 2, 10, 12], [[1, 0.3], [6, -0.2]]]]


@pytest.mark.parametrize("as_string", [True, False])
@pytest.mark.parametrize("form", ["npz", "pth.gz"])
def test_published_sample(as_string, form):
    image, text = np.ones((1, 4), np.float32), np.zeros((3, 4), np.float32)
    buffer = io.BytesIO()
    if form == "npz":
        np.savez(buffer, image_emb=image, text_emb=text)
        payload = buffer.getvalue()
    else:
        torch.save(
            {
                "image_emb": torch.from_numpy(image).bfloat16(),
                "text_emb": torch.from_numpy(text).bfloat16(),
            },
            buffer,
        )
        payload = gzip.compress(buffer.getvalue())
    sample = {
        "__key__": "k",
        "syn.json": json.dumps({"syn_text": ["a", "b"]}).encode(),
        form: payload,
        "paug.json": json.dumps({"param_aug": json.dumps(PAUG) if as_string else PAUG}).encode(),
    }
    got = reinforced.from_published_sample(sample)
    assert got["syn_text"] == ["a", "b"] and got["augment"].shape == (1, 8)
    assert np.array_equal(got["image_emb"], image) and got["text_emb"].shape == (3, 4)
    with pytest.raises(KeyError, match=r"no \.paug\.json"):
        reinforced.from_published_sample({k: v for k, v in sample.items() if k != "paug.json"})
    with pytest.raises(KeyError, match="neither"):
        reinforced.from_published_sample({k: v for k, v in sample.items() if k != form})
