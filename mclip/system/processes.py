"""End processes together: a family is a process and all below it, however it was started."""

import contextlib
import multiprocessing
import os
import signal
import threading

import psutil


def end_family(pid: int, grace: float = 3.0) -> None:
    """Terminate a process and all below it; kill those that are left after `grace` seconds.

    torchrun's workers are in sessions of their own, so a signal to the process group does not
    reach them. Of this process's own family everything but this process ends.
    """
    try:
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    family = [member for member in family if member.pid != os.getpid()]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for member in family:
            with contextlib.suppress(psutil.Error):
                end(member)
        family = psutil.wait_procs(family, timeout=grace)[1]


def end_with_parent() -> None:
    """In a process of multiprocessing: end with all below it once the one that started it is gone.

    Unlike `daemon=True` this also holds where that one was killed, and allows processes below.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()  # type: ignore[union-attr]
        end_family(os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)

    if parent is not None:
        threading.Thread(target=wait, daemon=True).start()
