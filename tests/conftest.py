"""What all tests share: one thread, the tiny world, and a guard that keeps `make check` fast."""

import functools
import multiprocessing.process
import os
import subprocess

import pytest

# Two pytest processes run side by side, and the products are small: threads would only wait for
# each other. Set before torch is imported; children inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: F401 - importing it starts `ldconfig`, which no test is to blame for


def pytest_collection_modifyitems(items):
    """The pipeline first: it takes one of two workers about as long as all else takes the other."""
    items.sort(key=lambda item: item.get_closest_marker("pipeline") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Only a test marked `slow` or `long` may start a process, its fixtures included."""
    if item.get_closest_marker("slow") or item.get_closest_marker("long"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (subprocess.Popen, "__init__"),
            (multiprocessing.process.BaseProcess, "start"),
        ):
            patch.setattr(owner, name, functools.partialmethod(_refused, item.nodeid))
        return (yield)


def _refused(self, test, *args, **options):
    pytest.fail(f"{test} starts a process ({args or self}): mark it @pytest.mark.slow")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny world's folder; `world / "pairs"` and so on (tests/world.py)."""
    from tests.world import write_world

    root = tmp_path_factory.mktemp("world")
    write_world(root)
    return root


@pytest.fixture
def training_set(world):
    """training_set("kept", True, teacher="large", ...) -> TrainingSet over the tiny world."""
    from tests.world import make_training_set

    return functools.partial(make_training_set, world)


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> str:
    """Model string of a tiny student."""
    from tests.world import write_student

    return write_student(tmp_path_factory.mktemp("student"))
