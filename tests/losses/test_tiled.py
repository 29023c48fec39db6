"""The tiled losses against the loops of tests/losses/reference.py and the plain losses."""

import pytest
import torch

from mclip import losses
from mclip.losses.tiled import pairs as tiled

from . import reference
from .reference import unit


def teachers(b: int, widths=(3, 9), scales=(18.0, 100.0)):
    return [
        (unit(b, d, seed=10 + k), unit(b, d, seed=20 + k), s)
        for k, (d, s) in enumerate(zip(widths, scales, strict=True))
    ]


def inputs(b: int, d: int, dtype=torch.float64):
    rows = [unit(b, d, seed=s).to(dtype).requires_grad_() for s in (1, 2)]
    return *rows, torch.tensor(
        14.3, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True
    )


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize(
    ("b", "d", "tile"), [(1, 3, 4), (7, 4, 3), (8, 5, 4), (11, 17, 100), (5, 2, 1)]
)
@pytest.mark.parametrize("shared", [False, True])
def test_clip_loss_against_loops(b, d, tile, shared):
    a, t, scale = inputs(b, d)
    ids = torch.arange(b) // 2 if shared else None
    got = tiled.clip_loss(a, t, scale, ids=ids, tile=tile)
    want = reference.nce(a, t, scale, None if ids is None else ids.tolist())
    torch.testing.assert_close(got, want)
    for x, y in zip(gradients(got, a, t, scale), gradients(want, a, t, scale), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("b", "d", "k", "tile"), [(1, 3, 1, 2), (7, 4, 1, 3), (8, 5, 2, 4), (11, 17, 2, 100)]
)
def test_affinity_loss_against_loops(b, d, k, tile):
    a, t, scale = inputs(b, d)
    got = tiled.affinity_loss(a, t, teachers(b)[:k], scale, tile=tile)
    want = reference.affinity(a, t, teachers(b)[:k], scale)
    torch.testing.assert_close(got, want)
    for x, y in zip(gradients(got, a, t, scale), gradients(want, a, t, scale), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("b", "d", "tile"), [(1, 3, 2), (7, 4, 3), (9, 6, 100)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shared", [False, True])
def test_instance_loss_against_loops(b, d, tile, beta, shared):
    a, t, scale = inputs(b, d)
    u, v = unit(b, d, seed=3).requires_grad_(), unit(b, d, seed=4).requires_grad_()
    ids = torch.arange(b) // 2 if shared else None
    got = tiled.instance_loss(a, t, u, v, scale, beta, ids=ids, tile=tile)
    want = reference.instance(
        a, t, u.detach(), v.detach(), scale, beta, None if ids is None else ids.tolist()
    )
    torch.testing.assert_close(got, want)
    used = [x for x, used in ((a, beta < 1), (t, beta > 0), (scale, True)) if used]
    for x, y in zip(gradients(got, *used), gradients(want, *used), strict=True):
        torch.testing.assert_close(x, y)
    assert torch.autograd.grad(tiled.instance_loss(a, t, u, v, scale), u, allow_unused=True) == (
        None,
    )


@pytest.mark.slow
def test_gradcheck():
    a, t, scale = inputs(5, 3)
    ids = torch.tensor([0, 1, 0, 2, 3])
    assert torch.autograd.gradcheck(lambda *x: tiled.clip_loss(*x, ids=ids, tile=2), (a, t, scale))
    assert torch.autograd.gradcheck(
        lambda x, y, s: tiled.affinity_loss(x, y, teachers(5), s, tile=2), (a, t, scale)
    )


def test_every_other_sample_shares_the_caption():
    a, t, scale = inputs(6, 4)
    loss = tiled.clip_loss(a, t, scale, ids=torch.zeros(6, dtype=torch.int64), tile=4)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert all(g.abs().max() < 1e-12 for g in gradients(loss, a, t, scale))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_against_float64(dtype, bound):
    """Relative error of value and gradients, at CLIP's scale of 100 and sharp teachers."""
    b, d = 300, 64
    a, t, _ = inputs(b, d, dtype)
    scale = torch.tensor(100.0, requires_grad=True)
    wide = [x.detach().double().requires_grad_() for x in (a, t, scale)]
    for narrow, exact in [
        (tiled.clip_loss(a, t, scale, tile=128), losses.clip_loss(*wide)),
        (
            tiled.affinity_loss(a, t, teachers(b, (8, 8)), scale, tile=128),
            losses.affinity_loss(wide[0], wide[1], teachers(b, (8, 8)), wide[2]),
        ),
    ]:
        assert abs(narrow.item() - exact.item()) <= bound * abs(exact.item())
        for x, y in zip(gradients(narrow, a, t, scale), gradients(exact, *wide), strict=True):
            assert (x.double() - y).norm() <= bound * y.norm()


def test_errors():
    x = unit(3, 4)
    with pytest.raises(ValueError, match="ids: expected one id a sample"):
        tiled.clip_loss(x, x, 1.0, ids=torch.zeros(2))
    with pytest.raises(ValueError, match="they must be pairs"):
        tiled.clip_loss(x, unit(2, 4), 1.0)
    with pytest.raises(ValueError, match=r"teachers\[0\] has 2 rows"):
        tiled.affinity_loss(x, x, [(unit(2, 4), unit(2, 4), 1.0)], 1.0)
    with pytest.raises(ValueError, match="at least one"):
        tiled.affinity_loss(x, x, [], 1.0)
    with pytest.raises(ValueError, match="beta: expected a number from 0 to 1, found 1.5"):
        tiled.instance_loss(x, x, x, x, 1.0, 1.5)
    with pytest.raises(ValueError, match="image: the batch is empty"):
        tiled.clip_loss(x[:0], x[:0], 1.0)
    with pytest.raises(ValueError, match=r"teachers\[0\] image is 4 wide, teachers\[0\] text is 5"):
        tiled.affinity_loss(x, x, [(x, unit(3, 5), 1.0)], 1.0)
    with pytest.raises(ValueError, match="tile: expected at least 1, found 0"):
        tiled.clip_loss(x, x, 1.0, tile=0)


@pytest.mark.parametrize("module", [losses, tiled])
def test_rows_off_the_sphere_are_refused_when_asked(module):
    x, bad = unit(3, 4), unit(3, 4)
    bad[1] *= 2.5
    nan = unit(3, 4)
    nan[2, 0] = torch.nan
    for a, t, u, named in ((bad, x, x, "image"), (x, bad, x, "text"), (x, x, bad, "teacher_image")):
        said = rf"{named}: row 1 has norm 2.5, expected 1; torch\.nn\.functional\.normalize"
        if u is x:
            with pytest.raises(ValueError, match=said):
                module.clip_loss(a, t, 1.0, check_norm=True)
        with pytest.raises(ValueError, match=said):
            module.instance_loss(a, t, u, x, 1.0, check_norm=True)
        with pytest.raises(ValueError, match=said.replace("teacher_image", r"teachers\[0\] image")):
            module.affinity_loss(a, t, [(u, x, 1.0)], 1.0, check_norm=True)
    with pytest.raises(ValueError, match="image: row 2 has norm nan"):
        module.clip_loss(nan, x, 1.0, check_norm=True)
    good = x.bfloat16()
    assert module.clip_loss(good, good, 1.0, check_norm=True) == module.clip_loss(good, good, 1.0)
    assert module.clip_loss(bad, x, 1.0) > 0  # nobody asked


def test_autocast_does_not_halve_the_products():
    a, t = (unit(8, 16, seed=s).float() for s in (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        got = tiled.clip_loss(a, t, 100.0, tile=4)
    torch.testing.assert_close(got, losses.clip_loss(a, t, 100.0))
