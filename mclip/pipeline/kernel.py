"""Execute a notebook by papermill in a kernel of its own, and show in the terminal what it says.

The kernel runs this interpreter in this repository, whatever kernels and personal settings the
machine has. It talks over sockets in a private folder, so that concurrent runs never meet; it and
every process below it are stopped when the run ends, is interrupted or is terminated.
"""

import contextlib
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.translators import PythonTranslator, papermill_translators

from mclip.system.processes import end_family

SIGNALS = [
    signal.Signals[n] for n in ("SIGINT", "SIGTERM", "SIGHUP") if n in signal.Signals.__members__
]
# glibc gives the memory of each large tensor back to the system and faults it in again for the next
# one: keeping it makes encoding pictures on the CPU a tenth faster
REUSE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(10**9), "MALLOC_TRIM_THRESHOLD_": str(10**10)}
# without compiled modules every kernel spends 15 s longer on its imports
PERSONAL = ("MPLBACKEND", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONDONTWRITEBYTECODE")


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

    def close(self) -> None:
        for source, rest in self.open.items():
            if rest.strip():
                self.write("\n", source)


class Watch(threading.Thread):
    """Beside a run: bars from the file `progress` to the terminal, and once a second a look around.

    If DVC started the run and ends first, the run ends as by SIGTERM; otherwise it would write at
    the same time as the next `dvc repro`. `peak_rss` is the memory of the largest process seen
    below this one, in bytes.
    """

    def __init__(self, progress: Path, terminal: Terminal):
        super().__init__(daemon=True)
        self.progress, self.terminal = progress, terminal
        self.done, self.peak_rss, self.dvc = threading.Event(), 0, _dvc()

    def __enter__(self) -> "Watch":
        self.progress.touch()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.join()
        self.terminal.close()

    def run(self) -> None:
        looked = time.monotonic()
        with self.progress.open(encoding="utf-8", errors="replace", newline="") as bars:
            last = False
            while not last:
                last = self.done.wait(0.1)
                if text := bars.read():
                    self.terminal.write(text, "progress")
                if time.monotonic() - looked > 1 and not last:
                    looked = time.monotonic()
                    self._look()

    def _look(self) -> None:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self.peak_rss = max(self.peak_rss, process.memory_info().rss)
        if self.dvc is not None and not _lives(self.dvc):
            self.dvc = None
            main = threading.main_thread().ident  # a signal to another thread would not wake it
            signal.pthread_kill(main, signal.SIGTERM)  # type: ignore[arg-type]


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


def peak_rss_mb(watch: Watch) -> int | None:
    """Peak memory of the kernel that has ended, or of the largest process seen below it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return round(max(peak, watch.peak_rss) / 2**20)


def environment(folder: Path) -> dict[str, str]:
    """Environment of a kernel's process; folder: private, for IPython's state."""
    env = REUSE_MEMORY | {k: v for k, v in os.environ.items() if k not in PERSONAL}
    (folder / "matplotlibrc").touch()
    # tqdm.auto, which others import, misses the widgets that a stage's terminal has no use for
    ignored = [env.get("PYTHONWARNINGS"), "ignore:IProgress not found"]
    return env | {
        "IPYTHONDIR": str(folder / "ipython"),
        "MATPLOTLIBRC": str(folder / "matplotlibrc"),
        "MCLIP_PROGRESS": str(folder / "progress"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)]),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the kernel's debugger warns on each start
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), env.get("PYTHONPATH")])),
        "PYTHONWARNINGS": ",".join(filter(None, ignored)),
    }


class _Client(NotebookClient):
    """nbclient, which also shows in a terminal what the notebook prints."""

    terminal: Terminal

    def process_message(self, msg: dict, cell: nbformat.NotebookNode, cell_index: int) -> Any:
        if msg["msg_type"] == "stream":
            self.terminal.write(msg["content"]["text"])
        return super().process_message(msg, cell, cell_index)


@contextlib.contextmanager
def _started(nb: nbformat.NotebookNode, folder: Path, terminal: Terminal) -> Iterator[_Client]:
    """A client of a kernel that ends with the block, and all below it."""
    manager = AsyncKernelManager(
        kernel_name="python3",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # ipykernel of this interpreter
        connection_file=str(folder / "kernel.json"),
    )
    if (
        sys.platform != "win32" and len(str(folder)) < 80
    ):  # sockets' paths have 100 characters at most
        manager.transport = "ipc"
    client = _Client(
        nb,
        manager,
        timeout=None,
        startup_timeout=120,
        iopub_timeout=60,
        raise_on_iopub_timeout=True,
        record_timing=False,
        shutdown_kernel="immediate",
    )
    client.terminal = terminal
    try:
        with client.setup_kernel(cleanup_kc=True, env=environment(folder), cwd=str(Path.cwd())):
            try:
                yield client
            finally:
                _end(manager)
    finally:
        _end(manager)  # where a signal came while it started


def _end(manager: AsyncKernelManager) -> None:
    if (pid := getattr(manager.provisioner, "pid", None)) is not None:
        end_family(pid)


class ShownInTerminal(Engine):
    """papermill's engine "mclip": cells run in this module's kernel and are shown in a terminal."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: NotebookExecutionManager,
        kernel_name: str,
        *,
        terminal: Terminal,
        folder: Path,
        errors: list[CellExecutionError],
        **options: Any,
    ) -> None:
        with _started(nb_man.nb, folder, terminal) as client:
            for index, cell in enumerate(nb_man.nb.cells):
                heading = re.search(r"^#+ +(.+)$", cell.source, re.MULTILINE)
                if cell.cell_type == "markdown" and heading:
                    terminal.write(f"  {heading[1].strip()}\n")
                nb_man.cell_start(cell, index)
                try:
                    client.execute_cell(cell, index)
                except CellExecutionError as err:
                    errors.append(err)
                    nb_man.cell_exception(cell, index, exception=err)
                    break
                finally:
                    nb_man.cell_complete(cell, index)


