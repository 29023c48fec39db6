import pytest
import torch

from mclip.losses import affinity_loss

from .reference import affinity as reference
from .reference import unit


def teachers(b: int, widths=(3, 9), scales=(18.0, 100.0)):
    return [
        (unit(b, d, seed=10 + k), unit(b, d, seed=20 + k), s)
        for k, (d, s) in enumerate(zip(widths, scales, strict=True))
    ]


@pytest.mark.parametrize(("b", "d", "k"), [(1, 3, 1), (2, 5, 2), (7, 4, 1), (11, 17, 2)])
def test_value_and_gradient(b, d, k):
    image, text = unit(b, d, seed=1).requires_grad_(), unit(b, d, seed=2).requires_grad_()
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    got = affinity_loss(image, text, teachers(b)[:k], scale)
    want = reference(image, text, teachers(b)[:k], scale)
    torch.testing.assert_close(got, want)
    for x, y in zip(
        *(torch.autograd.grad(v, [image, text, scale]) for v in (got, want)), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_gradcheck():
    args = unit(4, 3, seed=1).requires_grad_(), unit(4, 3, seed=2).requires_grad_()
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b, s: affinity_loss(a, b, teachers(4), s), (*args, scale)
    )


def test_zero_where_the_student_equals_the_teacher_and_positive_elsewhere():
    image, text = unit(6, 4, seed=1).requires_grad_(), unit(6, 4, seed=2)
    loss = affinity_loss(image, text, [(image.detach(), text, 18.0)], 18.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert image.grad.abs().max() < 1e-12
    assert affinity_loss(image, text, teachers(6), 18.0) > 0


def test_peaked_teachers_stay_finite():
    image, text = unit(6, 4, seed=1).float(), unit(6, 4, seed=2).float()
    assert torch.isfinite(affinity_loss(image, text, [(image, image, 1e4)], 100.0))


def test_shared_captions_are_left_to_the_targets():
    image, text, ids = unit(5, 4, seed=1), unit(5, 4, seed=2), torch.zeros(5, dtype=torch.int64)
    plain = affinity_loss(image, text, teachers(5), 9.0)
    assert affinity_loss(image, text, teachers(5), 9.0, ids=ids) == plain


def test_errors():
    x = unit(3, 4)
    with pytest.raises(ValueError, match="teachers: at least one"):
        affinity_loss(x, x, [], 1.0)
    with pytest.raises(ValueError, match=r"teachers\[0\] image is 4 wide, teachers\[0\] text is 5"):
        affinity_loss(x, x, [(x, unit(3, 5), 1.0)], 1.0)
    with pytest.raises(ValueError, match=r"teachers\[1\] has 2 rows"):
        affinity_loss(x, x, [(x, x, 1.0), (unit(2, 4), unit(2, 4), 1.0)], 1.0)
    with pytest.raises(ValueError, match="batch is empty"):
        affinity_loss(torch.zeros(0, 4), torch.zeros(0, 4), [(x, x, 1.0)], 1.0)
