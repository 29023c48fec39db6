"""The examples in mclip.evaluate's docstrings run."""

import doctest

import pytest

from mclip.evaluate import fewshot, metrics, probe, suite, tasks
from mclip.evaluate.tasks import classification, retrieval

MODULES = [fewshot, metrics, probe, suite, tasks, classification, retrieval]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed
