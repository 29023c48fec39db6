"""The tables of README's "What comes out" are those of the committed metrics, to the digit."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from mclip import params
from mclip.data.stores import metrics
from mclip.report import compare

ROOT = Path(__file__).parents[2]
SETS = [
    "cifar10",
    "emoji-unseen",
    "emoji-subgroup",
    "openmoji-color",
    "openmoji-black",
    compare.HELD_OUT,
]  # README's order


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """params.yaml and reports/metrics of the commit: whoever has run the pipeline since has others."""
    if not (ROOT / ".git").exists():
        return ROOT  # an archive of a commit
    folder = tmp_path_factory.mktemp("committed")
    command = ["git", "archive", "HEAD", "params.yaml", "reports/metrics", "reports/claims.json"]
    archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


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
def test_the_recipes_and_their_teachers(committed):
    p = params.load(committed / "params.yaml")
    frame, missing = metrics.read_seeds(p.distill.recipes, committed / "reports/metrics")
    found = shown(compare.main_metric(frame))
    for row in compare.main_rows(
        metrics.read_metrics(committed / "reports/metrics"), p.evaluate.sets
    ):
        if row.group == "teacher":
            found.setdefault(f"teacher {row.name}", [""] * len(SETS))[SETS.index(row.set)] = (
                f"{100 * row.mean:.1f}"
            )
    assert not missing and table("%") == found


@pytest.mark.slow
def test_the_claims(committed):
    rows = json.loads((committed / "reports/claims.json").read_text())
    p = params.load(committed / "params.yaml")
    asked = {"recipes": p.distill.claims} | {k: s.claims for k, s in p.ablations.studies.items()}
    assert {(row["study"], row["claim"]) for row in rows} == {
        (study, claim.claim) for study, claims in asked.items() for claim in claims
    }
    assert table("claim") == {
        row["claim"]: [
            row["paper"] or "–",
            f"{row['difference']:+.1f} ({row['low']:.1f} to {row['high']:.1f})",
            row["verdict"],
        ]
        for row in rows
    }
