"""A command whose notebooks and trainings need not import torch, open_clip and the like each for itself.

    python -m mclip.warm dvc repro

Beside the command one process imports the big libraries, once; every kernel and every training of one process that
the stages start is then a fork of it, which takes milliseconds where the imports take 8-12 s a process on two small
cores. Without this wrapper (a bare `dvc repro`) each imports for itself: the results are the same bytes.

The process ends with the command. It holds no code of this repository, so an edit between two stages counts. Forks are
not for macOS, nor for machines with an NVIDIA GPU, where a library that has asked for devices can't be forked: there
the command runs as if it was called alone.
"""

# nothing heavy at the top: `attach` runs this file for every process that it stands for
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOCKET = "MCLIP_WARM"  # names the socket to the processes below
FORK = "MCLIP_WARM_FORK"  # a fork's own process id
# not matplotlib's inline backend: it ties itself to the kernel that imports it, without one it shows no figure
LIBRARIES = ("torch", "torch._dynamo", "torchvision", "timm", "open_clip", "safetensors.torch",
             "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
             "transformers.models.bert.modeling_bert",
             "scipy.stats", "scipy.optimize", "sklearn.linear_model", "pandas", "pyarrow.parquet", "faiss",
             "webdataset", "PIL.Image", "matplotlib.pyplot", "seaborn", "pydantic", "ruamel.yaml",
             "papermill", "nbconvert", "bs4", "ipykernel.ipkernel", "ipykernel.zmqshell", "tqdm.auto")
# jsonschema, below nbformat, spends 3 s building a grammar with it for a format that notebooks have none of
NEEDLESS = "rfc3987_syntax"

# glibc gives the memory of each large tensor back to the system and faults it in again for the next one: keeping
# it makes encoding pictures on the CPU a tenth faster
REUSE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(10**9), "MALLOC_TRIM_THRESHOLD_": str(10**10)}
# without compiled modules every kernel and every training process spends 15 s longer on its imports
PERSONAL = ("MPLBACKEND", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONDONTWRITEBYTECODE")


def environment(folder: Path) -> dict[str, str]:
    """What a kernel's process is started with; folder: private, for its empty matplotlibrc."""
    env = REUSE_MEMORY | {k: v for k, v in os.environ.items() if k not in PERSONAL}
    (folder / "matplotlibrc").touch()
    return env | {
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), env.get("PYTHONPATH")])),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)]),
        # tqdm.auto, which others import, misses the widgets that a stage's terminal has no use for
        "PYTHONWARNINGS": ",".join(filter(None, [env.get("PYTHONWARNINGS"), "ignore:IProgress not found"])),
        "MATPLOTLIBRC": str(folder / "matplotlibrc"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the kernel's debugger warns on each start
    }


def command(module: str, *arguments: str, notes: Path | None = None) -> list[str]:
    """argv of `python -m MODULE ARGUMENTS...`: a fork of the warm process where there is one.

    notes : a folder where a fork leaves `pid` when it starts and `peak_rss` (bytes) when it has ended.
    """
    if not is_on():
        return [sys.executable, "-m", module, *arguments]
    return [sys.executable, "-I", "-S", __file__, "--attach", str(notes or ""), module, *arguments]


def hand_over(module: str) -> None:
    """Called first thing by a `python -m MODULE`: where there is a warm process, a fork of it goes on in its place."""
    sys.modules.setdefault(NEEDLESS, None)  # type: ignore[arg-type]
    if os.environ.get(FORK) != str(os.getpid()) and is_on():
        os.execv(sys.executable, command(module, *sys.argv[1:]))


def is_on() -> bool:
    """Is there a warm process that is ready, of this interpreter and this repository?"""
    address = os.environ.get(SOCKET)
    with contextlib.suppress(OSError):
        return bool(address) and Path(address).exists() and Path(address).with_name("of").read_text() == _whose()
    return False


def _whose() -> str:
    return f"{sys.executable}\n{Path.cwd()}"


# --- the process that stands for a fork -------------------------------------------------------------------

def attach(notes: str, argv: list[str]) -> int:
    """Have the warm process run a module in this process's environment; its exit status. Signals are passed on."""
    pid = 0

    def forward(number: int, frame: Any) -> None:
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        else:
            raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(os.environ[SOCKET])
        request = {"argv": argv, "env": dict(os.environ), "cwd": os.getcwd(), "notes": notes}
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
        pid = int(connection.recv(64) or 0)
    except OSError:
        pid = 0
    if not pid:  # the warm process is gone: as without it, also for what this one starts
        del os.environ[SOCKET]  # the module would hand over to it again, and so for ever
        if notes:
            _note(notes, "pid", os.getpid())
        os.execv(sys.executable, [sys.executable, "-m", *argv])
    status = int(connection.recv(64) or 1)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


