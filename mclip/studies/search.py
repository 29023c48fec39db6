"""Text to image search over an evaluation set: which pictures a model finds for a text, and whether
they are right.

    task = tasks.get("retrieval")
    split = evalsets.read_split("data/eval/emoji-unseen", task.ANSWER)
    questions = search.questions(split, task)  # its captions; or search.free(["a car"])
    found = search.search("local-dir:models/students/clip/seed0", split, questions)
    found[:, :5]                               # for each text its five best pictures' rows
    search.precision(found, questions, 5)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from pydantic import PositiveInt

from mclip.params import Params, Section, absent

if TYPE_CHECKING:
    from mclip.data.evalsets import Split
    from mclip.evaluate.tasks import Task


class Settings(Section):
    """`ablations.search`."""

    group: ClassVar[str] = "pictures"  # of the report's index
    recipe: str  # of the distilled student, side by side with
    baseline: str
    set: str  # of evaluate.sets; a classification set is asked for its classes
    queries: list[str]  # []: the set's own, evenly spread
    rows: PositiveInt  # queries shown
    top: PositiveInt  # pictures a query

    def check(self, p: Params) -> Iterator[str]:
        yield from absent("recipe", [self.recipe], p.distill.recipes, "recipe")
        yield from absent("baseline", [self.baseline], p.distill.recipes, "recipe")
        yield from absent("set", [self.set], p.evaluate.sets, "evaluation set")


class Questions(NamedTuple):
    """Texts to search for."""

    texts: list[str]
    prompts: list[list[str]]  # what is encoded for each text: itself, or a class in every template
    right: np.ndarray | None  # (texts, pictures) bool; None: nobody knows


def questions(split: Split, task: Task) -> Questions:
    """A set's own texts, each once: its captions in order of appearance, or its classes that have
    pictures.
    """
    right = [set(own) for own in task.right(split)]
    asked = set().union(*right)
    texts = [text for text in dict.fromkeys(task.gallery(split)) if text in asked]
    prompts = [task.prompts(split, text) for text in texts]
    matrix = np.array([[text in own for own in right] for text in texts])
    return Questions(texts, prompts, matrix)


def free(texts: Sequence[str]) -> Questions:
    """Texts of one's own."""
    return Questions(list(texts), [[text] for text in texts], None)


def search(name: str, split: Split, asked: Questions, *, batch_size: int = 128) -> np.ndarray:
    """(texts, pictures): the rows of a set's pictures for each text, by cosine, the best first (of
    equals the first).

    name : of a model, see `models.create`. A text with several prompts is their mean, as in
        zero-shot classification.
    """
    import torch
    from torch.nn.functional import normalize

    from mclip import models
    from mclip.data.evalsets import read_image

    model, _, preprocess, tokenizer = models.create(name)
    model = models.for_inference(model)
    parts = (split.places[i : i + batch_size] for i in range(0, len(split.places), batch_size))
    pictures = models.encode_images(
        model,
        (torch.stack([preprocess(read_image(place)) for place in part]) for part in parts),
        precision="fp32",
    )
    flat = models.encode_texts(
        model, tokenizer, [t for own in asked.prompts for t in own], precision="fp32"
    )
    texts = torch.stack([part.mean(0) for part in flat.split([len(own) for own in asked.prompts])])
    similarity = normalize(texts, dim=-1) @ pictures.T
    return similarity.argsort(dim=1, descending=True, stable=True).numpy()


def precision(found: np.ndarray, asked: Questions, top: int) -> np.ndarray:
    """(texts,) share of right pictures among the `top` first, of as many as can be right."""
    assert asked.right is not None
    hits = np.take_along_axis(asked.right, found[:, :top], axis=1).sum(1)
    return hits / np.minimum(asked.right.sum(1), min(top, found.shape[1]))


def chance(asked: Questions, top: int) -> float:
    """The mean `precision` of a search that orders pictures at random."""
    assert asked.right is not None
    right, pictures = asked.right.sum(1), asked.right.shape[1]
    top = min(top, pictures)
    return float((top * right / pictures / np.minimum(right, top)).mean())
