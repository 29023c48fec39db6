"""Run a notebook as a stage: its parameters in, a byte-stable executed notebook out.

    mclip run balance
    mclip run distill -s recipe=clip

NOTEBOOK    executes notebooks/NOTEBOOK.ipynb and writes reports/NOTEBOOK[/value...].ipynb
-s NAME=V   sets a further name of the notebook's parameters cell; V is read as YAML

The notebook sees of params.yaml what the stage of dvc.yaml that runs it lists under `params:`; one
that no stage runs sees all. A stage whose own section is empty (`ablations.amount: null`) is left
out: a page that says so takes the report's place, and nothing runs.

While it runs, the terminal shows the notebook's headings, prints, warnings and progress bars. If a
cell fails, what ran is kept as reports/NOTEBOOK.failed.ipynb and a former good report stays as it
is. Two runs of the same notebook with the same parameters write the same bytes: no times, no paths,
ordinal ids; the notebook must add none. Wall time and peak memory go to
reports/times/NOTEBOOK[/value...].json.

Exit codes: 0 done, 1 the notebook failed, 2 wrong call or parameters, 128 + n stopped by signal n.
"""

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
from functools import cached_property
from pathlib import Path
from typing import Any

# jsonschema, below nbformat, builds a grammar with it for a format that notebooks have none of: 1.3
# of the 2.2 CPU seconds that a stage takes to start
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

import nbformat
from nbformat import v4

from mclip import params
from mclip.params import ParamsError
from mclip.pipeline import code, stages, strip
from mclip.system.files import write_whole
from mclip.system.source import CodeError, Package, file_digest

SOURCE_SUFFIXES = {".py", ".ipynb", ".json", ".css", ".cu", ".cpp"}
LEFT_OUT = "left-out"  # tags the only cell of what stands for a report


@dataclass
class Stage:
    """One run: the notebook, what is set of its parameters, and where its report goes."""

    name: str  # "balance", "ablations/threshold"
    values: dict[str, Any] = field(default_factory=dict)  # further parameters, by name

    @property
    def title(self) -> str:
        return "/".join([self.name, *map(str, self.values.values())])

    @property
    def notebook(self) -> Path:
        return Path("notebooks") / f"{self.name}.ipynb"

    def report(self, suffix: str = ".ipynb", folder: str = "reports") -> Path:
        return Path(folder) / f"{self.title}{suffix}"

    @cached_property
    def entry(self) -> dict[str, Any]:
        """The stage of dvc.yaml that runs the notebook so; empty where there is none."""
        return stages.running(self.name, self.values)

    @property
    def keys(self) -> list[str]:
        """The parts of params.yaml that the notebook sees, dotted."""
        return self.entry.get("params", [])


class StageError(Exception):
    """An error for the user; `code` is the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


# --- before ---------------------------------------------------------------------------------------


def parameters(stage: Stage) -> dict[str, Any]:
    """What the notebook's parameters are set to; StageError (code 2) says what is wrong with the
    call.
    """
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
    names = parameter_names(nb, stage.notebook)
    values = picked(stage.keys)
    injected = ({"sections": values} if stage.keys else {}) | stage.values
    if unknown := [name for name in injected if name not in names]:
        raise StageError(
            f"{stage.notebook}: its parameters cell has no {unknown[0]!r} "
            f"(it has: {', '.join(names) or 'none'})",
            2,
        )
    return injected


def parameter_names(nb: nbformat.NotebookNode, path: Path) -> list[str]:
    """The names that the cell tagged "parameters" assigns."""
    for cell in nb.cells:
        if "parameters" in cell.metadata.get("tags", []):
            nodes = ast.walk(ast.parse(cell.source))
            return [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    raise StageError(f"{path}: no cell is tagged 'parameters'", 2)


def picked(keys: list[str]) -> dict[str, Any]:
    """The named parts of params.yaml, the whole of which is checked; defaults are spelled out."""
    return params.pick(params.load().model_dump(by_alias=True, mode="json"), keys)


def sources(stage: Stage, package: Package) -> list[Path]:
    """The files that must not change while the stage runs.

    DVC records its dependencies as they are after a stage, so an edit during it would go down as
    what produced the outputs. They are the notebook, the code that it depends on
    (mclip.pipeline.code), and what dvc.yaml names of mclip beside that.
    """
    listed = [Path(dep) for dep in stages.paths(stage.entry, "deps")]
    own = [path for path in listed if path.parts[0] in ("mclip", "notebooks")]
    files = {p for path in own for p in (path.rglob("*") if path.is_dir() else [path])}
    files = {path for path in files if path.suffix in SOURCE_SUFFIXES}
    return sorted({*files, stage.notebook, *package.notebook(stage.notebook)})


def state(stage: Stage, files: list[Path]) -> dict[str, str]:
    """What each file does now, comments and docstrings aside, and the values that it picks."""
    found = {str(path): file_digest(path) for path in files}
    try:
        return found | {"params.yaml": json.dumps(picked(stage.keys))}
    except ParamsError as err:
        return found | {"params.yaml": str(err)}


def edited_before(stage: Stage, package: Package) -> list[str]:
    """Under DVC, what changed since its stage `code` ran: it would take the outputs for those of
    the code before.
    """
    if "DVC_STAGE" not in os.environ or not Path(code.FOLDER, stage.title).is_file():
        return []
    before = code.recorded(stage.title)
    now = code.depends_on(package, [stage.title]).get(stage.title, {})
    return sorted(p for p in before | now if before.get(p) != now.get(p))


def left_out(stage: Stage) -> str | None:
    """The stage's own section, `ablations.amount` of ablations/amount, where it has nothing."""
    key = stage.name.replace("/", ".")
    if key not in stage.keys:
        return None
    *parents, last = key.split(".")
    section: Any = params.read_yaml("params.yaml")
    for part in parents:
        section = section.get(part) or {}
    return key if last in section and not section[last] else None


