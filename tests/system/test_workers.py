"""mclip.system.workers: tasks over processes and over Ray (a stand-in: the package itself is not
installed).
"""

import os
import signal
import sys
import types

import pytest
import torch

from mclip.system import workers
from mclip.system.workers import WorkerError, run_tasks, worker_device


def about(number):
    return number, os.getpid(), worker_device(), torch.get_num_threads(), os.getcwd()


@pytest.mark.slow
def test_processes_share_the_machine():
    found = sorted(run_tasks(about, [(n,) for n in range(6)], workers=2))
    assert [number for number, *_ in found] == list(range(6))
    assert os.getpid() not in {pid for _, pid, *_ in found}
    if not torch.cuda.is_available():
        assert {(device, threads) for _, _, device, threads, _ in found} == {
            ("cpu", max(1, os.cpu_count() // 2))
        }


def test_one_worker_is_this_process_with_all_its_threads():
    threads = torch.get_num_threads()
    (found,) = run_tasks(about, [(0,)], workers=1)
    assert found[1] == os.getpid() and found[3] == threads


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = []
    for place in range(4):
        monkeypatch.setattr(workers, "_place", place)
        devices.append(worker_device())
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(("of", "cpu", "cuda"), [(1, 2, 8), (4, 0, 4), (100, 0, 1)])
def test_a_worker_decodes_on_its_part_of_the_cores(of, cpu, cuda, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(workers, "_of", of)
    assert [
        workers.decoding_processes("cpu"),
        workers.decoding_processes("cuda:1"),
        workers.decoding_processes("cuda", 3),
    ] == [
        cpu,
        cuda,
        3,
    ]


@pytest.mark.parametrize("gpu", [False, True])
def test_ray_tasks_start_where_this_process_is(gpu, tmp_path, monkeypatch):
    """Its workers start in folders of their own, on machines that see this one."""
    asked = []

    def remote(**resources):
        asked.append(resources)
        return lambda function: types.SimpleNamespace(remote=lambda *task: lambda: function(*task))

    def get(waiting):
        os.chdir("/")
        return waiting()

    ray = types.SimpleNamespace(
        remote=remote, get=get, wait=lambda waiting, num_returns: (waiting[-1:], waiting[:-1])
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.chdir(tmp_path)
    found = list(run_tasks(about, [(n,) for n in range(3)], workers=1, backend="ray", gpu=gpu))
    assert [number for number, *_ in found] == [2, 1, 0] and {cwd for *_, cwd in found} == {
        str(tmp_path)
    }
    assert asked == [{"num_cpus": 1, "num_gpus": int(gpu)}]


def fails(number):
    raise ValueError(f"task {number} can't be done")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_that_fails_says_why(workers):
    with pytest.raises(ValueError, match="task 0 can't be done"):
        list(run_tasks(fails, [(0,)], workers=workers))


def is_killed(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_said():
    with pytest.raises(WorkerError, match="one of 2 workers was killed"):
        list(run_tasks(is_killed, [(0,), (1,)], workers=2))
