"""README's result tables, written from the reports.

    python -m mclip.report.readme          # rewrites README.md in place

The tables are found by their first cell: `%` (the recipes and their teachers) and `claim`. What
stands between them stays.
"""

import re
from pathlib import Path

import pandas as pd

from mclip import params
from mclip.data.stores import metrics
from mclip.report import compare
from mclip.report.claims import read_joined

HEADINGS = {
    "cifar10": "CIFAR-10 zero-shot (in domain)",
    "emoji-unseen": "unseen emoji concepts, R@1",
    "emoji-subgroup": "unseen concepts, subgroups",
    "openmoji-color": "OpenMoji colour (unseen style)",
    "openmoji-black": "OpenMoji black (unseen style)",
    compare.HELD_OUT: "mean of held-out sets",
}


def markdown(corner: str, headings: list[str], rows: dict[str, list[str]]) -> str:
    """A Markdown table, a row an entry; the columns after the first to the right.

    Examples
    --------
    >>> from mclip.report import readme
    >>> print(readme.markdown("%", ["pets"], {"clip": ["30.7"]}))
    | % | pets |
    |---|---:|
    | clip | 30.7 |
    """
    lines = [[corner, *headings], *([name, *cells] for name, cells in rows.items())]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], f"|---|{'---:|' * len(headings)}", *text[1:]])


def replace(text: str, corner: str, table: str) -> str:
    """Put `table` in the place of the one whose first cell is `corner`.

    Raises
    ------
    ValueError
        If there is not exactly one such table.

    Examples
    --------
    >>> from mclip.report import readme
    >>> readme.replace("a\\n\\n| % | b |\\n|---|\\n\\nc", "%", "| % | new |")
    'a\\n\\n| % | new |\\n\\nc'
    """
    pattern = rf"^\| {re.escape(corner)} \|.*(?:\n\|.*)*"
    text, count = re.subn(pattern, lambda _: table, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"README: {count} tables with the first cell {corner!r}, not one")
    return text


def results(root: str | Path = ".") -> str:
    """The table of the recipes and their teachers, from reports/metrics."""
    root = Path(root)
    p = params.load(root / "params.yaml")
    folder = root / "reports/metrics"
    main = compare.main_metric(metrics.read_seeds(p.distill.recipes, folder)[0])
    in_order = pd.concat([main[main["set"] == name] for name in HEADINGS])
    spreads = compare.spreads(in_order, {name: f"`{name}`" for name in in_order["recipe"]})
    rows = dict(zip(spreads.index, spreads.values.tolist(), strict=True))
    teachers = [
        row
        for row in compare.main_rows(metrics.read_metrics(folder), p.evaluate.sets)
        if row.group == "teacher"
    ]
    for name in p.teachers.models:
        means = {row.set: f"{100 * row.mean:.1f}" for row in teachers if row.name == name}
        if means:
            rows[f"teacher {name}"] = [means.get(each, "–") for each in HEADINGS]
    return markdown("%", list(HEADINGS.values()), rows)


def claims(root: str | Path = ".") -> str:
    """The table of all claims, the recipes' first, from reports/claims.json."""
    root, rows = Path(root), {}
    studies = params.load(root / "params.yaml").ablations.studies
    settled = read_joined({"recipes", *studies}, root / "reports/claims.json")
    for row in sorted(settled, key=lambda row: row["study"] != "recipes"):
        here = f"{row['difference']:+.1f}"
        if row["low"] is not None:
            here += f" ({row['low']:+.1f} to {row['high']:+.1f})"
        rows[row["claim"]] = [row["paper"] or "–", here, row["verdict"]]
    return markdown("claim", ["paper", "here, points (95 % CI)", "verdict"], rows)


def write(root: str | Path = ".") -> None:
    """Rewrite README.md's tables; that of the claims is added below the first if it is missing."""
    root = Path(root)
    file = root / "README.md"
    table = results(root)
    text = replace(file.read_text(), "%", table)
    if (root / "reports/claims.json").exists():
        if "\n| claim |" in text:
            text = replace(text, "claim", claims(root))
        else:
            text = text.replace(table, f"{table}\n\n{claims(root)}")
    file.write_text(text)


if __name__ == "__main__":
    write()