# --- after ----------------------------------------------------------------------------------------

ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


def cleaned(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook with nothing in it that differs between two runs, or that is the
    machine's.
    """
    marks = "papermill-error-cell-tag"  # cells that say where the error is, as `describe` does
    nb.cells = [cell for cell in nb.cells if marks not in cell.metadata.get("tags", [])]
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
    """One screen about a failed run: which cell, which lines, the exception, how to open it."""
    lines = [f"{stage.title}: FAILED", reason]
    for cell in nb.cells:
        for error in (o for o in cell.get("outputs", []) if o.output_type == "error"):
            message = str(error.evalue).strip().splitlines() or [""]
            lines = [
                f"{stage.title}: FAILED in cell [{cell.execution_count}] of {kept}",
                *_own_frames(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))),
                f"{error.ename}: {message[0]}",
                *message[1:12],
            ]
    return "\n".join([*lines, f"to see all of it: jupyter lab {kept}"])


def _own_frames(traceback: str, last: int = 4) -> list[str]:
    """The last frames of an IPython traceback that are in the notebook or in this repository's
    files, as "file:line in function: code".
    """
    root, frames = Path.cwd().resolve(), []
    for block in re.split(r"^(?=Cell In\[|File )", traceback, flags=re.MULTILINE):
        if match := re.match(r"Cell In\[\d+\], line (\d+)", block):
            where = f"line {match[1]}"
        elif match := re.match(r"File (.+?):(\d+)(?:, in ([^\n(]+))?", block):
            path = Path(match[1]).expanduser().resolve()
            if not path.is_relative_to(root) or "site-packages" in path.parts:
                continue
            where = f"{path.relative_to(root)}:{match[2]} in {(match[3] or '<module>').strip()}"
        else:
            continue
        arrow = re.search(r"^-+> *\d+ (.*)$", block, re.MULTILINE)
        frames.append(f"  {where}{': ' + arrow[1].strip() if arrow else ''}"[:110])
    return frames[-last:]


# --- all of it ------------------------------------------------------------------------------------


def run(stage: Stage) -> Path:
    """Execute the stage's notebook and write its report; StageError says why there is none."""
    if key := left_out(stage):
        return leave_out(stage, key)
    try:
        package = Package()
    except CodeError as err:
        raise StageError(f"{stage.title}: {err}") from None
    if edited := edited_before(stage, package):
        raise StageError(
            f"{stage.title}: {edited[0]} was edited after DVC's stage `code`: run `dvc repro` again"
        )
    files = sources(stage, package)
    before = state(stage, files)
    injected = parameters(stage)
    from mclip.pipeline.kernel import Terminal, execute  # here: it takes a second

    terminal = Terminal()
    terminal.write(f"{stage.title}: running {stage.notebook}\n")
    start = time.perf_counter()
    nb, reason, peak = execute(stage.notebook, injected, terminal)
    seconds = time.perf_counter() - start
    failed = stage.report(".failed.ipynb")
    if reason is not None:
        save(cleaned(nb), failed)
        raise StageError(describe(nb, stage, failed, reason))
    after = state(stage, files)
    if edited := sorted(p for p in before | after if before.get(p) != after.get(p)):
        raise StageError(
            f"{stage.title}: {edited[0]} was edited while it ran; nothing is kept, run it again"
        )
    save(cleaned(nb), stage.report())
    failed.unlink(missing_ok=True)
    times = {"stage": stage.name, **stage.values, "seconds": round(seconds, 2), "peak_rss_mb": peak}
    write_whole(stage.report(".json", "reports/times"), json.dumps(times, indent=1) + "\n")
    terminal.write(f"{stage.title}: {stage.report()} written, {seconds:.1f} s\n")
    return stage.report()


def leave_out(stage: Stage, key: str) -> Path:
    """Write what DVC expects of a stage that params.yaml leaves out; the report's site skips it."""
    text = f"# {stage.title}\n\nLeft out: `{key}` is empty in params.yaml."
    cell = v4.new_markdown_cell(text, metadata={"tags": [LEFT_OUT]})
    save(cleaned(v4.new_notebook(cells=[cell])), stage.report())
    for out in stages.paths(stage.entry, "outs"):
        if Path(out) != stage.report():
            write_whole(out, "{}\n" if out.endswith(".json") else "\n")
    stage.report(".json", "reports/times").unlink(missing_ok=True)
    print(f"{stage.title}: left out, {key} is empty in params.yaml", file=sys.stderr)
    return stage.report()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mclip run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("notebook")
    parser.add_argument("-s", dest="values", metavar="NAME=V", action="append", default=[])
    args = parser.parse_args(argv)
    name = args.notebook.removesuffix(".ipynb").removeprefix("notebooks/")
    try:
        run(Stage(name, dict(map(stages.setting, args.values))))
    except ParamsError as err:
        print(err, file=sys.stderr)
        return 2
    except StageError as err:
        print(err, file=sys.stderr)
        return err.code
    except KeyboardInterrupt as err:
        number = err.args[0] if err.args else signal.SIGINT
        print(
            f"{name}: stopped by {signal.Signals(number).name}: no report, but finished shards and "
            "checkpoints are kept, the next run goes on there",
            file=sys.stderr,
        )
        return 128 + number
    return 0


if __name__ == "__main__":
    sys.exit(main())
