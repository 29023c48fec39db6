"""mclip.distill.lengths: a text tower that skips what no caption reaches has the same features and
gradients.
"""

import pytest
import torch

from mclip import models
from mclip.distill import lengths

CAPTIONS = [
    "a",
    "a photo of a red apple on a wooden table in the garden",
    "grinning face",
    "a cat",
    "flag of a country",
]


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    model, _, _, tokenizer = models.create("demo-student")
    return model.double(), tokenizer(CAPTIONS)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [3], [1, 1], [4, 0, 3]])
def test_features_and_gradients_are_those_of_the_whole_context(student, rows):
    model, tokens = student
    encode, tokens = lengths.text_encoder(model), tokens[rows]
    weight = torch.randn(
        len(rows), 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    found = []
    for each in (model.encode_text, encode):
        model.zero_grad()
        out = each(tokens)
        (out * weight).sum().backward()
        found.append(
            (
                out.detach(),
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            )
        )
    (plain, expected), (short, gradients) = found
    assert torch.allclose(plain, short, rtol=0, atol=1e-12) and gradients.keys() == expected.keys()
    assert all(torch.allclose(gradients[n], expected[n], rtol=0, atol=1e-11) for n in expected)


def test_positions_behind_the_end_are_not_computed(student, monkeypatch):
    model, tokens = student
    seen = []
    model.transformer.register_forward_pre_hook(
        lambda module, args: seen.append(tuple(args[0].shape[:2]))
    )
    lengths.text_encoder(model)(tokens)
    lengths.text_encoder(model)(tokens[:1])
    ends = sorted((tokens.argmax(1) + 1).tolist())
    assert seen == [(4, ends[3]), (1, ends[4]), (1, 3)]


def test_groups_are_the_least_when_padded():
    for seed in range(20):
        length = (
            torch.randint(1, 17, (11,), generator=torch.Generator().manual_seed(seed)).sort().values
        )
        costs = [k * int(length[k - 1]) + (11 - k) * int(length[-1]) for k in range(1, 12)]
        assert costs[lengths.split(length) - 1] == min(costs)


def test_other_towers_are_left_as_they_are():
    model, *_ = models.create("MobileCLIP-S0")  # its tower is not causal
    assert lengths.text_encoder(model) == model.encode_text
