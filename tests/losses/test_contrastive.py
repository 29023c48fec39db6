import pytest
import torch

from mclip.losses import clip_loss

from .reference import nce as reference
from .reference import unit


@pytest.mark.parametrize(
    ("b", "d", "scale"), [(1, 3, 10.0), (2, 1, 1.0), (7, 5, 14.3), (13, 33, 100.0)]
)
@pytest.mark.parametrize("share", [False, True])
def test_value_and_gradient(b, d, scale, share):
    image, text = unit(b, d, seed=1).requires_grad_(), unit(b, d, seed=2).requires_grad_()
    g = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(b) % 3 if share else None
    got, want = clip_loss(image, text, g, ids=ids), reference(image, text, g, ids)
    torch.testing.assert_close(got, want)
    for x, y in zip(*(torch.autograd.grad(v, [image, text, g]) for v in (got, want)), strict=True):
        torch.testing.assert_close(x, y)


def test_gradcheck():
    args = unit(5, 4, seed=1).requires_grad_(), unit(5, 4, seed=2).requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda a, b, s: clip_loss(a, b, s, ids=ids), (*args, scale))


def test_distinct_ids_change_nothing_and_one_id_leaves_no_negative():
    image, text = unit(6, 4, seed=1), unit(6, 4, seed=2)
    plain = clip_loss(image, text, 10.0)
    torch.testing.assert_close(clip_loss(image, text, 10.0, ids=torch.arange(6)), plain)
    assert clip_loss(image, text, 10.0, ids=torch.zeros(6, dtype=torch.int64)) == 0


def test_order_of_the_batch_does_not_matter():
    image, text, ids = unit(9, 4, seed=1), unit(9, 4, seed=2), torch.arange(9) % 4
    p = torch.randperm(9)
    want = clip_loss(image, text, 9.0, ids=ids)
    torch.testing.assert_close(clip_loss(image[p], text[p], 9.0, ids=ids[p]), want)


def test_autocast_keeps_float32_logits():
    image, text = unit(8, 16, seed=1).float(), unit(8, 16, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = clip_loss(image, text, 100.0)
    torch.testing.assert_close(got, clip_loss(image, text, 100.0))
    assert clip_loss(image.bfloat16(), text.bfloat16(), 100.0).dtype == torch.float32


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (unit(3, 4), unit(3, 5), "image is 4 wide, text is 5"),
        (unit(3, 4), unit(2, 4), "image has 3 rows, text has 2"),
        (torch.zeros(0, 4), torch.zeros(0, 4), "batch is empty"),
        (torch.zeros(4), torch.zeros(4), "image: expected embeddings of shape"),
    ],
)
def test_errors(image, text, message):
    with pytest.raises(ValueError, match=message):
        clip_loss(image, text, 1.0)


def test_wrong_ids():
    with pytest.raises(ValueError, match="ids: expected one id a sample"):
        clip_loss(unit(3, 4), unit(3, 4), 1.0, ids=torch.arange(2))
