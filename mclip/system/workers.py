"""Map a function over independent tasks, on processes of this machine or on a Ray cluster.

    for result in run_tasks(function, tasks, workers=4): ...
    device = worker_device()  # in the function: its worker's part of the machine

`function` belongs to a module (the worker finds it by name), and tasks are tuples of its arguments;
both and the results must be picklable between processes of this package, and the files that
arguments name must be readable there. Results come as they are done. With `ray` (the package, and a
cluster or `ray.init()` before) tasks go to its workers, with one CPU each and a GPU if they ask for
one. They start in the folder of this process: the machines of a cluster must see it, the data and
this package. `pip install ray` is up to you.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

BACKENDS = ("processes", "ray")


class WorkerError(ValueError):
    """A backend is not available, or a number of workers is impossible."""


_place, _of = 0, 1  # this process among the workers


def run_tasks(
    function: Callable,
    tasks: Iterable[tuple],
    *,
    workers: int,
    backend: str = "processes",
    gpu: bool = False,
) -> Iterator[Any]:
    """function(*task) for every task, in the order in which they are done.

    workers : processes; 1 calls the function here. With Ray the cluster's size counts instead.
    gpu : a task of Ray's needs one to itself; processes deal out those that there are.
    """
    if workers < 1:
        raise WorkerError(f"workers: expected at least 1, found {workers}")
    if backend not in BACKENDS:
        raise WorkerError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if backend == "ray":
        yield from _ray(function, tasks, gpu)
    elif workers == 1:
        yield from (function(*task) for task in tasks)
    else:
        context = get_context("spawn")  # not by fork: the caller may have threads of torch or faiss
        places = context.SimpleQueue()
        for place in range(workers):
            places.put(place)
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=_begin, initargs=(places, workers)
        ) as pool:
            futures = [pool.submit(function, *task) for task in tasks]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool:
                raise WorkerError(
                    f"one of {workers} workers was killed (out of memory?): try fewer"
                ) from None
            finally:
                for future in futures:
                    future.cancel()


def is_alone(workers: int, backend: str) -> bool:
    """Is this process the only worker? What it has at hand needn't be handed over then, and all
    cores are its own.
    """
    return workers == 1 and backend == "processes"


def worker_cores() -> int:
    """This worker's part of the machine's cores."""
    return max(1, (os.cpu_count() or 1) // _of)


def worker_device() -> str:
    """Limit this worker to its part of the cores and choose its device: a GPU if there is one."""
    import torch

    if _of > 1:
        torch.set_num_threads(worker_cores())
    return f"cuda:{_place % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def decoding_processes(device: Any, workers: int | None = None) -> int:
    """`workers`, or as many decoding processes as keep an encoder on this device busy.

    On few CPU cores that is none: this thread decodes while others encode (`threads.side_by_side`),
    and ten per cent are gained that processes spend on handing pictures over.

    device : a torch.device or its name.
    """
    if workers is not None:
        return workers
    cores = worker_cores()
    return min(8, cores) if str(device).startswith("cuda") else cores // 8


def _begin(places: Any, of: int) -> None:
    global _place, _of
    _place, _of = places.get(), of


def _there(folder: str, function: Callable, task: tuple) -> Any:
    os.chdir(folder)
    return function(*task)


def _ray(function: Callable, tasks: Iterable[tuple], gpu: bool) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise WorkerError("backend: ray is not installed (pip install ray)") from None
    remote = ray.remote(num_cpus=1, num_gpus=int(gpu))(_there)
    waiting = [remote.remote(os.getcwd(), function, task) for task in tasks]
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1)
        yield ray.get(ready[0])
