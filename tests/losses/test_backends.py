"""One name a loss: whichever backend calculates it, the same value and gradients; what auto takes."""

import pytest
import torch

from mclip import losses
from mclip.losses import backends

from .reference import unit

B, D, CLUSTERS = 37, 5, 61  # no multiple of anything
LOSSES = ["clip", "affinity", "instance", "cluster"]


def call(name: str, b: int = B, dtype=torch.float64, **options):
    """A loss by its public name, and what to differentiate it by."""
    image, text, u, v = (unit(b, D, seed=s).to(dtype) for s in range(1, 5))
    scale = torch.tensor(14.3, dtype=dtype, requires_grad=True)
    inputs = [image.requires_grad_(), text.requires_grad_(), scale]
    if name == "clip":
        return losses.clip_loss(image, text, scale, ids=torch.arange(b) // 2, **options), inputs
    if name == "affinity":
        return losses.affinity_loss(image, text, [(u, v, 18.0)] * 2, scale, **options), inputs
    if name == "instance":
        return losses.instance_loss(image, text, u, v, scale, 0.3, **options), inputs
    module = losses.ClusterLoss(unit(CLUSTERS, D, seed=5).to(dtype), 0.5, 0.6, **options)
    return module(image, u, torch.arange(b) % CLUSTERS), [image, module.weight]


@pytest.mark.parametrize("name", LOSSES)
def test_plain_and_tiled_are_the_same_loss(name):
    (plain, inputs), (tiled, same) = (call(name, backend=b) for b in ("plain", "tiled"))
    torch.testing.assert_close(tiled, plain)
    for x, y in zip(
        torch.autograd.grad(tiled, same), torch.autograd.grad(plain, inputs), strict=True
    ):
        torch.testing.assert_close(x, y)


def kept(name: str, b: int, **options) -> int:
    """The most numbers in a tensor that the loss keeps for its backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
        call(name, b, torch.float32, **options)
    return max(sizes)


@pytest.mark.parametrize("name", LOSSES)
def test_auto_keeps_no_matrix_of_a_large_batch(name):
    large, small = backends.TILED_FROM, backends.TILED_FROM - 1
    width = CLUSTERS // 2 if name == "cluster" else small
    assert kept(name, large, backend="plain") >= large * width
    assert kept(name, large) < large * width
    assert kept(name, small) >= small * width  # as plain


@pytest.mark.parametrize("name", LOSSES)
def test_a_backend_that_is_none_or_cannot_run_is_refused(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: expected one of auto, plain, tiled, triton"):
        call(name, backend="torch")
    with pytest.raises(ValueError, match="backend 'triton' needs CUDA tensors, found cpu"):
        call(name, backend="triton")
