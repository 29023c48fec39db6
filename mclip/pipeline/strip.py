"""Source notebooks are stored without outputs, so that running one by hand never changes a stage.

    mclip strip             # strip every notebook in notebooks/, in place
    mclip strip --check     # list those that aren't stripped; exit code 1 if there are any

What stays of a notebook: its cells' source and tags, the kernel's name, and ordinal cell ids. The
reports (executed notebooks in reports/) are left alone.
"""

from pathlib import Path

import nbformat

from mclip.system.files import write_whole

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class NotANotebook(ValueError):
    """A file that cannot be read as a notebook; the message names it."""


def bare(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leave nb ordinal cell ids and no metadata but the kernel's name and the cells' tags."""
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


def strip_file(path: Path, *, check: bool = False) -> bool:
    """Strip a notebook in place; with `check`, leave it as it is. True if it was not stripped.

    Raises NotANotebook if the file cannot be read as one.
    """
    try:
        before = path.read_text()
        after = stripped(before)
    except (OSError, ValueError, AttributeError, nbformat.ValidationError) as err:
        reason = str(err).splitlines()[0]
        raise NotANotebook(
            f"{path}: not a readable notebook ({type(err).__name__}: {reason})"
        ) from None
    if before != after and not check:
        write_whole(path, after)
    return before != after
