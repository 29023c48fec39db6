"""mclip.pipeline.warm: forks of one process that has the libraries, and nothing left when the
command ends.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat import v4

from mclip.pipeline import strip, warm

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or Path("/dev/nvidiactl").exists(),
    reason="forks are for Linux without a GPU",
)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    """A folder with modules to run, in the place of the repository."""
    (tmp_path / "says.py").write_text(
        "import os, sys, json\n"
        "print(json.dumps([sys.argv[1:], os.environ.get('GIVEN'), os.getcwd(), 'wave' in sys.modules, __name__]))\n"
        "sys.exit(3)\n"
    )
    (tmp_path / "sleeps.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "outer.py").write_text(
        "import os, subprocess, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from mclip import warm\n"
        "while 'WAIT' in os.environ and not warm.is_on():\n"
        "    time.sleep(0.05)\n"
        "os.environ['GIVEN'] = 'yes'\n"
        "process = subprocess.Popen(warm.command(*sys.argv[1:], notes=os.environ.get('NOTES')))\n"
        "open('stands_for', 'w').write(str(process.pid))\n"
        "sys.exit(process.wait() % 256)\n"
    )
    return tmp_path


def started(folder, *argv, **env):
    env = os.environ | {"PYTHONPATH": str(ROOT), "WAIT": "1"} | env
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mclip.pipeline.warm",
            "--import",
            "wave",
            sys.executable,
            "outer.py",
            *argv,
        ],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )


def content(file, seconds=20):
    """What is in a file that appears soon."""
    for _ in range(int(seconds / 0.05)):
        if file.exists() and file.read_text():
            return file.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{file} did not appear")


def gone(pid, seconds=15):
    for _ in range(int(seconds / 0.05)):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_fork_is_what_was_asked_for(folder):
    (folder / "notes").mkdir()
    process = started(folder, "says", "one", "two words", NOTES=str(folder / "notes"))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert out.strip() == f'[["one", "two words"], "yes", "{folder}", true, "__main__"]'
    assert int(content(folder / "notes" / "peak_rss")) > 2**20
    assert gone(int(content(folder / "notes" / "pid")))


def test_a_training_s_memory_counts_as_its_kernel_s(folder):
    """A fork that a fork asked for: the peak of the first is that of the larger."""
    (folder / "notes").mkdir()
    (folder / "large.py").write_text("x = bytearray(b'1') * 300_000_000\n")
    (folder / "kernel.py").write_text(
        "import os, subprocess\nfrom mclip import warm\nsubprocess.check_call(warm.command('large'))\n"
    )
    process = started(folder, "kernel", NOTES=str(folder / "notes"))
    assert process.wait(60) == 0
    assert int(content(folder / "notes" / "peak_rss")) > 300_000_000


def test_without_the_wrapper_the_same_command_imports_for_itself(folder):
    env = {k: v for k, v in os.environ.items() if k != warm.SOCKET}
    done = subprocess.run(
        [sys.executable, "outer.py", "says", "one"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3
    assert done.stdout.strip() == f'[["one"], "yes", "{folder}", false, "__main__"]'


def test_a_warm_process_that_is_gone_is_done_without(folder):
    (folder / "of").write_text(f"{sys.executable}\n{folder}")
    (folder / "socket").touch()
    env = os.environ | {warm.SOCKET: str(folder / "socket")}
    done = subprocess.run(
        [sys.executable, "outer.py", "says", "one"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout[:8]) == (3, '[["one"]')


def test_a_module_that_hands_over_goes_on_by_itself_where_the_warm_process_was_killed(folder):
    """Its socket and its note lie there still, so `is_on` says that it is."""
    (folder / "hands.py").write_text(
        "from mclip import warm\nwarm.hand_over('hands')\nimport says\n"
    )
    killed = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    killed.bind(str(folder / "socket"))
    killed.close()
    (folder / "of").write_text(f"{sys.executable}\n{folder}")
    env = os.environ | {"PYTHONPATH": str(ROOT), warm.SOCKET: str(folder / "socket"), "GIVEN": "x"}
    done = subprocess.run(
        [sys.executable, "-m", "hands", "one"],
        cwd=folder,
        env=env,
        text=True,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 3 and json.loads(done.stdout)[:2] == [["one"], "x"]


def test_another_repository_s_warm_process_is_not_ours(folder, monkeypatch):
    monkeypatch.setenv(warm.SOCKET, str(folder / "socket"))
    (folder / "of").write_text(f"{sys.executable}\n{folder}")
    (folder / "socket").touch()
    assert not warm.is_on()
    monkeypatch.chdir(folder)
    assert warm.is_on()
    (folder / "socket").unlink()  # not ready yet
    assert not warm.is_on()


def test_a_notebook_is_the_same_bytes_with_and_without(tmp_path):
    """Figures, prints and tables of a kernel that is a fork of the real list of libraries."""
    nb = v4.new_notebook(
        cells=[
            v4.new_code_cell("sections = None"),
            v4.new_code_cell(
                "import matplotlib.pyplot as plt, pandas as pd, torch\nkept = torch.ones(2**28)\nprint(torch.arange(3).sum())\npd.DataFrame({'a': [1]})"
            ),
            v4.new_code_cell("fig, ax = plt.subplots()\nax.plot([1, 2]);"),
        ]
    )
    nb.cells[0].metadata["tags"] = ["parameters"]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/figure.ipynb").write_text(strip.stripped(nbformat.writes(nb)))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "wait.py").write_text(
        "import os, subprocess, sys, time\nfrom mclip import warm\n"
        "while not warm.is_on():\n    time.sleep(0.1)\n"
        "sys.exit(subprocess.call([sys.executable, '-m', 'mclip.pipeline.run', 'figure']))\n"
    )
    env = {k: v for k, v in os.environ.items() if k != warm.SOCKET} | {"PYTHONPATH": str(ROOT)}
    report, bytes_ = tmp_path / "reports/figure.ipynb", []
    memory = []
    for start in (
        ["-m", "mclip.pipeline.warm", sys.executable, "wait.py"],
        ["-m", "mclip.pipeline.run", "figure"],
    ):
        done = subprocess.run(
            [sys.executable, *start], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        bytes_.append(report.read_bytes())
        report.unlink()
        memory.append(
            json.loads((tmp_path / "reports/times/figure.json").read_text())["peak_rss_mb"]
        )
    assert b"image/png" in bytes_[0] and bytes_[0] == bytes_[1]
    assert (
        min(memory) > 1000
    )  # what the cell keeps, also where the kernel was killed when it was done


def test_an_exception_and_what_was_to_run_at_the_end(folder):
    (folder / "fails.py").write_text(
        "import atexit\natexit.register(print, 'at the end')\nprint('so far', end=' ')\n1 / 0"
    )
    process = started(folder, "fails")
    assert process.communicate(timeout=60)[0] == "so far at the end\n"
    assert process.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_fork_ends_with_what_stands_for_it(folder, number):
    process = started(folder, "sleeps", "below")
    below = int(content(folder / "below"))
    os.kill(int(content(folder / "stands_for")), number)
    assert process.wait(30) == -number % 256
    if number == signal.SIGKILL:  # SIGTERM went to the fork alone, as it would without the wrapper
        assert gone(below)
    else:
        os.kill(below, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_wrapper_ends(folder, number):
    process = started(folder, "sleeps", "below")
    below = int(content(folder / "below"))
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.wait(30)
    for member in family:
        with contextlib.suppress(psutil.Error):
            if "outer.py" in member.cmdline():
                member.kill()  # the command is the user's own where the wrapper is killed
    assert gone(below)
    assert all(gone(member.pid) for member in family)
