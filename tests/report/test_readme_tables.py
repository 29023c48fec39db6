"""The tables of README's "What comes out" are those of the committed metrics, to the digit."""

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from mclip.report import readme

ROOT = Path(__file__).parents[2]


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


@pytest.mark.slow
def test_the_recipes_and_their_teachers(committed):
    assert readme.results(committed) in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_claims(committed):
    assert readme.claims(committed) in (ROOT / "README.md").read_text()


def test_the_claims_are_added_once_then_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "results", lambda root: "| % | a |\n|---|---:|\n| new | 1 |")
    (tmp_path / "README.md").write_text("before\n\n| % | a |\n|---|---:|\n| old | 0 |\n\nafter\n")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    row = {"study": "recipes", "claim": "A", "paper": "+2", "difference": 1.25, "low": None}
    file = tmp_path / "reports/claims.json"
    file.parent.mkdir()
    for verdict in ("within noise", "holds"):
        other = {**row, "study": "terms", "claim": "B", "verdict": "other"}
        left = {**other, "study": "of another run", "claim": "C"}
        file.write_text(json.dumps([other, left, {**row, "high": None, "verdict": verdict}]))
        readme.write(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert text.count(f"| A | +2 | +1.2 | {verdict} |") == text.count("| claim |") == 1
        assert "| old |" not in text and text.index("| A |") < text.index("| B |")
        assert "| C |" not in text
        assert text.startswith("before\n\n| % |") and text.endswith("\n\nafter\n")


def test_a_table_that_is_missing_is_named():
    with pytest.raises(ValueError, match="0 tables"):
        readme.replace("no table", "%", "| % |")
