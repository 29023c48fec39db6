"""Run a notebook as a stage: typed parameters in, a byte-stable executed notebook out.

    python -m mclip.pipeline.run balance -p balance
    python -m mclip.pipeline.run distill -s recipe=clip -p distill.train -p distill.recipes.clip
    python -m mclip.pipeline.run ablations/threshold -p balance

STAGE       executes notebooks/STAGE.ipynb and writes reports/STAGE[/value...].ipynb
-p KEY      a part of params.yaml that the notebook may see (what the stage lists under `params:` in dvc.yaml)
-s NAME=V   sets a further name of the notebook's parameters cell; V is read as YAML

While it runs, the terminal shows the notebook's headings, prints, warnings and progress bars. If a
cell fails, what ran is kept as reports/STAGE.failed.ipynb and a former good report stays as it is.
Two runs of the same notebook with the same parameters write the same bytes: no times, no paths,
ordinal ids; the notebook must add none. Wall time and peak memory go to
reports/times/STAGE[/value...].json.

Exit codes: 0 done, 1 the notebook failed, 2 wrong call or parameters, 128 + n stopped by signal n.
"""

from mclip.pipeline import warm

if __name__ == "__main__":
    warm.hand_over("mclip.pipeline.run")

import argparse
import ast
import difflib
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat

from mclip import params
from mclip.params import ParamsError
from mclip.pipeline import code as closure
from mclip.pipeline import strip
from mclip.system.files import write_whole

SOURCE_SUFFIXES = {".py", ".ipynb", ".json", ".css", ".cu", ".cpp"}


@dataclass
class Stage:
    """One run: the notebook, where its report goes, and what is injected."""

    name: str  # "balance", "ablations/threshold"
    keys: list[str] = field(default_factory=list)  # dotted keys of params.yaml
    values: dict[str, Any] = field(default_factory=dict)  # further parameters, by name

    @property
    def title(self) -> str:
        return "/".join([self.name, *map(str, self.values.values())])

    @property
    def notebook(self) -> Path:
        return Path("notebooks") / f"{self.name}.ipynb"

    def report(self, suffix: str = ".ipynb", folder: str = "reports") -> Path:
        return Path(folder) / f"{self.title}{suffix}"