class ReadableParameters(PythonTranslator):
    """Parameters as papermill injects them, nested maps one key a line."""

    @classmethod
    def codify(cls, parameters: dict[str, Any], comment: str = "Parameters") -> str:
        lines = (f"{name} = {readable(value)}\n" for name, value in parameters.items())
        return "".join([f"# {comment}\n", *lines])


papermill_engines.register("mclip", ShownInTerminal)
papermill_translators.register("python", ReadableParameters)


def readable(value: Any, indent: int = 0) -> str:
    """value as Python, nested maps one key a line where they don't fit on one."""
    line = repr(value)
    if not isinstance(value, dict) or len(line) + indent <= 88:
        return line
    pad = " " * (indent + 4)
    rows = "".join(f"{pad}{key!r}: {readable(item, indent + 4)},\n" for key, item in value.items())
    return "{\n" + rows + " " * indent + "}"


def execute(
    notebook: Path, parameters: dict[str, Any], terminal: Terminal
) -> tuple[nbformat.NotebookNode, str | None, int | None]:
    """Run a notebook's cells with parameters injected.

    A signal stops the kernel and all below it and then raises KeyboardInterrupt(number of the
    signal).

    Returns
    -------
    The notebook with its outputs, None or the reason why it stopped, and peak memory in MiB.
    """

    def stop(signum: int, frame: Any) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt(signum)

    reason: str | None = None
    errors: list[CellExecutionError] = []
    former = {number: signal.signal(number, stop) for number in SIGNALS}
    with tempfile.TemporaryDirectory(prefix="mclip-", ignore_cleanup_errors=True) as folder:
        out = Path(folder, "executed.ipynb")
        try:
            with Watch(Path(folder, "progress"), terminal) as watch:
                papermill.execute_notebook(
                    notebook,
                    out,
                    parameters,
                    engine_name="mclip",
                    kernel_name="python3",
                    language="python",
                    progress_bar=False,
                    terminal=terminal,
                    folder=Path(folder),
                    errors=errors,
                )
        except PapermillExecutionError:
            pass  # one of `errors`, which also have a notebook that exits early, by SystemExit(0)
        except RuntimeError as err:  # nbclient's DeadKernelError, and a kernel that doesn't start
            reason = f"the kernel died ({err}); was the machine short of memory?"
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        if errors:
            reason = f"{errors[0].ename}: {errors[0].evalue}"
        return nbformat.read(out, as_version=4), reason, peak_rss_mb(watch)
