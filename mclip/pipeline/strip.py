"""Source notebooks are stored without outputs, so that running one by hand never changes a stage.

    python -m mclip.pipeline.strip             # strip every notebook in notebooks/, in place
    python -m mclip.pipeline.strip --check     # list those that aren't stripped; exit code 1 if there are any

What stays of a notebook: its cells' source and tags, the kernel's name, and ordinal cell ids. The
reports (executed notebooks in reports/) are left alone.
"""

import argparse
import sys
from pathlib import Path

import nbformat

from mclip.system.files import write_whole

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def bare(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """nb in place with ordinal cell ids and no metadata but the kernel's name and the cells' tags."""
    nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for index, cell in enumerate(nb.cells):
        cell.id = f"cell-{index}"
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    return nb


def stripped(text: str) -> str:
    """The source notebook `text` (JSON) with outputs, counts and metadata removed."""
    nb = bare(nbformat.reads(text, as_version=4))
    while nb.cells and not nb.cells[-1].source.strip():  # JupyterLab's empty last cell
        nb.cells.pop()
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(nb, version=nbformat.NO_CONVERT) + "\n"


def notebooks(folder: str | Path = "notebooks") -> list[Path]:
    """Every source notebook, JupyterLab's checkpoints aside."""
    return sorted(p for p in Path(folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mclip.pipeline.strip", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if one isn't stripped"
    )
    parser.add_argument(
        "files", nargs="*", type=Path, help="notebooks (default: all in notebooks/)"
    )
    args = parser.parse_args(argv)
    dirty = 0
    for path in args.files or notebooks():
        try:
            before = path.read_text()
            after = stripped(before)
        except (OSError, ValueError, AttributeError, nbformat.ValidationError) as err:
            reason = str(err).splitlines()[0]
            print(
                f"{path}: not a readable notebook ({type(err).__name__}: {reason})", file=sys.stderr
            )
            dirty += 1
            continue
        if before == after:
            continue
        print(
            f"{path}: {'not stripped: run `python -m mclip.pipeline.strip`' if args.check else 'stripped'}"
        )
        if args.check:
            dirty += 1
        else:
            write_whole(path, after)
    return 1 if dirty else 0


if __name__ == "__main__":
    sys.exit(main())