class StageError(Exception):
    """What the person who called sees; `code` is the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


# --- before -----------------------------------------------------------------------------------------------


def prepare(stage: Stage) -> tuple[nbformat.NotebookNode, dict[str, Any]]:
    """The source notebook and its parameters; StageError (code 2) says what is wrong with the call."""
    if not stage.notebook.exists():
        if not Path("notebooks").is_dir():
            raise StageError("no notebooks/ here: run from the repository's root", 2)
        known = [str(p.relative_to("notebooks").with_suffix("")) for p in strip.notebooks()]
        near = difflib.get_close_matches(stage.name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
        raise StageError(f"{stage.notebook}: no such notebook; {hint}", 2)
    try:
        nb = nbformat.reads(stage.notebook.read_text(), as_version=4)
    except (ValueError, AttributeError, nbformat.ValidationError) as err:
        raise StageError(
            f"{stage.notebook}: not a notebook ({str(err).splitlines()[0]})", 2
        ) from None
    names = _parameter_names(nb, stage.notebook)
    injected: dict[str, Any] = {**stage.values}
    if "sections" in names or stage.keys:
        injected = {"sections": picked(stage.keys), **injected}
    else:
        params.load()
    if unknown := [name for name in injected if name not in names]:
        raise StageError(
            f"{stage.notebook}: its parameters cell has no {unknown[0]!r} "
            f"(it has: {', '.join(names) or 'none'})",
            2,
        )
    return nb, injected


def picked(keys: list[str]) -> dict[str, Any]:
    """The named parts of params.yaml, the whole of which is checked; defaults are spelled out."""
    return params.pick(params.load().model_dump(by_alias=True, mode="json"), keys)


def _parameter_names(nb: nbformat.NotebookNode, path: Path) -> list[str]:
    """The names that the cell tagged "parameters" assigns."""
    for cell in nb.cells:
        if "parameters" in cell.metadata.get("tags", []):
            code = ast.walk(ast.parse(cell.source))
            return [n.id for n in code if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    raise StageError(f"{path}: no cell is tagged 'parameters'", 2)


def sources(stage: Stage, package: closure.Package) -> list[Path]:
    """The files that must not change while the stage runs.

    DVC records its dependencies as they are after a stage, so an edit during it would go down as
    what produced the outputs. They are the notebook, the code that it depends on
    (mclip.pipeline.code), and what dvc.yaml names of mclip beside that.
    """
    deps = [stage.notebook, *_dependencies(stage)]
    paths = {
        p
        for d in deps
        for p in (d.rglob("*") if d.is_dir() else [d])
        if p.suffix in SOURCE_SUFFIXES
    }
    return sorted({*paths, *package.notebook(stage.notebook)})


def state(stage: Stage, files: list[Path]) -> dict[str, str]:
    """What each file does now, comments and docstrings aside, and the values that the stage picks."""
    found = {str(path): closure.file_digest(path) for path in files}
    try:
        return found | {"params.yaml": json.dumps(picked(stage.keys))}
    except ParamsError as err:
        return found | {"params.yaml": str(err)}


def _dependencies(stage: Stage) -> list[Path]:
    """The files and folders of mclip/ and notebooks/ that dvc.yaml says the notebook depends on."""
    try:
        stages = params.read_yaml("dvc.yaml").get("stages", {})
    except ParamsError:
        stages = {}
    for entry in stages.values():
        entry = entry.get("do", entry)
        words = str(entry.get("cmd", "")).replace("${key}", stage.name.rpartition("/")[2]).split()
        if ("mclip.pipeline.run", stage.name) in pairwise(words):
            deps = [
                Path(next(iter(d)) if isinstance(d, dict) else d) for d in entry.get("deps", [])
            ]
            return [d for d in deps if d.parts[0] in ("mclip", "notebooks") and d.exists()]
    return []


def edited_before(stage: Stage, package: closure.Package) -> list[str]:
    """Under DVC, what changed since its stage `code` ran: it would take the outputs for those of
    the code before.
    """
    if "DVC_STAGE" not in os.environ or not Path(closure.FOLDER, stage.title).is_file():
        return []
    before = closure.recorded(stage.title)
    now = closure.depends_on(package, [stage.title]).get(stage.title, {})
    return sorted(p for p in before | now if before.get(p) != now.get(p))


# --- after ------------------------------------------------------------------------------------------------

ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


def cleaned(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook with nothing in it that differs between two runs, or that is the
    machine's.
    """
    nb.cells = [c for c in nb.cells if "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    strip.bare(nb)
    nb.metadata.language_info = nbformat.from_dict({"name": "python", "pygments_lexer": "ipython3"})
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        kept: list[Any] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":  # warnings: with paths and versions of this machine
                    continue
                output.text = ADDRESS.sub("at 0x0", output.text)
                if kept and kept[-1].output_type == "stream":
                    kept[-1].text += output.text
                    continue
            elif "data" in output:
                if (
                    "application/vnd.jupyter.widget-view+json" in output.data
                ):  # dead without its kernel
                    continue
                if isinstance(output.data.get("text/plain"), str):
                    output.data["text/plain"] = ADDRESS.sub("at 0x0", output.data["text/plain"])
            kept.append(output)
        cell.outputs = kept
    return nb


def save(nb: nbformat.NotebookNode, path: Path) -> None:
    write_whole(path, nbformat.writes(nb, version=nbformat.NO_CONVERT) + "\n")


def describe(nb: nbformat.NotebookNode, stage: Stage, kept: Path, reason: str) -> str:
    """One screen about a failed run: which cell, its line, the exception, how to open it."""
    place = next(
        (
            (c, o)
            for c in nb.cells
            if c.cell_type == "code"
            for o in c.outputs
            if o.output_type == "error"
        ),
        None,
    )
    lines = [f"{stage.title}: FAILED", reason]
    if place:
        cell, error = place
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
        message = str(error.evalue).strip().splitlines() or [""]
        lines = [
            f"{stage.title}: FAILED in cell [{cell.execution_count}] of {kept}",
            *_around_error(cell, traceback),
            *_own_frames(traceback),
            f"{error.ename}: {message[0]}",
            *message[1:12],
        ]
    return "\n".join([*lines, f"to see all of it: jupyter lab {kept}"])


def _around_error(cell: nbformat.NotebookNode, traceback: str, lines: int = 8) -> list[str]:
    """The last lines of a cell up to the one that failed, which is marked; none where no line is
    named.
    """
    match = re.search(rf"^Cell In\[{cell.execution_count}\], line (\d+)", traceback, re.MULTILINE)
    source = cell.source.rstrip().splitlines()
    if match is None:  # an error that shows no traceback, its message says all
        return []
    bad = int(match[1])
    return [
        f"{'--> ' if n == bad else '    '}{line[:100]}"
        for n, line in enumerate(source, 1)
        if bad - lines < n <= bad
    ]


def _own_frames(traceback: str, last: int = 2) -> list[str]:
    """The last frames of an IPython traceback in this repository's files, as "file:line in
    function".
    """
    root, frames = Path.cwd().resolve(), []
    head = re.compile(r"^File (.+?):(\d+)(?:, in ([^\n(]+))?", re.MULTILINE)
    for match, following in pairwise([*head.finditer(traceback), None]):
        path = Path(match[1]).expanduser().resolve()
        if not path.is_relative_to(root) or "site-packages" in path.parts:
            continue
        body = traceback[match.end() : following.start() if following else None]
        arrow = re.search(r"^-+> *\d+ (.*)$", body, re.MULTILINE)
        where = f"{path.relative_to(root)}:{match[2]} in {(match[3] or '<module>').strip()}"
        frames.append(f"  {where}{': ' + arrow[1].strip() if arrow else ''}"[:110])
    return frames[-last:]


# --- all of it --------------------------------------------------------------------------------------------


def run(stage: Stage) -> Path:
    """Execute the stage's notebook and write its report; StageError says why there is none."""
    try:
        package = closure.Package()
    except closure.CodeError as err:
        raise StageError(f"{stage.title}: {err}") from None
    if edited := edited_before(stage, package):
        raise StageError(
            f"{stage.title}: {edited[0]} was edited after DVC's stage `code`: run `dvc repro` again"
        )
    files = sources(stage, package)
    before = state(stage, files)
    nb, injected = prepare(stage)
    # here: importing papermill takes seconds, in which files change
    from mclip.pipeline.kernel import (
        Terminal,
        execute,
    )

    terminal = Terminal()
    terminal.write(f"{stage.title}: running {stage.notebook}\n")
    start = time.perf_counter()
    result, reason, peak = execute(nb, injected, terminal)
    seconds = time.perf_counter() - start
    failed = stage.report(".failed.ipynb")
    if reason is not None:
        save(cleaned(result), failed)
        raise StageError(describe(result, stage, failed, reason))
    after = state(stage, files)
    if edited := sorted(p for p in before | after if before.get(p) != after.get(p)):
        raise StageError(
            f"{stage.title}: {edited[0]} was edited while it ran; nothing is kept, run it again"
        )
    save(cleaned(result), stage.report())
    failed.unlink(missing_ok=True)
    times = {"stage": stage.name, **stage.values, "seconds": round(seconds, 2), "peak_rss_mb": peak}
    write_whole(stage.report(".json", "reports/times"), json.dumps(times, indent=1) + "\n")
    terminal.write(f"{stage.title}: {stage.report()} written, {seconds:.1f} s\n")
    return stage.report()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mclip.pipeline.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage")
    parser.add_argument("-p", dest="keys", metavar="KEY", action="append", default=[])
    parser.add_argument("-s", dest="values", metavar="NAME=V", action="append", default=[])
    args = parser.parse_args(argv)
    try:
        values = dict(_setting(text) for text in args.values)
        run(Stage(args.stage.removesuffix(".ipynb").removeprefix("notebooks/"), args.keys, values))
    except ParamsError as err:
        print(err, file=sys.stderr)
        return 2
    except StageError as err:
        print(err, file=sys.stderr)
        return err.code
    except KeyboardInterrupt as err:
        number = err.args[0] if err.args else signal.SIGINT
        print(
            f"{args.stage}: stopped by {signal.Signals(number).name}: no report, but finished shards and checkpoints "
            "are kept, the next run goes on there",
            file=sys.stderr,
        )
        return 128 + number
    return 0


def _setting(text: str) -> tuple[str, Any]:
    from ruamel.yaml import YAML

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise StageError(f"-s {text}: expected NAME=VALUE", 2)
    return name, YAML(typ="safe").load(value)


if __name__ == "__main__":
    sys.exit(main())
