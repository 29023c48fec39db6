"""mclip.distill.vocabulary: a token table cut to the captions' rows says what the whole one says."""

import copy

import open_clip
import pytest
import torch

from mclip import models
from mclip.distill import vocabulary


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return models.create("demo-student")[0].eval()


@pytest.fixture(scope="module")
def tokens():
    return open_clip.tokenize(["a red apple", "two cats on a mat", "an apple"], context_length=16)


def test_the_same_embeddings_before_and_after(student, tokens):
    own = copy.deepcopy(student)
    with torch.no_grad():
        expected = student.encode_text(tokens)
        kept = vocabulary.shrink(own, [tokens[:2], tokens[2:]])
        assert own.token_embedding.weight.shape == (len(tokens.unique()) + 1, 128)
        assert own.token_embedding.weight.requires_grad
        assert torch.equal(own.encode_text(kept.tokens(tokens)), expected)
        assert kept.tokens(tokens.int()).dtype == torch.int32
        kept.restore(own)
        assert torch.equal(own.encode_text(tokens), expected)
    assert all(torch.equal(v, own.state_dict()[k]) for k, v in student.state_dict().items())


def test_the_rest_decays_as_its_witness_did(student, tokens):
    own = copy.deepcopy(student)
    kept = vocabulary.shrink(own, [tokens])
    with torch.no_grad():
        own.token_embedding.weight[kept.witness] *= 0.25
        own.token_embedding.weight[kept.tokens(tokens).long().flatten()] += 1.0
        kept.restore(own)
    used = torch.zeros(49408, dtype=torch.bool)
    used[tokens.unique()] = True
    before, after = student.token_embedding.weight, own.token_embedding.weight
    torch.testing.assert_close(after[~used], 0.25 * before[~used])
    torch.testing.assert_close(after[used], before[used] + 1.0)
    assert own.token_embedding.num_embeddings == 49408


def test_a_tower_that_its_end_token_matters_to_is_left_alone(student, tokens):
    own = copy.deepcopy(student)
    own.text_pool_type = "eos"
    assert vocabulary.shrink(own, [tokens]) is None
    assert len(own.token_embedding.weight) == 49408


def test_captions_that_use_most_tokens_leave_the_table_whole(student):
    own = copy.deepcopy(student)
    assert vocabulary.shrink(own, [torch.arange(30000)]) is None
    assert len(own.token_embedding.weight) == 49408


@pytest.mark.slow
def test_a_text_tower_of_its_own(tokens):
    torch.manual_seed(0)
    own = models.create("MobileCLIP-S0")[0].eval()
    wide = open_clip.tokenize(["a red apple", "two cats"])
    with torch.no_grad():
        expected = own.encode_text(wide)
        kept = vocabulary.shrink(own, [wide])
        assert len(own.text.token_embedding.weight) < 20
        torch.testing.assert_close(own.encode_text(kept.tokens(wide)), expected)
        kept.restore(own)
        torch.testing.assert_close(own.encode_text(wide), expected)
