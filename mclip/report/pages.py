"""Executed notebooks as pages of the report's site: the index's entry, and the body as HTML."""

from __future__ import annotations

import base64
import copy
import re
import struct
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mclip.params import Params
from mclip.params.ablations import studies

if TYPE_CHECKING:
    import nbformat

STAGES = [*Params.model_fields, "report"]
# reports/STAGE/RECIPE.ipynb; what is left of a recipe that is gone is not shown
OF_RECIPES = ("distill", "evaluate")
ABLATIONS = "ablations"  # reports/ablations/*.ipynb
# of the ablations: what one looks at rather than compares
PICTURES = [name for name, kind in studies().items() if getattr(kind, "group", "") == "pictures"]
GROUPS = {  # in the order of the index: how a group of pages is headed
    "pipeline": "Stage by stage",
    "recipes": "Recipe by recipe",
    "ablations": "Ablations: one question each",
    "pictures": "Pictures: what the students see and find",
    "others": "From other runs: with other parameters, kept beside this one",
}
TEMPLATES = Path(__file__).parent / "site"


class ReportError(RuntimeError):
    """There is nothing to report on, or a notebook can't be read; the message names it."""

    exit_code = 1


class Page(NamedTuple):
    """One executed notebook, as far as the index needs it."""

    slug: str
    label: str  # "distill · CLIP-CID"
    group: str  # one of GROUPS
    title: str
    intro: str
    answer: str
    figure: str  # base64 PNG or ""
    alt: str
    notebook: nbformat.NotebookNode


def read_pages(reports: Path, titles: dict[str, str], asked: Collection[str]) -> list[Page]:
    """The executed notebooks by GROUPS, each in the order of the pipeline.

    titles : recipe -> its title.
    asked : the ablations that params.yaml asks for; what else lies there is of another run.
    """
    paths = [path for path in reports.rglob("*.ipynb") if not path.name.endswith(".failed.ipynb")]
    recipes = list(titles)

    def wanted(path: Path) -> bool:
        stage, *rest = path.relative_to(reports).with_suffix("").parts
        return stage not in OF_RECIPES or rest[0] in titles

    def order(path: Path) -> tuple:
        stage, *rest = path.relative_to(reports).with_suffix("").parts
        known = STAGES.index(stage) if stage in STAGES else len(STAGES)
        of = [
            (recipes.index(r) if r in recipes else PICTURES.index(r) if r in PICTURES else 99, r)
            for r in rest
        ]
        return list(GROUPS).index(_group([stage, *rest], asked)), known, stage, of

    pages = [
        _page(path, reports, titles, asked) for path in sorted(filter(wanted, paths), key=order)
    ]
    return [page for page in pages if not _left_out(page.notebook)]


def _left_out(notebook: nbformat.NotebookNode) -> bool:
    """Does it only say that params.yaml leaves its stage out (mclip.pipeline.run)?"""
    return any("left-out" in cell.metadata.get("tags", []) for cell in notebook.cells)


def _group(parts: Sequence[str], asked: Collection[str]) -> str:
    if parts[0] == ABLATIONS:
        if parts[1:2] and parts[1] not in asked:
            return "others"
        return "pictures" if parts[1:2] and parts[1] in PICTURES else "ablations"
    return "recipes" if parts[0] in OF_RECIPES else "pipeline"


def _page(path: Path, reports: Path, titles: dict[str, str], asked: Collection[str]) -> Page:
    # here: every notebook imports this module, for `answer`, and nbformat takes 3 s
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as err:
        raise ReportError(f"{path}: not a readable notebook ({str(err).splitlines()[0]})") from None
    parts = path.relative_to(reports).with_suffix("").parts
    named = [titles.get(part, part.replace("-", " ")) for part in parts]
    text = next((c.source for c in notebook.cells if c.cell_type == "markdown"), "")
    heading = re.search(r"^# +(.+)$", text, re.M)
    title = re.sub(r"[*`_]", "", heading.group(1)).strip() if heading else path.stem
    rest = text[heading.end() :] if heading else text
    intro = next(
        (b.strip() for b in rest.split("\n\n") if b.strip() and b.strip()[0] not in "#-*|>`"), ""
    )
    figure, alt = _key_figure(notebook, title)
    return Page(
        slug="-".join(parts),
        label=" · ".join(named[1:] if parts[0] == ABLATIONS and len(parts) > 1 else named),
        group=_group(parts, asked),
        title=title,
        intro=" ".join(intro.split()),
        answer=_answer(notebook),
        figure=figure,
        alt=alt,
        notebook=notebook,
    )


def _answer(notebook: nbformat.NotebookNode) -> str:
    for cell in reversed(notebook.cells):
        for output in cell.get("outputs", []):
            tagged = "answer" in cell.metadata.get("tags", []) or "mclip" in output.get(
                "metadata", {}
            )
            if tagged and "text/plain" in output.get("data", {}):
                return " ".join(output.data["text/plain"].split())
    return ""


def _key_figure(notebook: nbformat.NotebookNode, title: str) -> tuple[str, str]:
    for cell in notebook.cells:
        if "key-figure" in cell.metadata.get("tags", []):
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    return "".join(output.data["image/png"].split()), _alt(output, title)
    return "", ""


def _alt(output: nbformat.NotebookNode, title: str) -> str:
    text = output.data.get("text/plain", "")
    return text.removeprefix("Figure: ") if text.startswith("Figure: ") else f"Figure of “{title}”"


def body(page: Page) -> str:
    """The notebook's prose and results as HTML; title and answer are left to the page's head."""
    from jinja2 import FileSystemLoader
    from nbconvert import HTMLExporter

    notebook = copy.deepcopy(page.notebook)
    first = next((c for c in notebook.cells if c.cell_type == "markdown"), None)
    if first is not None:
        first.source = re.sub(r"^# +.+$", "", first.source, count=1, flags=re.M).strip()
    injected = any("injected-parameters" in c.metadata.get("tags", []) for c in notebook.cells)
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = [o for o in cell.outputs if "mclip" not in o.get("metadata", {})]
            if injected and "parameters" in cell.metadata.get("tags", []):
                continue  # the defaults that the run's own parameters replace
            if cell.outputs and not shown and "key-figure" not in cell.metadata.get("tags", []):
                continue  # the answer stands at the head
            cell.outputs = shown
            for output in shown:
                if "image/png" in output.get("data", {}):
                    shape: dict[str, Any] = {"alt": _alt(output, page.title)}
                    if "Figure" in output.data.get("text/plain", ""):
                        shape["width"] = (
                            _png_width(output.data["image/png"]) * 2 // 3
                        )  # 150 dpi at 100 % zoom
                    output.metadata["image/png"] = shape
        if cell.source.strip() or cell.get("outputs"):
            cells.append(cell)
    notebook.cells = cells
    exporter = HTMLExporter(
        template_name="basic",
        template_file="notebook.html.j2",
        extra_loaders=[FileSystemLoader(TEMPLATES)],
        exclude_anchor_links=True,
    )
    exporter.register_preprocessor(
        "nbconvert.preprocessors.HighlightMagicsPreprocessor", enabled=False
    )
    priority = [
        "text/html",
        "text/markdown",
        "image/svg+xml",
        "image/png",
        "image/jpeg",
        "text/plain",
    ]
    exporter.config.NbConvertBase.display_data_priority = priority
    found, _ = exporter.from_notebook_node(notebook)
    return re.sub(r"<script\b.*?</script>", "", found, flags=re.S | re.I)


def _png_width(data: str) -> int:
    return struct.unpack(">I", base64.b64decode("".join(data.split())[:32])[16:20])[0]
