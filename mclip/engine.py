"""Map a function over independent tasks: processes of this machine, or the workers of a Ray cluster.

    for result in engine.run(function, tasks, workers=4): ...

`function` is one of a module (it is found by name on the other side), tasks are tuples of its arguments; both and the
results must be picklable between processes of this package, and the files that arguments name must be readable there.
Results come as they are done. With `ray` (the package, and a cluster or `ray.init()` before) tasks go to its workers,
one CPU each, and this package must be importable there; `pip install ray` is up to you.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

BACKENDS = ("processes", "ray")


class EngineError(ValueError):
    """A backend that isn't there, or a number of workers that can't be."""


def run(function: Callable, tasks: Iterable[tuple], *, workers: int, backend: str = "processes") -> Iterator[Any]:
    """function(*task) for every task, in the order in which they are done.

    workers : processes; 1 calls the function here. With Ray the cluster's size counts instead.
    """
    if workers < 1:
        raise EngineError(f"workers: expected at least 1, found {workers}")
    if backend not in BACKENDS:
        raise EngineError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if backend == "ray":
        yield from _ray(function, tasks)
    elif workers == 1:
        yield from (function(*task) for task in tasks)
    else:
        # not by fork: the caller may have threads of torch or faiss
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(function, *task) for task in tasks]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()


def _ray(function: Callable, tasks: Iterable[tuple]) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise EngineError("backend: ray is not installed (pip install ray)") from None
    remote = ray.remote(num_cpus=1)(function)
    waiting = [remote.remote(*task) for task in tasks]
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1)
        yield ray.get(ready[0])
