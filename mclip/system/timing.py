"""Time several calls in turns, so that a machine that slows down slows all of them."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Literal, TypeVar, get_args

Key = TypeVar("Key", bound=Hashable)
# how a model can be run (mclip.models.latency): here, where the command and the schema can
# ask for the names without torch
Runtime = Literal[
    "unfolded",
    "eager",
    "eager-bf16",
    "compile",
    "compile-bf16",
    "onnxruntime",
    "onnxruntime-int8",
]
RUNTIMES: tuple[str, ...] = get_args(Runtime)


def interleaved(
    calls: Mapping[Key, Callable[[], object]],
    rounds: int,
    warm: int = 0,
    *,
    before: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], None] = lambda: None,
) -> dict[Key, list[float]]:
    """Seconds of `rounds` calls of each: a round calls all of them in turn, every other one
    backwards.

    Parameters
    ----------
    warm : rounds before, which do not count.
    before : calls right before each timed one: what took its turn earlier has left the caches its
        own, and threads that still spin.
    wait : called before the clock is read, such as torch.cuda.synchronize where a call only starts
        its work.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for turn in range(warm + rounds):
        for key in list(calls)[:: -1 if turn % 2 else 1]:
            for _ in range(before):
                calls[key]()
            wait()
            start = clock()
            calls[key]()
            wait()
            if turn >= warm:
                times[key].append(clock() - start)
    return times