# --- the warm process -------------------------------------------------------------------------------------

@dataclass
class Child:
    """A fork: who stands for it, where its notes go, and the largest that forks at its time took, bytes.

    What a kernel starts (trainings) are forks too, no children of it: their memory counts as the kernel's.
    """

    connection: socket.socket
    notes: str
    peak_rss: int = 0


def serve(address: str, libraries: list[str]) -> dict[str, Any] | None:
    """Import, then fork at every request until stdin closes. In a fork: its request; at the end: None."""
    import gc
    import importlib

    stop = os.dup(0)
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
    for source in (listener, stop, woken):
        events.register(source, selectors.EVENT_READ)
    while True:
        for key, _ in events.select():
            if key.fileobj == stop:
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
                request = _fork(listener, children, events, (stop, woken, wake))
                if request is not None:
                    return request
            elif key.fileobj.fileno() >= 0:  # not closed just now: who stood for a fork is gone, its family goes too
                events.unregister(key.fileobj)
                for pid in [p for p, c in children.items() if c.connection is key.fileobj]:
                    _end(pid)


def _fork(listener: socket.socket, children: dict[int, Child], events: Any,
          private: tuple[int, ...]) -> dict[str, Any] | None:
    """Take a request. In its fork, where nothing of the warm process is left open: the request; here None."""
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
        _note(request["notes"], "pid", pid)
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
                _note(child.notes, "peak_rss", child.peak_rss)
            with contextlib.suppress(OSError):
                child.connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _end(pid: int) -> None:
    """Kill a fork and what is below it; `_ended` hears of it, which must be the one to ask for its memory."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
        _stop(below)


def _note(folder: str, name: str, value: int) -> None:
    with contextlib.suppress(OSError):  # its reader may be gone, and the folder with it
        draft = Path(folder, f".{name}")
        draft.write_text(str(value))
        draft.replace(Path(folder, name))


def become(request: dict[str, Any]) -> None:
    """A fork turns into what was asked for, and ends as a child of multiprocessing does: not through the teardown of
    all the libraries, which takes a second and lets some of them complain."""
    import atexit
    import runpy
    import threading
    import traceback

    os.setsid()
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


def end_family(process: Any) -> None:
    """Stop a psutil.Process and all below it (torchrun's workers too, which are in sessions of their own)."""
    import psutil

    if process is None or not process.is_running():
        return
    with contextlib.suppress(psutil.Error):
        _stop([*process.children(recursive=True), process])


def _stop(processes: list, grace: float = 3.0) -> None:
    """Terminate psutil.Processes, and kill those that are still there after `grace` seconds."""
    import psutil

    for signal_name in ("terminate", "kill"):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                getattr(process, signal_name)()
        processes = psutil.wait_procs(processes, timeout=grace)[1]


# --- the command ------------------------------------------------------------------------------------------

def run(argv: list[str], libraries: list[str]) -> int:
    """Run a command beside a warm process; its exit status."""
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists() or os.environ.get(SOCKET):
        return subprocess.call(argv)
    with tempfile.TemporaryDirectory(prefix="mclip-warm-") as folder:
        address = str(Path(folder, "socket"))
        Path(folder, "of").write_text(_whose())
        # the kernels' own backend, which IPython would set too late for a matplotlib that is there already
        env = environment(Path(folder)) | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        warm = subprocess.Popen([sys.executable, "-m", "mclip.warm", "--serve", address, *libraries], env=env,
                                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                start_new_session=True)
        process = subprocess.Popen(argv, env=os.environ | {SOCKET: address})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the command itself
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: process.send_signal(number))
        try:
            return process.wait()
        finally:
            warm.stdin.close()
            warm.wait()


def main(argv: list[str]) -> int:
    if argv[:1] == ["--attach"]:
        return attach(argv[1], argv[2:])
    if argv[:1] == ["--serve"]:
        request = serve(argv[1], argv[2:])
        if request is not None:
            become(request)
        return 0
    libraries = list(LIBRARIES)
    if argv[:1] == ["--import"]:
        libraries, argv = argv[1].split(","), argv[2:]
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 2 if not argv else 0
    status = run(argv, libraries)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
