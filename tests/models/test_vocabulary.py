"""mclip.models.vocabulary: CLIP's tokenizer with its first merges, which open_clip alone loads."""

import json

import open_clip
import pytest
import torch

from mclip import models
from mclip.models.vocabulary import small_tokenizer

TEXTS = [
    "a photo of a red apple, it's ripe!",
    "Ein Käse-Brötchen für 12,50 €",
    "crème brûlée 日本 \U0001f600 U+1F600",
    "under_score :smiling_face_with_hearts: file-name.PNG  two   spaces",
    "",
    "supercalifragilisticexpialidocious " * 9,
]


@pytest.mark.parametrize("size", [515, 1000, 12288, 49409])
def test_tokens_are_those_of_clips_first_merges(size):
    clip = open_clip.SimpleTokenizer(context_length=24)
    merges = list(clip.bpe_ranks)[: size - 515]
    clip.bpe_ranks = {merge: i for i, merge in enumerate(merges)}
    tokens = small_tokenizer(size, 24)(TEXTS)
    assert tokens.shape == (len(TEXTS), 24) and tokens.max() == size - 1
    # one more in front, <pad>; the end and the start last
    expected = clip(TEXTS)
    for row, other in zip(tokens.tolist(), expected.tolist(), strict=True):
        end = row.index(size - 1)
        assert row[0] == size - 2 and row[end + 1 :] == [0] * (23 - end)
        assert row[1:end] == [t + 1 for t in other[1:end]] and other[end] == clip.eot_token_id


@pytest.mark.parametrize("size", [514, 49410])
def test_a_vocabulary_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match=f"vocab_size: expected 515 to 49409, found {size}"):
        small_tokenizer(size, 8)


@pytest.mark.parametrize("name", ["demo-student", "demo-mci", "demo-vit"])
def test_open_clip_alone_loads_a_student_with_its_tokenizer(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, _, _, tokenizer = models.create(name)
    folder = models.export(model, tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    alone, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    same = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert torch.equal(same(TEXTS), tokenizer(TEXTS))
    with torch.no_grad():
        assert torch.equal(
            alone.eval().encode_text(same(TEXTS)), model.encode_text(tokenizer(TEXTS))
        )
    size = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert alone.token_embedding.num_embeddings == size["vocab_size"] == tokenizer(TEXTS).max() + 1
    ours, _, _, again = models.create(f"local-dir:{folder}")
    assert torch.equal(again(TEXTS), same(TEXTS))
    models.export(ours, tmp_path / "copy")
    assert torch.equal(models.create(f"local-dir:{tmp_path / 'copy'}")[3](TEXTS), same(TEXTS))
