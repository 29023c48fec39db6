"""mclip.distill.step: its faster ways give the plain way's values and gradients."""

import copy

import pytest
import torch

from mclip import models
from mclip.distill.step import encode_distinct


def student() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.create("demo-student")[0].double().train()


def gradients_of(model, features, weight) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features, and the gradients of their product with a weight."""
    model.zero_grad()
    out = features()
    (out * weight).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [3, 0, 3, 3, 1, 0, 4], [2, 2, 2]])
def test_a_caption_that_a_batch_has_more_than_once_is_encoded_once(rows):
    model = student()
    tokens = torch.randint(1, 400, (5, 16), generator=torch.Generator().manual_seed(1))[rows]
    weight = torch.randn(len(rows), 256, dtype=torch.double)
    encoded = []

    def encode(tokens):
        encoded.append(len(tokens))
        return model.encode_text(tokens)

    values, gradients = gradients_of(model, lambda: encode_distinct(encode, tokens), weight)
    expected, plain = gradients_of(model, lambda: model.encode_text(tokens), weight)
    assert encoded == [len(set(rows))]
    torch.testing.assert_close(values, expected)
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


@pytest.mark.parametrize("length", [1, 7, 16])
def test_attention_by_matrix_products_is_attention(length):
    model = student()
    fast = copy.deepcopy(model).float()
    tokens = torch.randint(1, 400, (3, length), generator=torch.Generator().manual_seed(1))
    for one in (model, fast):
        one.positional_embedding.data = one.positional_embedding.data[:length]
        one.attn_mask = one.attn_mask[:length, :length]
    weight = torch.randn(3, 256, dtype=torch.double)
    expected, plain = gradients_of(model, lambda: model.encode_text(tokens), weight)
    with models.fast_attention(torch.device("cpu")):
        values, gradients = gradients_of(fast, lambda: fast.encode_text(tokens), weight.float())
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(
            gradients[name].double(), gradient, rtol=1e-3, atol=1e-4, msg=name
        )
