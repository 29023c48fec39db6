"""Build the report: every executed notebook as a self-contained page, and an index of the results.

    mclip report       # reports/**/*.ipynb -> reports/site/index.html and a page a notebook

In a notebook, `report.answer("...")` shows the result in one sentence; the index repeats it beside
the notebook's key figure (the first picture of the cell tagged "key-figure") and its title (the
first heading).

Pages hold everything they show: pictures as data URIs, own styles, no script and no outside
address; a content security policy keeps it so. The same notebooks, metrics and times give the same
bytes.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mclip import params
from mclip.data.stores.metrics import read_metrics, read_seeds
from mclip.report.claims import headline as verdict_of
from mclip.report.claims import read_joined
from mclip.report.compare import HELD_OUT, Row, chance_rows, main_rows
from mclip.report.pages import (
    ABLATIONS,
    GROUPS,
    OF_RECIPES,
    STAGES,
    TEMPLATES,
    ReportError,
    body,
    read_pages,
)
from mclip.system.files import whole_folder

ASKED = (
    "CLIP-CID (arXiv 2408.09441) and MobileCLIP (arXiv 2311.17049) each claim that a small image-"
    "text model learns more from the same training when a big one helps: the first by dropping "
    "near-duplicate images and distilling clusters and instances, the second by storing "
    "augmentations, synthetic captions and the teachers' embeddings once and matching their "
    "similarities. Here both recipes, their combination and plain CLIP train the same student on "
    "the same number of samples, several seeds each, and are compared on data that none of them "
    "has seen."
)


def answer(text: str) -> None:
    """Show the notebook's result in one sentence, in a form that `build` finds."""
    from IPython.display import display

    text = re.sub(
        r"(\d) (?=[%±])|(?<=±) (?=\d)",
        lambda m: m.group().replace(" ", "\u00a0"),
        " ".join(text.split()),
    )
    data = {
        "text/html": f'<p class="answer"><strong>{html.escape(text)}</strong></p>',
        "text/plain": text,
    }
    display(data, raw=True, metadata={"mclip": {"answer": True}})


# ---------------------------------------------------------------- numbers


def summary_table(
    rows: list[Row], recipes: dict[str, str], teachers: Sequence[str] = ()
) -> dict[str, Any]:
    """The index's table: a column a set (held-out mean first), a row a recipe, then the teachers
    and chance.
    """
    columns = list(dict.fromkeys((r.set, r.kind) for r in rows))
    columns.sort(key=lambda c: (c[0] != HELD_OUT, c[1] == "in domain"))

    def line(name: str) -> list[str]:
        cells = {r.set: r for r in rows if r.name == name}
        best = {
            c: max((r.mean for r in rows if r.set == c and r.group == "recipe"), default=None)
            for c, _ in columns
        }
        out = []
        for column, _ in columns:
            row = cells.get(column)
            if row is None:
                out.append("–")
                continue
            text = f"{100 * row.mean:.1f}"
            text = (
                f"<strong>{text}</strong>"
                if row.group == "recipe" and row.mean == best[column]
                else text
            )
            out.append(
                text + (f"<small>±{100 * row.std:.1f}</small>" if row.std is not None else "")
            )
        return out

    order = {name: i for i, name in enumerate([*recipes, *teachers])}
    groups = []
    for group, heading in (
        ("recipe", "Students, by recipe"),
        ("teacher", "Teachers: the ceiling"),
        ("chance", "Guessing"),
    ):
        names = sorted(
            {r.name for r in rows if r.group == group}, key=lambda name: (order.get(name, 99), name)
        )
        if names:
            groups.append((heading, [(recipes.get(name, name), line(name)) for name in names]))
    return {"columns": columns, "groups": groups}


def read_times(
    folder: Path, recipes: Sequence[str], asked: Collection[str]
) -> list[dict[str, Any]]:
    """reports/times/**/*.json in the order of the pipeline: stage, what of it (the recipe),
    seconds, memory.

    Of this run alone: its recipes and the ablations that are asked for.
    """
    out = []
    for path in folder.rglob("*.json"):
        entry = json.loads(path.read_text())
        if entry["stage"] == "report":  # its own time would make the site differ from run to run
            continue
        values = [str(v) for k, v in entry.items() if k not in ("stage", "seconds", "peak_rss_mb")]
        stage, _, name = entry["stage"].partition("/")
        if (stage in OF_RECIPES and values[0] not in recipes) or (
            stage == ABLATIONS and name not in asked
        ):
            continue
        out.append({"peak_rss_mb": None, "of": ", ".join(values), **entry})

    def order(entry: dict[str, Any]) -> tuple:
        stage, of, recipe = entry["stage"], entry["of"], list(recipes)
        known = STAGES.index(stage) if stage in STAGES else len(STAGES)
        return known, stage, recipe.index(of) if of in recipe else 99, of

    return sorted(out, key=order)


