import pytest
import torch

from mclip.losses import feature_loss

from .reference import feature as reference
from .reference import unit


def rows(b: int, d: int) -> list[torch.Tensor]:
    """The student's and the teacher's pictures and texts; the student's have gradients."""
    image, text, t_image, t_text = (unit(b, d, seed=seed) for seed in range(1, 5))
    return [image.requires_grad_(), text.requires_grad_(), t_image, t_text]


@pytest.mark.parametrize(("b", "d"), [(1, 3), (5, 7), (11, 2)])
def test_value_and_gradient(b, d):
    given = rows(b, d)
    found, want = feature_loss(*given), reference(*given)
    torch.testing.assert_close(found, want)
    for x, y in zip(*(torch.autograd.grad(v, given[:2]) for v in (found, want)), strict=True):
        torch.testing.assert_close(x, y)


def test_gradcheck():
    image, text, *teacher = rows(4, 3)
    assert torch.autograd.gradcheck(lambda a, b: feature_loss(a, b, *teacher), (image, text))


def test_it_is_two_minus_twice_the_cosine_over_the_width():
    image, text, t_image, t_text = rows(6, 5)
    cosine = (image * t_image).sum(1).mean() + (text * t_text).sum(1).mean()
    torch.testing.assert_close(feature_loss(image, text, t_image, t_text), (4 - 2 * cosine) / 5)


def test_half_precision_is_summed_in_float32():
    half = [x.detach().bfloat16() for x in rows(6, 5)]
    found = feature_loss(*half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, feature_loss(*[x.float() for x in half]))


def test_the_teacher_gets_no_gradient():
    image, text, t_image, t_text = rows(3, 4)
    feature_loss(image, text, t_image.requires_grad_(), t_text.requires_grad_()).backward()
    assert t_image.grad is None and t_text.grad is None and image.grad.abs().sum() > 0


def test_errors():
    with pytest.raises(ValueError, match="image is 4 wide, teacher_image is 5"):
        feature_loss(unit(3, 4), unit(3, 4), unit(3, 5), unit(3, 5))
    with pytest.raises(ValueError, match="image has 3 rows, text has 2"):
        feature_loss(unit(3, 4), unit(2, 4), unit(3, 4), unit(2, 4))
    with pytest.raises(ValueError, match="text: row 0 has norm 2"):
        feature_loss(unit(3, 4), 2 * unit(3, 4), unit(3, 4), unit(3, 4), check_norm=True)
    with pytest.raises(ValueError, match="batch is empty"):
        feature_loss(*[torch.zeros(0, 4)] * 4)
