"""The warm process of `mclip.pipeline.warm`: it imports libraries, then forks at every request.

    python -m mclip.pipeline.forks SOCKET LIBRARY...

A request is a message with argv, environment, working folder and the three standard streams of a
process that stands for the fork (`warm.attach`); the answers are the fork's process id and, when it
has ended, its exit status. When that process is gone its fork goes too, with all below it; all go
when stdin closes.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from mclip.pipeline.warm import FORK, NEEDLESS, note, stop


@dataclass
class Child:
    """A fork: who stands for it, where its notes go, and the largest that forks at its time took,
    bytes.

    What a kernel starts (trainings) are forks too, no children of it: their memory counts as the
    kernel's.
    """

    connection: socket.socket
    notes: str
    peak_rss: int = 0


def serve(address: str, libraries: list[str]) -> dict[str, Any] | None:
    """Import, then fork at every request until stdin closes. In a fork: its request; at the end:
    None.
    """
    import gc
    import importlib

    end = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    sys.modules.setdefault(NEEDLESS, None)  # type: ignore[arg-type]
    for name in libraries:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # only now: who asks earlier does better to import for itself, on another core, than to wait
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{address}.draft")
    listener.listen(64)
    os.replace(f"{address}.draft", address)
    gc.collect()
    gc.freeze()  # a fork's collector doesn't go through, and so copy, what all share
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, Child] = {}
    events = selectors.DefaultSelector()
    for source in (listener, end, woken):
        events.register(source, selectors.EVENT_READ)
    while True:
        for key, _ in events.select():
            if key.fileobj == end:
                for pid in children:
                    _end(pid)
                return None
            if key.fileobj == woken:
                os.read(woken, 4096)
                for pid in _ended(children):
                    connection = children.pop(pid).connection
                    with contextlib.suppress(KeyError):
                        events.unregister(connection)
                    connection.close()
            elif key.fileobj is listener:
                request = _fork(listener, children, events, (end, woken, wake))
                if request is not None:
                    return request
            elif (
                key.fileobj.fileno() >= 0
            ):  # not closed just now: who stood for a fork is gone, its family goes too
                events.unregister(key.fileobj)
                for pid in [p for p, c in children.items() if c.connection is key.fileobj]:
                    _end(pid)


def _fork(
    listener: socket.socket, children: dict[int, Child], events: Any, private: tuple[int, ...]
) -> dict[str, Any] | None:
    """Take a request. In its fork, where nothing of the warm process is left open: the request;
    here None.
    """
    connection, _ = listener.accept()
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    if len(descriptors) < 3:
        connection.close()
        return None
    request = json.loads(data)
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        events.close()
        for other in (listener, connection, *(c.connection for c in children.values())):
            other.close()
        for descriptor in private:
            os.close(descriptor)
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
            os.close(descriptor)
        return request
    for descriptor in descriptors:
        os.close(descriptor)
    children[pid] = Child(connection, request["notes"])
    if request["notes"]:
        note(request["notes"], "pid", pid)
    with contextlib.suppress(OSError):
        connection.send(str(pid).encode())
    events.register(connection, selectors.EVENT_READ)
    return None


def _ended(children: dict[int, Child]) -> list[int]:
    """Forks that have ended, their status told and their peak memory noted."""
    found = []
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid in children:
            found.append(pid)
            child = children[pid]
            for other in [child, *(c for c in children.values() if c.notes and not child.notes)]:
                other.peak_rss = max(other.peak_rss, usage.ru_maxrss * 1024)
            if child.notes:
                note(child.notes, "peak_rss", child.peak_rss)
            with contextlib.suppress(OSError):
                child.connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _end(pid: int) -> None:
    """Kill a fork and what is below it; `_ended` hears of it, which must be the one to ask for its
    memory.
    """
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
        stop(below)


def become(request: dict[str, Any]) -> None:
    """A fork turns into what was asked for, and ends as a child of multiprocessing does: not
    through the teardown of all the libraries, which takes a second and lets some of them complain.
    """
    import atexit
    import runpy
    import threading
    import traceback

    os.setsid()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mclip"]:
        del sys.modules[name]  # it may have been edited meanwhile
    os.environ.clear()
    os.environ.update(request["env"] | {FORK: str(os.getpid())})
    os.chdir(request["cwd"])
    module, *arguments = request["argv"]
    sys.argv = [module, *arguments]
    status: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    asked = serve(sys.argv[1], sys.argv[2:])
    if asked is not None:
        become(asked)
