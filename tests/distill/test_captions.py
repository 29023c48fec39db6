"""mclip.distill.captions: what is kept says what was read and tokenised, and is read and tokenised
once.
"""

import json

import open_clip
import pytest
import torch

from mclip import models
from mclip.data import shards
from mclip.distill import captions, targets
from mclip.distill.pairs import open_pairs

TOKENIZER = open_clip.get_tokenizer("ViT-B-32", context_length=8)
TEXTS = ["a red apple", "two cats, on a mat; with more words than it holds", "\N{GRINNING FACE}"]


def read(pairs, cache):
    return list(
        zip(
            *captions.read_captions(str(pairs), cache, shards.read_manifest(pairs)),
            strict=True,
        )
    )


def test_captions_are_read_once(world, tmp_path, monkeypatch):
    expected = [(s.key, s.caption) for s in shards.iter_samples(world / "pairs")]
    assert read(world / "pairs", tmp_path) == expected
    monkeypatch.setattr(shards, "iter_samples", None)
    assert read(world / "pairs", tmp_path) == expected


def test_captions_of_other_shards_are_read_again(world, tmp_path):
    read(world / "pairs", tmp_path / "cache")
    samples = [s._replace(caption="NA") for s in shards.iter_samples(world / "pairs")][:2]
    shards.write_shards(samples, tmp_path / "pairs", shard_size=2)
    expected = [(s.key, "NA") for s in samples]
    assert read(tmp_path / "pairs", tmp_path / "cache") == expected


@pytest.mark.slow
def test_tokens_are_made_once(tmp_path):
    calls = []

    class Counting:
        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

        def __call__(self, texts):
            calls.append(len(texts))
            return TOKENIZER(texts)

    counting = Counting()
    assert captions._identity(counting) is None  # any other tokenizer is asked each time
    for _ in range(2):
        assert torch.equal(captions.tokenise(TEXTS, counting, tmp_path), TOKENIZER(TEXTS).int())
    assert calls == [3, 3] and not list(tmp_path.iterdir())
    first = captions.tokenise(TEXTS, TOKENIZER, tmp_path)
    (file,) = tmp_path.glob("tokens-*.npy")
    stamp = file.stat().st_mtime_ns
    assert (
        torch.equal(captions.tokenise(TEXTS, TOKENIZER, tmp_path), first)
        and file.stat().st_mtime_ns == stamp
    )
    assert torch.equal(first, TOKENIZER(TEXTS).int())
    captions.tokenise(TEXTS, open_clip.get_tokenizer("ViT-B-32", context_length=9), tmp_path)
    captions.tokenise(TEXTS[:2], TOKENIZER, tmp_path)
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 3


@pytest.mark.slow
def test_the_student_s_own_tokenizer_is_one_whose_tokens_are_kept():
    assert json.dumps(captions._identity(models.create("demo-student")[3]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", "kept"])
def test_kept_tokens_are_those_of_the_captions(kind, training_set, tmp_path):
    spec = training_set(kind)
    for _ in range(2):
        side = targets.load_side(open_pairs(spec))
        targets.add_tokens(side, TOKENIZER, synthetic=False, cache=str(tmp_path))
        assert torch.equal(side.arrays["tokens"][:, 0], TOKENIZER(side.captions).int())
        assert side.arrays["ids"][:, 0].tolist() == [captions.caption_id(c) for c in side.captions]
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 1
