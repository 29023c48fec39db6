"""The tiled cluster loss against the module, which tests/losses/test_cluster.py holds against
loops.
"""

import pytest
import torch

from mclip.losses import ClusterLoss
from mclip.losses.tiled import clusters
from mclip.losses.tiled.pairs import How

from .reference import unit


def batch(b: int, d: int, k: int, dtype=torch.float64):
    labels = torch.randint(k, (b,), generator=torch.Generator().manual_seed(5))
    return unit(b, d, seed=1).to(dtype).requires_grad_(), unit(b, d, seed=2).to(dtype), labels


def both(tile: int, image, teacher, labels, centres, *args, **options):
    """Value and gradients (image, W, projection) of the tiled and the plain loss."""
    out = []
    for call in (
        lambda m: clusters.cluster_loss(m, image, teacher, labels, tile=tile),
        lambda m: m(image, teacher, labels),
    ):
        module = ClusterLoss(centres, *args, **options).to(image.dtype)
        value = call(module)
        out.append((value, *torch.autograd.grad(value, [image, *module.parameters()])))
    return out


@pytest.mark.parametrize(
    ("b", "d", "k", "tile"),
    [(1, 3, 1, 4), (1, 4, 7, 2), (9, 5, 6, 4), (4, 7, 31, 8), (6, 3, 5, 99)],
)
@pytest.mark.parametrize(
    ("reading", "alpha"), [("convex", 0.999), ("convex", 0.0), ("convex", 1.0), ("additive", 0.7)]
)
@pytest.mark.parametrize("tau", [None, 0.3])
def test_value_and_gradient(b, d, k, tile, reading, alpha, tau):
    for x, y in zip(
        *both(tile, *batch(b, d, k), unit(k, d, seed=3), 1.0, alpha, reading, scale=11.0, tau=tau),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "options",
    [
        {"normalise": True},
        {"teacher_grad": True},
        {"student_dim": 3},
        {"normalise": True, "teacher_grad": True, "tau": 0.2},
    ],
)
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_options_over_sampled_centres(options, rate):
    image, teacher, labels = batch(7, 5, 40)
    if "student_dim" in options:
        image = unit(7, 3, seed=9).requires_grad_()
        torch.manual_seed(0)
    centres = 1.7 * unit(40, 5, seed=3)  # off the sphere, where its length counts
    found = []
    for tiled in (True, False):
        torch.manual_seed(0)
        module = ClusterLoss(centres, rate, 0.6, seed=8, **options).double()
        value = (
            clusters.cluster_loss(module, image, teacher, labels, tile=4)
            if tiled
            else module(image, teacher, labels)
        )
        found.append(
            (
                value,
                *torch.autograd.grad(value, [image, *module.parameters()]),
                module.get_extra_state(),
            )
        )
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


def test_gradcheck():
    image, teacher, labels = batch(4, 3, 9)
    loss = ClusterLoss(
        unit(9, 3, seed=3), 0.5, 0.5, scale=4.0, tau=0.4, normalise=True, teacher_grad=True
    )
    omega = loss.sample(labels)
    w = (1.7 * loss.weight).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: clusters._Clusters.apply(
            x, w, teacher, labels, omega, loss, How(2, "tiled", None)
        ),
        (image, w),
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_against_float64(dtype, bound):
    """At the paper's alpha, where L_KL is a small difference of large sums."""
    b, d, k = 200, 64, 700
    image, teacher, labels = batch(b, d, k, dtype)
    exact_image = image.detach().double().requires_grad_()
    module, exact = (ClusterLoss(unit(k, d, seed=3).to(t), 1.0) for t in (dtype, torch.float64))
    exact.weight.data.copy_(module.weight.data)
    got = clusters.cluster_loss(module, image, teacher, labels, tile=128)
    want = exact(exact_image, teacher.double(), labels)
    assert abs(got.item() - want.item()) <= bound * abs(want.item())
    for x, y in zip(
        torch.autograd.grad(got, [image, module.weight]),
        torch.autograd.grad(want, [exact_image, exact.weight]),
        strict=True,
    ):
        assert (x.double() - y).norm() <= bound * y.norm()


def test_errors():
    image, teacher, labels = batch(4, 3, 9)
    loss = ClusterLoss(unit(9, 3, seed=3))
    with pytest.raises(ValueError, match="cluster 9 is out of range"):
        clusters.cluster_loss(loss, image, teacher, labels.clamp(max=0) + 9)
    with pytest.raises(ValueError, match="the batch is empty"):
        clusters.cluster_loss(loss, image[:0], teacher[:0], labels[:0])
    with pytest.raises(ValueError, match="the cluster centres 3: give student_dim"):
        clusters.cluster_loss(loss, unit(4, 5), unit(4, 5), labels)
    with pytest.raises(ValueError, match="image is 3 wide, teacher_image is 4"):
        clusters.cluster_loss(loss, image, unit(4, 4), labels)


@pytest.mark.parametrize("options", [{}, {"student_dim": 5}])
def test_rows_off_the_sphere_are_refused_when_asked(options):
    labels, width = torch.tensor([0, 1]), options.get("student_dim", 3)
    loss = ClusterLoss(unit(9, 3, seed=3), check_norm=True, **options).double()
    for call in (loss, lambda *args: clusters.cluster_loss(loss, *args)):
        with pytest.raises(ValueError, match="image: row 0 has norm 3, expected 1"):
            call(3 * unit(2, width), unit(2, 3), labels)
        with pytest.raises(ValueError, match="teacher_image: row 0 has norm 3, expected 1"):
            call(unit(2, width), 3 * unit(2, 3), labels)
        assert call(unit(2, width), unit(2, 3), labels).isfinite()
