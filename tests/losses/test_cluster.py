import io

import pytest
import torch

from mclip.losses import ClusterLoss

from .reference import cluster as reference
from .reference import unit


def batch(b: int, d: int, k: int):
    labels = torch.randint(k, (b,), generator=torch.Generator().manual_seed(5))
    return unit(b, d, seed=1).requires_grad_(), unit(b, d, seed=2), labels


@pytest.mark.parametrize(("b", "d", "k"), [(1, 3, 1), (1, 4, 7), (9, 5, 6), (4, 7, 31)])
@pytest.mark.parametrize(
    ("reading", "alpha"), [("convex", 0.999), ("convex", 0.4), ("additive", 0.7)]
)
@pytest.mark.parametrize("tau", [None, 0.3])
def test_value_and_gradient(b, d, k, reading, alpha, tau):
    image, teacher, labels = batch(b, d, k)
    loss = ClusterLoss(unit(k, d, seed=3), 1.0, alpha, reading, scale=11.0, tau=tau)
    got = loss(image, teacher, labels)
    want = reference(
        image,
        teacher,
        labels,
        loss.weight,
        list(range(k)),
        alpha,
        reading,
        11.0,
        tau or 1 / 11,
        loss.weight.detach(),
    )
    torch.testing.assert_close(got, want)
    for x, y in zip(
        *(torch.autograd.grad(v, [image, loss.weight]) for v in (got, want)), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_value_and_gradient_over_sampled_centres():
    image, teacher, labels = batch(6, 5, 40)
    args = unit(40, 5, seed=3), 0.2, 0.6
    loss, twin = ClusterLoss(*args, seed=8), ClusterLoss(*args, seed=8)
    omega = twin.sample(labels).tolist()
    got = loss(image, teacher, labels)
    want = reference(
        image,
        teacher,
        labels,
        loss.weight,
        omega,
        0.6,
        "convex",
        20.0,
        1 / 20,
        loss.weight.detach(),
    )
    torch.testing.assert_close(got, want)
    got_grad, want_grad = (torch.autograd.grad(v, loss.weight)[0] for v in (got, want))
    torch.testing.assert_close(got_grad, want_grad)
    outside = sorted(set(range(40)) - set(omega))
    assert not got_grad[outside].any()


def test_gradcheck_and_the_options():
    image, teacher, labels = batch(4, 3, 5)
    loss = ClusterLoss(unit(5, 3, seed=3), 1.0, 0.5, scale=4.0, normalise=True, teacher_grad=True)
    # W off the sphere: normalised rows make its length irrelevant
    w = (loss.weight * 1.7).detach().requires_grad_()
    call = lambda x, w: torch.func.functional_call(loss, {"weight": w}, (x, teacher, labels))  # noqa: E731
    torch.testing.assert_close(call(image, w), loss(image, teacher, labels))
    assert torch.autograd.gradcheck(call, (image, w))


def test_sampling_keeps_positives_counts_and_reruns_the_same():
    labels = torch.tensor([3, 3, 99, 50])
    loss = ClusterLoss(unit(100, 4), 0.1)
    draws = [loss.sample(labels) for _ in range(20)]
    for omega in draws:
        assert set(labels.tolist()) <= set(omega.tolist())
        assert len(omega.unique()) == len(omega) == 3 + round(0.1 * 97)
        assert torch.equal(omega, omega.sort().values)
    assert any(not torch.equal(draws[0], other) for other in draws[1:])
    again = ClusterLoss(unit(100, 4), 0.1)
    assert all(torch.equal(omega, again.sample(labels)) for omega in draws)
    assert len(torch.cat(draws).unique()) > 60  # over steps every centre gets its turn
    assert loss.eval().sample(labels) is None


def test_resume_draws_what_the_run_would_have_drawn():
    labels = torch.tensor([1, 2])
    loss = ClusterLoss(unit(50, 4).float(), 0.2, student_dim=3)
    loss.sample(labels)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = ClusterLoss(unit(50, 4, seed=9).float(), 0.2, student_dim=3, seed=77)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.weight, loss.weight)
    assert torch.equal(other.sample(labels), loss.sample(labels))


def test_projection_of_another_width():
    image, teacher, labels = (
        unit(5, 3, seed=1).requires_grad_(),
        unit(5, 6, seed=2),
        torch.arange(5),
    )
    loss = ClusterLoss(unit(9, 6), 1.0, 0.5, student_dim=3).double()
    got = loss(image, teacher, labels)
    projected = image @ loss.project.weight.T
    projected = projected / projected.norm(dim=1, keepdim=True)
    want = reference(
        projected,
        teacher,
        labels,
        loss.weight,
        list(range(9)),
        0.5,
        "convex",
        20.0,
        1 / 20,
        loss.weight.detach(),
    )
    torch.testing.assert_close(got, want)
    got.backward()
    assert loss.project.weight.grad.abs().sum() > 0
    assert image.grad.abs().sum() > 0
    assert ClusterLoss(unit(9, 6), student_dim=6).project is None


def test_starts_as_the_centres_and_owns_its_copy():
    centres = unit(4, 3)
    loss = ClusterLoss(centres)
    assert torch.equal(loss.weight, centres)
    centres.zero_()
    assert loss.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("image", "teacher", "labels", "message"),
    [
        (unit(2, 5), unit(2, 5), torch.tensor([0, 1]), "image is 5 wide, the cluster centres 4"),
        (unit(2, 4), unit(2, 5), torch.tensor([0, 1]), "image is 4 wide, teacher_image is 5"),
        (
            unit(2, 4),
            unit(2, 4),
            torch.tensor([0, 7]),
            "cluster 7 is out of range, there are 7 centres",
        ),
        (unit(2, 4), unit(2, 4), torch.tensor([-1, 6]), "cluster -1 is out of range"),
        (unit(2, 4), unit(2, 4), torch.tensor([0.0, 1.0]), "labels: expected shape"),
        (unit(2, 4), unit(2, 4), torch.tensor([0]), "labels: expected shape"),
        (torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), "batch is empty"),
    ],
)
def test_errors(image, teacher, labels, message):
    with pytest.raises(ValueError, match=message):
        ClusterLoss(unit(7, 4))(image, teacher, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, "sample_rate"),
        ({"alpha": 2}, "alpha"),
        ({"reading": "both"}, "reading"),
        ({"scale": 0}, "scale"),
        ({"tau": -1.0}, "tau"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ClusterLoss(unit(7, 4), **options)


def test_wrong_student_width():
    with pytest.raises(ValueError, match="student_dim = 3"):
        ClusterLoss(unit(7, 4), student_dim=3)(unit(2, 5), unit(2, 4), torch.tensor([0, 1]))
