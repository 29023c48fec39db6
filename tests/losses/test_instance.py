import pytest
import torch

from mclip.losses import clip_loss, instance_loss

from .reference import instance as reference
from .reference import unit


@pytest.mark.parametrize(("b", "d", "beta"), [(1, 3, 0.5), (5, 7, 0.0), (5, 7, 1.0), (11, 3, 0.3)])
@pytest.mark.parametrize("share", [False, True])
def test_value_and_gradient(b, d, beta, share):
    image, text = unit(b, d, seed=1).requires_grad_(), unit(b, d, seed=2).requires_grad_()
    t_image, t_text = unit(b, d, seed=3), unit(b, d, seed=4)
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(b) % 2 if share else None
    got = instance_loss(image, text, t_image, t_text, scale, beta, ids=ids)
    want = reference(image, text, t_image, t_text, scale, beta, ids)
    torch.testing.assert_close(got, want)
    inputs = [x for x, used in ((image, beta < 1), (text, beta > 0), (scale, True)) if used]
    for x, y in zip(*(torch.autograd.grad(v, inputs) for v in (got, want)), strict=True):
        torch.testing.assert_close(x, y)


def test_gradcheck():
    t_image, t_text = unit(4, 3, seed=3), unit(4, 3, seed=4)
    args = unit(4, 3, seed=1).requires_grad_(), unit(4, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: instance_loss(a, b, t_image, t_text, 5.0, 0.3), args
    )


def test_a_student_equal_to_the_teacher_has_the_clip_loss():
    image, text = unit(6, 4, seed=1), unit(6, 4, seed=2)
    want = clip_loss(image, text, 9.0)
    for beta in (0.0, 0.2, 1.0):
        torch.testing.assert_close(instance_loss(image, text, image, text, 9.0, beta), want)


def test_the_teacher_gets_no_gradient():
    image, teacher = unit(3, 4, seed=1).requires_grad_(), unit(3, 4, seed=2).requires_grad_()
    instance_loss(image, image, teacher, teacher, 3.0).backward()
    assert teacher.grad is None


def test_errors():
    with pytest.raises(ValueError, match="teacher_image is 5 wide, text is 4"):
        instance_loss(unit(3, 4), unit(3, 4), unit(3, 5), unit(3, 5), 1.0)
    with pytest.raises(ValueError, match="beta: expected"):
        instance_loss(*[unit(3, 4)] * 4, 1.0, beta=1.5)
    with pytest.raises(ValueError, match="batch is empty"):
        instance_loss(*[torch.zeros(0, 4)] * 4, 1.0)