def clock(seconds: float) -> str:
    """9.3 s, 2 min 05 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def first_sentence(text: str) -> str:
    """The text up to its first full stop, question mark or semicolon before a space, for a card.

    Examples
    --------
    >>> from mclip.report import build
    >>> build.first_sentence("A gains 1.5 points; B none. See below.")
    'A gains 1.5 points.'
    """
    found = re.search(r"[.?!;](?=\s)", text)
    if not found:
        return text
    return text[: found.start()] + found.group().replace(";", ".")


# ---------------------------------------------------------------- the site


def asked(ablations: Any) -> set[str]:
    """The notebooks of notebooks/ablations that the section `ablations` asks for."""
    alone = {name for name, value in ablations if isinstance(value, params.Section)}
    return {*ablations.studies, *ablations.learning, *alone}


def build(
    reports: str | Path = "reports",
    out: str | Path = "reports/site",
    settings: str | Path = "params.yaml",
) -> Path:
    """Write the site, whole or not at all; returns its index.html."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    reports, out = Path(reports), Path(out)
    p = params.load(settings)
    recipes = {name: recipe.title for name, recipe in p.distill.recipes.items()}
    pages = read_pages(reports, recipes, asked(p.ablations))
    if not pages:
        raise ReportError(f"{reports}: no executed notebook to report on: run `dvc repro` first")
    metrics = read_metrics(reports / "metrics")
    metrics["recipe"] = {name: tree for name, tree in metrics["recipe"].items() if name in recipes}
    rows = main_rows(metrics, p.evaluate.sets) + chance_rows(
        read_seeds(recipes, reports / "metrics")[0]
    )
    claims = read_joined({"recipes", *asked(p.ablations)}, reports / "claims.json")
    headline = ""
    if recipes_claims := [row for row in claims if row["study"] == "recipes"]:
        headline = verdict_of(pd.DataFrame(recipes_claims), recipes_claims[0]["seeds"])
    missing = [name for name in p.evaluate.sets if name not in {r.set for r in rows}]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    grouped = [
        (name, heading, [x for x in pages if x.group == name]) for name, heading in GROUPS.items()
    ]
    style = Markup((TEMPLATES / "style.css").read_text() + _code_style())
    environment.globals |= {
        "style": style,
        "clock": clock,
        "first_sentence": first_sentence,
        "groups": [g for g in grouped if g[2]],
    }
    files: dict[str, str | bytes] = {}
    template = environment.get_template("page.html.j2")
    for i, page in enumerate(pages):
        near = {
            "before": pages[i - 1] if i else None,
            "after": pages[i + 1] if i + 1 < len(pages) else None,
        }
        files[f"{page.slug}.html"] = template.render(page=page, body=Markup(body(page)), **near)
    lead = next((page for page in pages if page.slug == "report"), None)
    if lead and lead.figure:  # for the README
        files["main.png"] = base64.b64decode(lead.figure)
    files["index.html"] = environment.get_template("front.html.j2").render(
        asked=ASKED,
        pages=pages,
        lead=lead,
        table=summary_table(rows, recipes, list(p.teachers.models)),
        cells=Markup,
        missing=missing,
        claims=claims,
        headline=headline,
        times=read_times(reports / "times", list(recipes), asked(p.ablations)),
        recipes=recipes,
        p=p,
        yaml=Path(settings).read_text(),
    )
    with whole_folder(out) as scratch:
        for name, content in files.items():
            (scratch / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return out / "index.html"


def _code_style() -> str:
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="xcode").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    keep = [re.findall(r"^\.highlight \.\w+ \{.*\}", text, re.M) for text in (light, dark)]
    return (
        "\n"
        + "\n".join(keep[0])
        + "\n@media (prefers-color-scheme: dark) {\n"
        + "\n".join(keep[1])
        + "\n}\n"
    )
