"""A command whose notebooks and trainings need not import torch, open_clip and the like each for
itself.

    python -m mclip.pipeline.warm dvc repro

Beside the command one process imports the big libraries, once; every kernel and every training of
one process that the stages start is then a fork of it, which takes milliseconds where the imports
take 8-12 s a process on two small cores. Without this wrapper (a bare `dvc repro`) each imports for
itself: the results are the same bytes.

The process ends with the command. It holds no code of this repository, so an edit between two
stages counts. Forks are not for macOS, nor for machines with an NVIDIA GPU, where a library that
has asked for devices can't be forked: there the command runs as if it was called alone.
"""

# nothing heavy at the top: `attach` runs this file for every process that it stands for
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # started as a process: an edit of it is one of this module (mclip.pipeline.code)
    from mclip.pipeline import forks  # noqa: F401

SOCKET = "MCLIP_WARM"  # names the socket to the processes below
FORK = "MCLIP_WARM_FORK"  # a fork's own process id
# not matplotlib's inline backend: it ties itself to the kernel that imports it, without one it
# shows no figure
LIBRARIES = (
    "torch",
    "torch._dynamo",
    "torchvision",
    "timm",
    "open_clip",
    "safetensors.torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "scipy.stats",
    "scipy.optimize",
    "sklearn.linear_model",
    "pandas",
    "pyarrow.parquet",
    "faiss",
    "webdataset",
    "PIL.Image",
    "matplotlib.pyplot",
    "seaborn",
    "pydantic",
    "ruamel.yaml",
    "papermill",
    "nbconvert",
    "bs4",
    "ipykernel.ipkernel",
    "ipykernel.zmqshell",
    "tqdm.auto",
)
# jsonschema, below nbformat, spends 3 s building a grammar with it for a format that notebooks have
# none of
NEEDLESS = "rfc3987_syntax"

# glibc gives the memory of each large tensor back to the system and faults it in again for the next
# one: keeping it makes encoding pictures on the CPU a tenth faster
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
        "PYTHONWARNINGS": ",".join(
            filter(None, [env.get("PYTHONWARNINGS"), "ignore:IProgress not found"])
        ),
        "MATPLOTLIBRC": str(folder / "matplotlibrc"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the kernel's debugger warns on each start
    }


def command(module: str, *arguments: str, notes: Path | None = None) -> list[str]:
    """argv of `python -m MODULE ARGUMENTS...`: a fork of the warm process where there is one.

    notes : a folder where a fork leaves `pid` when it starts and `peak_rss` (bytes) when it has
        ended.
    """
    if not is_on():
        return [sys.executable, "-m", module, *arguments]
    return [sys.executable, "-I", "-S", __file__, "--attach", str(notes or ""), module, *arguments]


def hand_over(module: str) -> None:
    """Called first thing by a `python -m MODULE`: where there is a warm process, a fork of it goes
    on in its place.
    """
    sys.modules.setdefault(NEEDLESS, None)  # type: ignore[arg-type]
    if os.environ.get(FORK) != str(os.getpid()) and is_on():
        os.execv(sys.executable, command(module, *sys.argv[1:]))


def is_on() -> bool:
    """Is there a warm process that is ready, of this interpreter and this repository?"""
    address = os.environ.get(SOCKET)
    with contextlib.suppress(OSError):
        return (
            bool(address)
            and Path(address).exists()
            and Path(address).with_name("of").read_text() == _whose()
        )
    return False


def _whose() -> str:
    return f"{sys.executable}\n{Path.cwd()}"


# --- the process that stands for a fork -------------------------------------------------------------------


def attach(notes: str, argv: list[str]) -> int:
    """Have the warm process run a module in this process's environment; its exit status. Signals
    are passed on.
    """
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
            note(notes, "pid", os.getpid())
        os.execv(sys.executable, [sys.executable, "-m", *argv])
    status = int(connection.recv(64) or 1)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def note(folder: str, name: str, value: int) -> None:
    """Leave a number for who looks after a fork."""
    with contextlib.suppress(OSError):  # its reader may be gone, and the folder with it
        draft = Path(folder, f".{name}")
        draft.write_text(str(value))
        draft.replace(Path(folder, name))


def end_family(process: Any) -> None:
    """Stop a psutil.Process and all below it (torchrun's workers too, which are in sessions of
    their own).
    """
    import psutil

    if process is None or not process.is_running():
        return
    with contextlib.suppress(psutil.Error):
        stop([*process.children(recursive=True), process])


def stop(processes: list, grace: float = 3.0) -> None:
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
        # the kernels' own backend, which IPython would set too late for a matplotlib that is there
        # already
        env = environment(Path(folder)) | {
            "MPLBACKEND": "module://matplotlib_inline.backend_inline"
        }
        warm = subprocess.Popen(
            [sys.executable, "-m", "mclip.pipeline.forks", address, *libraries],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        process = subprocess.Popen(argv, env=os.environ | {SOCKET: address})
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # a terminal's Ctrl-C reaches the command itself
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
