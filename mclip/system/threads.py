"""Run tasks side by side on threads, where each is too small to be split over cores."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(
    work: Callable[[T], R],
    items: Iterable[T],
    device: str | torch.device = "cpu",
    *,
    ahead: int | None = 2,
) -> Iterator[R]:
    """work(item) for every item, in order, without gradients; on the CPU as many at once as torch
    has threads.

    A small network's layers, or a block of rows, are too short to be cut over cores: whole items
    side by side keep all of them busy, also where another process takes one away now and then.
    Each item runs on one thread, so the values are those of a single thread.

    Parameters
    ----------
    work : called in a thread, on one core.
    items : taken in the calling thread, as far as they are needed.
    device : where the work is done; on a GPU this thread does all of it.
    ahead : how many items more than threads are taken before the oldest result is waited for;
        None: all of them, for items that cost little memory and differ in time.
    """
    count = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    work = torch.no_grad()(work)  # in the thread that does the work: the mode is a thread's own
    if count == 1:
        yield from map(work, items)
        return
    waiting: collections.deque[Future[R]] = collections.deque()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(work, item))
                    if ahead is not None and len(waiting) >= count + ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(count)
