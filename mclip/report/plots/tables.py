"""Data frames as tables."""

import html
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd


def table(
    frame: pd.DataFrame,
    *,
    caption: str = "",
    digits: int = 1,
    formats: dict[str, Callable[[Any], str]] | None = None,
    best: Iterable[str] = (),
) -> None:
    """Show a data frame: numbers to the right, fixed digits; the highest of columns `best` bold."""
    formats, best = dict(formats or {}), set(best)

    def show(column: str, value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        if column in formats:
            return formats[column](value)
        if isinstance(value, float | np.floating):
            return f"{value:.{digits}f}"
        return (
            f"{value:,}"
            if isinstance(value, int | np.integer) and not isinstance(value, bool)
            else str(value)
        )

    text = pd.DataFrame(
        {c: [show(c, v) for v in frame[c]] for c in frame.columns}, index=frame.index
    )
    numeric = {c for c in frame.columns if pd.api.types.is_numeric_dtype(frame[c]) or c in formats}
    top = {c: set(np.flatnonzero(frame[c] == frame[c].max())) for c in best if len(frame)}
    index = (
        [str(name) for name in frame.index] if not isinstance(frame.index, pd.RangeIndex) else None
    )

    def align(column: str) -> str:
        return f'style="text-align: {"right" if column in numeric else "left"}"'

    def cell(row: int, column: str) -> str:
        value = html.escape(text[column].iloc[row])
        value = f"<strong>{value}</strong>" if row in top.get(column, ()) else value
        return f"<td {align(column)}>{value}</td>"

    names = [f'<th scope="col" {align(c)}>{html.escape(str(c))}</th>' for c in frame.columns]
    if index is not None:
        names.insert(
            0,
            f'<th scope="col" style="text-align: left">{html.escape(frame.index.name or "")}</th>',
        )
    rows = []
    for row in range(len(frame)):
        cells = [cell(row, c) for c in frame.columns]
        if index is not None:
            cells.insert(
                0, f'<th scope="row" style="text-align: left">{html.escape(index[row])}</th>'
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = "<tbody>\n" + "\n".join(rows) + "\n</tbody>"
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    from IPython.display import display

    plain = text.to_string(index=index is not None)
    display(
        {
            "text/html": f"<table>{title}<thead><tr>{''.join(names)}</tr></thead>{body}</table>",
            "text/plain": f"{caption}\n{plain}" if caption else plain,
        },
        raw=True,
    )


def verdicts(found: pd.DataFrame, titles: Mapping[str, str], *, caption: str = "") -> None:
    """Show what `mclip.report.compare.verdicts` found, in points; titles: recipe -> what to call
    it.
    """
    points = {
        name: 100 * found[column]
        for name, column in (("difference, points", "difference"), ("from", "low"), ("to", "high"))
    }
    shown = pd.DataFrame(
        {
            "recipe": found["recipe"].map(titles),
            "set": found["set"],
            "kind": found["kind"],
            **points,
            "verdict": found["verdict"],
        }
    )
    table(
        shown.reset_index(drop=True),
        caption=caption,
        formats=dict.fromkeys(points, "{:+.1f}".format),
    )


def claims(settled: pd.DataFrame, *, caption: str) -> None:
    """Show what `mclip.report.claims.settle` found; without the column outcome where it is not
    given.
    """
    points = ["difference", "low", "high", "se_seeds", "se_items"]
    columns = ["claim", "outcome", "paper", *points, "adjusted", "verdict"]
    table(
        settled[[name for name in columns if name in settled]],
        caption=caption,
        formats={**dict.fromkeys(points, "{:+.1f}".format), "adjusted": "{:.3f}".format},
    )
