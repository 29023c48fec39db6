"""Execute a notebook by papermill in a kernel of its own, and show in the terminal what it says.

The kernel runs this interpreter in this repository, whatever kernels and personal settings the
machine has. It talks over sockets in a private folder, so that concurrent runs never meet; it and
every process below it are stopped when the run ends, is interrupted or is terminated.
"""

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import zmq
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillExecutionError
from papermill.translators import PythonTranslator, papermill_translators

from mclip.pipeline import warm

SIGNALS = [
    signal.Signals[n] for n in ("SIGINT", "SIGTERM", "SIGHUP") if n in signal.Signals.__members__
]


class Terminal:
    """What a running notebook says, on stderr: headings, prints, and the bars of
    `mclip.system.progress`.

    A bar redraws its line with "\\r". Where stderr is a file or a pipe, a line is written once,
    complete; the state of a long bar every 30 s.
    """

    def __init__(self, stream: Any = None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.lock = threading.Lock()
        self.open: dict[str, str] = {}  # source: its unfinished line
        self.shown = time.monotonic()

    def write(self, text: str, source: str = "notebook") -> None:
        with self.lock:
            *lines, rest = (self.open.get(source, "") + text).replace("\r\n", "\n").split("\n")
            self.open[source] = rest.rsplit("\r", 1)[-1] if rest.rstrip("\r") else ""
            for line in lines:
                line = line.rstrip("\r").rsplit("\r", 1)[-1]
                self.stream.write(f"\r\x1b[K{line}\n" if self.live else f"{line}\n")
            pending = self.open[source]
            if pending.strip() and self.live:
                self.stream.write(f"\r\x1b[K{pending}")
            elif pending.strip() and time.monotonic() - self.shown > 30:
                self.stream.write(f"{pending}\n")
                lines = [pending]
            if lines:
                self.shown = time.monotonic()
            self.stream.flush()

    def flush(self) -> None:
        """Part of the file-like interface that papermill wants."""

    def close(self) -> None:
        for source, rest in self.open.items():
            if rest.strip():
                self.write("\n", source)


@contextlib.contextmanager
def follow(path: Path, terminal: Terminal, every: float = 0.1):
    """Copy what processes append to `path` to the terminal, until the block ends."""
    done = threading.Event()

    def copy() -> None:
        with path.open(encoding="utf-8", errors="replace", newline="") as stream:
            while True:
                last = done.is_set()
                if text := stream.read():
                    terminal.write(text, "progress")
                if last:
                    return
                done.wait(every)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def ends_with_dvc(every: float = 1.0):
    """Under DVC: end as by SIGTERM when DVC has ended, or what goes on writes beside the next `dvc
    repro`.
    """
    done, dvc = threading.Event(), _dvc()

    def watch() -> None:
        while not done.wait(every):
            if not _lives(dvc):
                signal.pthread_kill(
                    threading.main_thread().ident, signal.SIGTERM
                )  # to another it would not wake it
                return

    if dvc is not None:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _dvc() -> psutil.Process | None:
    """The DVC whose stage this process is: above the shell that it runs commands in, which has its
    environment.
    """
    if "DVC_STAGE" in os.environ:
        with contextlib.suppress(psutil.Error):
            return next(
                (p for p in psutil.Process().parents() if "DVC_STAGE" not in p.environ()), None
            )
    return None


def kernel_class(folder: Path) -> type:
    """A kernel manager for one run; folder: private, for the connection file, sockets, IPython's
    state.
    """
    env = warm.environment(folder) | {
        "IPYTHONDIR": str(folder / "ipython"),
        "MCLIP_PROGRESS": str(folder / "progress"),
    }
    (folder / "progress").touch()
    # asked once: a warm process may become ready while a kernel starts
    argv = warm.command("ipykernel_launcher", "-f", "{connection_file}", notes=folder)
    forked = argv[1] != "-m"

    class StageKernel(AsyncKernelManager):
        process: psutil.Process | None = None

        def __init__(self, **kwargs: Any):
            super().__init__(**kwargs)
            self.connection_file = str(folder / "kernel.json")
            if (
                zmq.has("ipc") and len(str(folder)) < 80
            ):  # sockets' paths have 100 characters at most
                self.transport = "ipc"

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(argv=argv, display_name="Python 3 (ipykernel)", language="python")

        async def start_kernel(self, **kwargs: Any) -> None:
            await super().start_kernel(**kwargs | {"env": env, "cwd": str(Path.cwd())})
            pid = self.provisioner.pid
            while forked and psutil.pid_exists(pid):  # what was started only stands for the fork
                if (folder / "pid").exists():
                    pid = int((folder / "pid").read_text())
                    break
                await asyncio.sleep(0.05)
            with contextlib.suppress(
                psutil.NoSuchProcess
            ):  # papermill says so of a kernel that died at once
                type(self).process = psutil.Process(pid)

    return StageKernel


def peak_rss_mb(folder: Path) -> int | None:
    """Peak memory of the kernel that has ended, or of the largest process below it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    if (folder / "pid").exists():  # a fork: no child of this process
        for _ in range(40):
            if (folder / "peak_rss").exists():
                peak = int((folder / "peak_rss").read_text())
                break
            time.sleep(0.05)
    return round(peak / 2**20)


class _Readable(PythonTranslator):
    """papermill's injected cell with one key a line."""

    @classmethod
    def translate(cls, val: Any) -> str:
        return readable(val)


def readable(value: Any, indent: int = 0) -> str:
    """value as Python, nested maps one key a line where they don't fit on one."""
    line = repr(value)
    if not isinstance(value, dict) or len(line) + indent <= 88:
        return line
    pad = " " * (indent + 4)
    rows = "".join(f"{pad}{key!r}: {readable(item, indent + 4)},\n" for key, item in value.items())
    return "{\n" + rows + " " * indent + "}"


def execute(
    nb: nbformat.NotebookNode, injected: dict[str, Any], terminal: Terminal
) -> tuple[nbformat.NotebookNode, str | None, int | None]:
    """Run nb with parameters; the notebook as far as it ran, None or the reason why it stopped,
    peak memory in MiB.

    A signal stops the kernel and all below it and then raises KeyboardInterrupt(number of the
    signal).
    """
    folder = Path(tempfile.mkdtemp(prefix="mclip-"))
    kernel = kernel_class(folder)
    source, executed = folder / "source.ipynb", folder / "executed.ipynb"
    source.write_text(nbformat.writes(nb))
    papermill_translators.register("python3", _Readable)
    logging.getLogger("papermill").setLevel(logging.ERROR)

    def heading(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "markdown" and (
            match := re.search(r"^#+ +(.+)$", cell.source, re.MULTILINE)
        ):
            terminal.write(f"  {match[1].strip()}\n")

    def stop(signum: int, frame: Any) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        warm.end_family(kernel.process)
        raise KeyboardInterrupt(signum)

    former = {number: signal.signal(number, stop) for number in SIGNALS}
    reason = None
    try:
        with ends_with_dvc(), follow(folder / "progress", terminal):
            papermill.execute_notebook(
                str(source),
                str(executed),
                injected,
                kernel_name="python3",
                kernel_manager_class=kernel,
                cwd=str(Path.cwd()),
                start_timeout=120,
                record_timing=False,
                progress_bar=False,
                stdout_file=terminal,
                stderr_file=terminal,
                on_cell_start=heading,
                shutdown_kernel="immediate",
            )  # its results are in the notebook and in files
        result = nbformat.read(executed, as_version=4)
        if any(o.output_type == "error" for c in result.cells for o in c.get("outputs", [])):
            reason = "a cell ended early"  # sys.exit(0), which papermill lets pass
    except PapermillExecutionError as err:
        reason = f"{err.ename}: {err.evalue}"
    except RuntimeError as err:  # nbclient's DeadKernelError, and a kernel that doesn't start
        reason = f"the kernel died ({err}); was the machine short of memory?"
    finally:
        warm.end_family(kernel.process)
        terminal.close()
        for number, handler in former.items():
            signal.signal(number, handler)
        result = nbformat.read(executed, as_version=4) if executed.exists() else nb
        peak = peak_rss_mb(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return result, reason, peak
