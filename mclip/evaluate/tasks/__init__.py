"""What a set can be evaluated for: one module of this package a task, found by its name.

`task: retrieval` of an evaluation set in params.yaml is `mclip/evaluate/tasks/retrieval.py`. To add
a task, add its file; nothing else lists them. The set then names its `metric:` itself. A task's
module holds what `Task` describes; `classification.py` and `retrieval.py` are the examples.

>>> from mclip.evaluate import tasks
>>> tasks.get("retrieval").MAIN
'mean_r1'
"""

import pkgutil
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from mclip.data.evalsets import Answer, EvalError, Split
from mclip.params import EvalSet

# texts -> each model's (texts, d) unit-norm embeddings of them
Encode = Callable[[Sequence[str]], list[Tensor]]


class Scores(NamedTuple):
    """What a task makes of the features of one set. The lists are in the order of the models."""

    gallery: list[str]  # the texts that pictures are compared with: class names or captions
    texts: list[Tensor]  # (gallery, d) unit-norm embeddings of them
    metrics: list[dict[str, float]]  # 0 to 1
    chance: dict[str, float]  # what guessing scores in these metrics, and in a linear probe
    # each picture's share of the set's main metric, (n,) a model: their mean is the metric; empty
    # where the metric is no mean over pictures, such as F1
    items: Sequence[np.ndarray] = ()


class Task(Protocol):
    """What the module of a task holds."""

    TITLE: str
    ANSWER: Answer  # which file of a sample says what is right for its picture, and how to read it
    TEXTS: str  # what pictures are compared with, in the plural: "classes"
    METRICS: tuple[str, ...]  # all that `score` may give
    MAIN: str  # the one that stands for a set whose entry names none
    PROBE: bool  # answers are class numbers: a linear probe and few-shot can learn them

    def check(self, split: Split, path: str) -> None:
        """Raise EvalError where the set in the folder `path` can't be scored."""

    def gallery(self, split: Split) -> list[str]:
        """The texts that pictures are compared with: all classes, or each caption once."""

    def prompts(self, split: Split, text: str) -> list[str]:
        """What is encoded for a text of the gallery; its embedding is their mean."""

    def right(self, split: Split) -> list[list[str]]:
        """For each picture, the texts of the gallery that are right for it."""

    def score(
        self, split: Split, spec: EvalSet, images: Sequence[Tensor], encode: Encode
    ) -> Scores:
        """Compare each model's (n, d) unit-norm pictures with the set's texts.

        `encode` knows the prompts of the gallery only: each is encoded once for all sets.
        """


def names() -> list[str]:
    """The names of all tasks: this package's modules."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Task:
    """The module of a task.

    Parameters
    ----------
    name : str
        Its file's name: "classification".

    Raises
    ------
    EvalError
        There is no such file.
    """
    if name not in names():
        raise EvalError(f"{name!r} is none of {', '.join(names())}")
    return import_module(f"{__name__}.{name}")
