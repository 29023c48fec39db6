"""Two and three gloo processes have the loss and the gradients of one with the whole batch; W's
rows lie by rank.
"""

import subprocess
import sys

import pytest
import torch

from .ranks import WORLDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where three processes left what they found, alone and together."""
    folder = tmp_path_factory.mktemp("ranks")
    running = [
        subprocess.Popen([sys.executable, "-m", "tests.losses.ranks", str(folder), str(rank)])
        for rank in range(max(WORLDS))
    ]
    try:
        assert [p.wait(timeout=300) for p in running] == [0] * len(running)
    finally:
        for p in running:
            p.kill()
    return folder


@pytest.mark.parametrize("world", WORLDS[1:])
def test_loss_and_gradients_of_one_process(folder, world):
    one, *ranks = (
        torch.load(folder / f"{w}-{rank}.pt", weights_only=True)
        for w in (1, world)
        for rank in range(w)
    )
    for name, (loss, *want) in one.items():
        assert loss > 0, name
        for other in ranks:
            torch.testing.assert_close(other[name][0], loss, rtol=1e-9, atol=0, msg=name)
        for i, g in enumerate(want, start=1):
            parts = [other[name][i] for other in ranks]
            if name.startswith("cluster") and i == len(want):
                got = torch.cat(parts)  # W: rows by rank, as they stand
            elif parts[0].shape != g.shape:
                got = torch.cat(parts) / world  # rows of the batch: DDP averages what comes of them
            else:
                got = torch.stack(parts).mean(0)  # a scalar, a projection
            torch.testing.assert_close(
                got, g, rtol=1e-7, atol=1e-12, msg=f"{name}, gradient {i} of {len(want)}"
            )


@pytest.mark.parametrize("origin", WORLDS)
@pytest.mark.parametrize("world", WORLDS)
def test_a_checkpoint_goes_on_with_any_number_of_ranks(folder, origin, world):
    """W, its moments, the state of Omega's generator: as if one process had made all four steps."""
    model, optimizer = torch.load(folder / f"{origin}-then-{world}.pt", weights_only=True)
    want, want_optimizer = torch.load(folder / "1-then-1.pt", weights_only=True)
    start = torch.load(folder / "checkpoint-1.pt", weights_only=True)[0]
    assert model["cluster.weight"].shape == (43, 5) and not torch.equal(
        want["cluster.weight"], start["cluster.weight"]
    )
    for name, value in want.items():
        torch.testing.assert_close(model[name], value, rtol=1e-8, atol=1e-10, msg=name)
    for i, moments in want_optimizer["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(
                optimizer["state"][i][name], value, rtol=1e-6, atol=1e-12, msg=f"{i} {name}"
            )
