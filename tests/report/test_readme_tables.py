"""The tables of README's "What comes out" are those of the committed metrics, to the digit."""

import subprocess
from pathlib import Path

import pandas as pd
import pytest

from mclip import params
from mclip.data.stores import metrics
from mclip.report import compare
from mclip.studies import ablate

ROOT = Path(__file__).parents[2]
SETS = [
    "cifar10",
    "emoji-unseen",
    "emoji-subgroup",
    "openmoji-color",
    "openmoji-black",
    compare.HELD_OUT,
]  # README's order


@pytest.fixture(autouse=True)
def committed():
    """Who has changed a number and run the pipeline has other metrics than README."""
    same = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", "reports/metrics"], cwd=ROOT, check=False
    )
    if same.returncode:
        pytest.skip(
            "reports/metrics are of another run than the committed one, or this is no git repository"
        )


def table(corner: str) -> dict[str, list[str]]:
    """The rows, by their first cell, of README's table with this first cell."""
    lines = (ROOT / "README.md").read_text().splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"| {corner} |")]
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name.strip("`")] = cells
    return rows


def shown(main: pd.DataFrame) -> dict[str, list[str]]:
    """What the reports show of `compare.main_metric`'s recipes, the sets in README's order."""
    in_order = pd.concat([main[main["set"] == name] for name in SETS])
    spreads = compare.spreads(in_order, {name: name for name in in_order["recipe"]})
    return dict(zip(spreads.index, spreads.values.tolist(), strict=True))


@pytest.mark.slow
def test_the_recipes_and_their_teachers():
    p = params.load(ROOT / "params.yaml")
    frame, missing = metrics.read_seeds(p.distill.recipes, ROOT / "reports/metrics")
    found = shown(compare.main_metric(frame))
    for row in compare.main_rows(metrics.read_metrics(ROOT / "reports/metrics"), p.evaluate.sets):
        if row.group == "teacher":
            found.setdefault(f"teacher {row.name}", [""] * len(SETS))[SETS.index(row.set)] = (
                f"{100 * row.mean:.1f}"
            )
    assert not missing and table("%") == found


@pytest.mark.slow
def test_the_recipes_after_ten_times_the_samples():
    main = ablate.by_samples(
        compare.main_metric(pd.read_csv(ROOT / "reports/metrics/ablations/long.csv"))
    )
    assert table("% after 192,000 samples") == shown(main[main["samples"] == 192_000])
