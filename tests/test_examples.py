"""The examples in the docstrings of mclip run."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "mclip").rglob("*.py")
    if ">>> " in path.read_text()
)


def test_there_are_examples():
    assert {"mclip.losses.cluster", "mclip.evaluate.metrics"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed
