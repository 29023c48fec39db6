"""The Triton back end against float64 references: on CUDA where it is, else by Triton's interpreter
on the CPU.

test_triton.py runs these in a process of its own: Triton reads TRITON_INTERPRET once, at its first
import.
"""

import pytest
import torch

from mclip import losses
from mclip.losses import ClusterLoss
from mclip.losses.tiled import clusters, tiles, torch_tiles
from mclip.losses.tiled import pairs as tiled

from . import reference
from .reference import unit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(b: int, d: int, dtype=torch.float64, count=2):
    return [unit(b, d, seed=s).to(DEVICE, dtype).requires_grad_() for s in range(1, count + 1)]


def scalar(value: float, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, device=DEVICE, requires_grad=True)


def teachers(b: int, k: int, dtype=torch.float64):
    return [
        (
            unit(b, 3 + 6 * i, seed=10 + i).to(DEVICE, dtype),
            unit(b, 3 + 6 * i, seed=20 + i).to(DEVICE, dtype),
            s,
        )
        for i, s in zip(range(k), (18.0, 100.0, 40.0), strict=False)
    ]


def agree(got, want, inputs, rtol=1e-9):
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)
    for x, y in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


# tiles of 140 are more than one block of the kernels in both directions, the last of them cut
@pytest.mark.parametrize(("b", "d", "tile"), [(1, 3, 4), (7, 4, 3), (33, 5, 16), (141, 6, 140)])
@pytest.mark.parametrize("shared", [False, True])
def test_clip_loss(b, d, tile, shared):
    a, t, scale = *inputs(b, d), scalar(14.3)
    ids = torch.arange(b, device=DEVICE) // 3 if shared else None
    got = tiled.clip_loss(a, t, scale, ids=ids, tile=tile, backend="triton")
    if b < 10:
        want = reference.nce(a, t, scale, None if ids is None else ids.tolist())
    else:
        want = losses.clip_loss(a, t, scale, ids=ids)
    agree(got, want, [a, t, scale])


@pytest.mark.parametrize(("b", "k", "tile"), [(1, 1, 2), (7, 1, 3), (8, 2, 4), (141, 3, 140)])
def test_affinity_loss(b, k, tile):
    a, t, scale = *inputs(b, 5), scalar(14.3)
    got = tiled.affinity_loss(a, t, teachers(b, k), scale, tile=tile, backend="triton")
    agree(got, losses.affinity_loss(a, t, teachers(b, k), scale), [a, t, scale])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_instance_loss(beta):
    a, t, u, v = inputs(9, 4, count=4)
    scale, ids = scalar(14.3), torch.arange(9, device=DEVICE) // 2
    got = tiled.instance_loss(a, t, u, v, scale, beta, ids=ids, tile=4, backend="triton")
    want = losses.instance_loss(a, t, u, v, scale, beta, ids=ids)
    agree(got, want, [x for x, used in ((a, beta < 1), (t, beta > 0), (scale, True)) if used])


@pytest.mark.parametrize(("b", "k", "tile"), [(1, 1, 4), (9, 6, 4), (4, 150, 145)])
@pytest.mark.parametrize(
    ("reading", "alpha"), [("convex", 0.999), ("convex", 0.0), ("convex", 1.0), ("additive", 0.7)]
)
@pytest.mark.parametrize(
    "options", [{}, {"tau": 0.3, "normalise": True, "teacher_grad": True}], ids=["plain", "all"]
)
def test_cluster_loss(b, k, tile, reading, alpha, options):
    image, teacher = inputs(b, 5)
    labels = (7 * torch.arange(b, device=DEVICE)) % k
    values = []
    for call in (
        lambda m: clusters.cluster_loss(
            m, image, teacher.detach(), labels, tile=tile, backend="triton"
        ),
        lambda m: m(image, teacher.detach(), labels),
    ):
        module = ClusterLoss(unit(k, 5, seed=3), 0.5, alpha, reading, scale=11.0, **options).to(
            DEVICE
        )
        value = call(module)
        values.append((value, *torch.autograd.grad(value, [image, module.weight])))
    for x, y in zip(*values, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)]
)
def test_low_precision_against_float64(dtype, bound):
    """Relative error of value and gradients, at CLIP's scale of 100 and sharp teachers."""
    b, d = 150, 48
    a, t = inputs(b, d, dtype)
    scale = scalar(100.0, torch.float32)
    wide = [x.detach().double().requires_grad_() for x in (a, t, scale)]
    for narrow, exact in [
        (tiled.clip_loss(a, t, scale, tile=64, backend="triton"), losses.clip_loss(*wide)),
        (
            tiled.affinity_loss(a, t, teachers(b, 2, dtype), scale, tile=64, backend="triton"),
            losses.affinity_loss(wide[0], wide[1], teachers(b, 2), wide[2]),
        ),
    ]:
        assert abs(narrow.item() - exact.item()) <= bound * abs(exact.item())
        for x, y in zip(
            torch.autograd.grad(narrow, [a, t, scale]),
            torch.autograd.grad(exact, wide),
            strict=True,
        ):
            assert (x.double() - y).norm() <= bound * y.norm()


def test_one_tile_as_plain_torch_does_it():
    """Rows of nothing but -inf, a transposed tile, statistics of part of the rows, sums onto a
    matrix.
    """
    module = tiles.backend("triton", torch.device(DEVICE))
    t = torch.randn(
        45,
        131,
        dtype=torch.float64,
        device=DEVICE,
        generator=torch.Generator(DEVICE).manual_seed(0),
    )
    t[3] = t[:, 5] = -torch.inf
    for tile in (t, t.T.contiguous().T):
        found = []
        for ops in (module, torch_tiles):
            rows, columns = tiles.running(t, 60), tiles.running(t, 131)
            s = torch.where(tile.isinf(), 0.0, tile) * 0.5
            for _ in range(2):
                ops.add(rows[:, 5:50], columns, tile, scale=1.5)
            means = tiles.running(t, 45)
            ops.add(means, None, s * 3, s, scale=2.0)
            onto = torch.ones_like(s)
            out = ops.softmax(
                s, s.logsumexp(1), s.logsumexp(0), onto=onto, weight=-1 / 3, scale=0.7
            )
            assert out is onto
            found.append((rows, columns, means, out, ops.softmax(s, None, s.logsumexp(0))))
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_which_back_end(monkeypatch):
    from mclip.losses.tiled import triton_tiles

    assert tiles.backend("tiled", torch.device("cpu")) is torch_tiles
    assert tiles.backend("auto", torch.device("cpu")) is torch_tiles
    assert tiles.backend("auto", torch.device("cuda")) is triton_tiles
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend 'triton' needs CUDA tensors, found cpu"):
        tiles.backend("triton", torch.device("cpu"))
    with pytest.raises(
        ValueError, match="backend: expected one of auto, tiled, triton, found 'cuda'"
    ):
        tiled.clip_loss(unit(3, 4), unit(3, 4), 1.0, backend="cuda")
