"""mclip.distill.muon: torch's Muon, to rounding, and torch's AdamW for the rest."""

import pytest
import torch

from mclip.distill.muon import COEFFICIENTS, STEPS, Muon, orthogonal


def plain(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration as published, in float64, on the whole matrix."""
    a, b, c = COEFFICIENTS
    x = matrix.double() / matrix.double().norm()
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (7, 130), (130, 7), (64, 576)])
def test_an_update_is_the_published_iteration(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    torch.testing.assert_close(orthogonal(matrix).double(), plain(matrix), rtol=1e-3, atol=1e-5)
    assert orthogonal(torch.zeros(shape)).eq(0).all()


def test_a_step_is_torchs_muon_for_matrices_and_adamw_for_the_rest():
    start = [torch.randn(s, generator=torch.Generator().manual_seed(0)) for s in ((9, 5), (9,))]
    one, other = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    ours = Muon(
        [
            {"params": one[:1], "momentum": 0.95, "weight_decay": 0.3},
            {"params": one[1:], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    muon = torch.optim.Muon(other[:1], lr=0.01, weight_decay=0.3)
    adamw = torch.optim.AdamW(other[1:], lr=0.01, weight_decay=0.0)
    for step in range(3):
        for parameters in (one, other):
            for i, p in enumerate(parameters):
                generator = torch.Generator().manual_seed(10 * step + i)
                p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in (ours, muon, adamw):
            optimizer.step()
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-3)  # torch's is in bf16
    torch.testing.assert_close(one[1], other[1])
