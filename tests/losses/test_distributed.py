"""2 and 4 gloo processes have the loss and the gradients of one with the whole batch; W's rows lie by rank."""

import subprocess
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{world: [each rank's results]}"""
    folder = tmp_path_factory.mktemp("ranks")
    running = [subprocess.Popen([sys.executable, "-m", "tests.losses.ranks", str(folder), str(rank), str(world)])
               for world in (1, 2, 4) for rank in range(world)]
    try:
        assert [p.wait(timeout=300) for p in running] == [0] * 7
    finally:
        for p in running:
            p.kill()
    return {world: [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
            for world in (1, 2, 4)}


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_of_one_process(found, world):
    one, ranks = found[1][0], found[world]
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
            torch.testing.assert_close(got, g, rtol=1e-7, atol=1e-12, msg=f"{name}, gradient {i} of {len(want)}")
