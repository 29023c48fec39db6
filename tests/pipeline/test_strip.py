"""Source notebooks without outputs: what is stripped, what stays, and the check."""

import json

import nbformat
from nbformat import v4

from mclip import cli
from mclip.pipeline import strip


def dirty_notebook() -> str:
    nb = v4.new_notebook(
        metadata={
            "kernelspec": {"name": "mine", "display_name": "x"},
            "language_info": {"name": "python", "version": "3.11.2"},
        }
    )
    code = v4.new_code_cell(
        "1 + 1",
        execution_count=7,
        metadata={"tags": ["parameters"], "collapsed": True},
        outputs=[v4.new_output("execute_result", {"text/plain": "2"}, execution_count=7)],
    )
    nb.cells = [v4.new_markdown_cell("# Why?"), code, v4.new_code_cell("")]
    return nbformat.writes(nb)


def test_outputs_counts_and_metadata_go_source_and_tags_stay():
    nb = nbformat.reads(strip.stripped(dirty_notebook()), as_version=4)
    nbformat.validate(nb)
    assert nb.metadata == {"kernelspec": strip.KERNELSPEC}
    assert [c.id for c in nb.cells] == ["cell-0", "cell-1"]  # JupyterLab's empty last cell is gone
    assert nb.cells[1].source == "1 + 1"
    assert nb.cells[1].metadata == {"tags": ["parameters"]}
    assert nb.cells[1].outputs == [] and nb.cells[1].execution_count is None


def test_stripping_twice_changes_nothing():
    once = strip.stripped(dirty_notebook())
    assert strip.stripped(once) == once


def test_old_notebooks_are_upgraded():
    nb = json.loads(dirty_notebook())
    nb["nbformat_minor"] = 2
    for cell in nb["cells"]:
        del cell["id"]
    assert strip.stripped(json.dumps(nb)) == strip.stripped(dirty_notebook())


def test_check_lists_offenders_and_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "notebooks" / "ablations" / "x.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(dirty_notebook())
    checkpoint = path.parent / ".ipynb_checkpoints" / "x.ipynb"
    checkpoint.parent.mkdir()
    checkpoint.write_text(dirty_notebook())
    before = path.read_text()
    assert cli.main(["strip", "--check"]) == 1
    assert (
        capsys.readouterr().out == "notebooks/ablations/x.ipynb: not stripped: run `mclip strip`\n"
    )
    assert path.read_text() == before
    assert cli.main(["strip"]) == 0
    assert cli.main(["strip", "--check"]) == 0
    path.write_text("{")
    assert cli.main(["strip", "--check"]) == 1
    assert "not a readable notebook" in capsys.readouterr().err
