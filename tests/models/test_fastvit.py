"""mclip.models.fastvit: the convolutions that crash on some CPUs are replaced, by the same values
and gradients.
"""

import copy

import torch
from torch import nn

from mclip import models
from mclip.models import fastvit


def test_values_gradients_and_parameters_are_those_of_the_convolution():
    torch.manual_seed(0)
    for bias, stride, side in ((True, 2, 7), (False, (2, 3), 8)):
        plain = nn.Sequential(nn.Conv2d(3, 5, 1, stride, bias=bias)).double()
        other = copy.deepcopy(plain)
        assert fastvit.avoid_crash(other) == 1 and fastvit.avoid_crash(other) == 0
        assert other.state_dict().keys() == plain.state_dict().keys()
        x = torch.randn(2, 3, side, side, dtype=torch.float64)
        found = []
        for net in (plain, other):
            own = x.clone().requires_grad_()
            out = net(own)
            out.square().sum().backward()
            found.append([out.detach(), own.grad, *(p.grad for p in net.parameters())])
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*found, strict=True))


def test_only_strided_pointwise_convolutions_of_few_channels_are_replaced():
    kept = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 1, 2),
        nn.Conv2d(3, 8, 3, 2),
        nn.Conv2d(3, 8, 1, 2, padding=1),
    )
    assert fastvit.avoid_crash(kept) == 0


def test_a_mobileclip_like_student_trains_channels_last():
    """Where the convolution crashes this ends the process."""
    torch.manual_seed(0)
    model, *_ = models.create("demo-mci")
    assert sum(isinstance(m, fastvit.StridedPointwise) for m in model.modules()) == 1
    model.train().to(memory_format=torch.channels_last)
    side = models.image_size(model)
    for _ in range(3):
        x = torch.randn(16, 3, side, side).contiguous(memory_format=torch.channels_last)
        model.encode_image(x).square().sum().backward()
    assert all(
        torch.isfinite(p.grad).all() for p in model.visual.parameters() if p.grad is not None
    )
