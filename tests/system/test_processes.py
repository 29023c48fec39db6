"""Processes that end together."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mclip.system.processes import end_family, end_with_parent

ROOT = Path(__file__).parents[2]
STARTER = """
import multiprocessing, time
from tests.system.test_processes import child
if __name__ == "__main__":
    multiprocessing.get_context("forkserver").Process(target=child).start()
    time.sleep(60)
"""


def child() -> None:
    end_with_parent()
    below = subprocess.Popen(["sleep", "60"], start_new_session=True)
    print(os.getpid(), below.pid, flush=True)
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "family"])
def test_nothing_is_left(tmp_path, end):
    """Of a process, the forkserver's child that it started, and what that one started."""
    (tmp_path / "starter.py").write_text(STARTER)
    starter = subprocess.Popen(
        [sys.executable, "starter.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = map(int, starter.stdout.readline().split())
    family = [psutil.Process(pid) for pid in pids] + psutil.Process(starter.pid).children()
    assert len(family) >= 3
    if end == "killed":
        starter.send_signal(signal.SIGKILL)
    else:
        end_family(starter.pid)
    starter.wait()
    assert psutil.wait_procs(family, timeout=15)[1] == []


@pytest.mark.slow
def test_a_family_that_is_gone():
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    process.join()
    end_family(process.pid)
