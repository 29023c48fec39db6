"""The terms of a recipe's loss (papers.md 1.5 and 2.2): one a file, found by its name.

A file NAME.py here has one subclass of `Term`, which says all about it. From then on a recipe of
params.yaml may have `weight: {NAME: 1.0}` and, where the term has options, a key `NAME: {...}`;
the trainer makes and computes it. No other list has its name.

params.yaml is checked against these files (mclip/params/terms.py), so they import nothing heavy:
torch and `mclip.losses` within the methods that need them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    from mclip.params import Recipe, Train


@dataclass(frozen=True)
class Given:
    """What a run has for its terms.

    Attributes
    ----------
    student_dim : int
        Width of the student's embeddings.
    ensemble : list of dict
        The teachers of the reinforced set: each one's `name`, `slice` of the stored embeddings and
        `logit_scale`; empty where the pairs are not reinforced.
    centres : Tensor, shape (clusters, teacher's width), optional
        The cluster centres; there where a term needs "teacher".
    seed : int
    backend, group
        For the losses of `mclip.losses`.
    """

    student_dim: int
    ensemble: list[dict]
    centres: Tensor | None
    seed: int
    backend: str
    group: ProcessGroup | None


class Options(pydantic.BaseModel):
    """The keys that a recipe may give a term; a term's own is a subclass."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Term:
    """A term of a recipe's loss; an instance is that of one run.

    Attributes
    ----------
    title : str
        What it is called in text.
    order : int
        Its place among the terms, which are made and computed one after the other: another order
        changes the last bits of a run.
    options : type of Options, optional
        The schema of the recipe's key of its name, every key with a default; None: no such key.
    needs : frozenset of str
        Data beside pictures and captions. "teacher": the cluster teacher's embeddings of each pair.
        "label": the cluster of each pair, which only pairs that `balance` kept have; with
        "teacher". "ensemble": the stored embeddings of reinforced pairs.
    per_caption : bool
        Is it summed over the true and the synthetic caption (`synthetic` of the recipe)?
    """

    title: ClassVar[str]
    order: ClassVar[int] = 100
    options: ClassVar[type[Options] | None] = None
    needs: ClassVar[frozenset[str]] = frozenset()
    per_caption: ClassVar[bool] = False

    def __init__(self, chosen: Any, given: Given):
        """chosen : the recipe's `options`; None where the term has none."""
        self.chosen, self.given = chosen, given
        self.learned = self.build()

    @classmethod
    def factor(cls, recipe: Recipe) -> float:
        """What the recipe's weight of this term is multiplied by."""
        return 1.0

    def build(self) -> nn.Module | None:
        """The parameters that only training needs, kept as `self.learned`; None: there are none."""
        return None

    def learning_rates(self, train: Train) -> dict[str, float]:
        """Highest learning rates of those parameters that have one of their own, by name.

        They have no weight decay; the others are treated as the student's.
        """
        return {}

    def loss(self, batch: Mapping[str, Tensor], logit_scale: Tensor) -> Tensor:
        """The term of a batch, a scalar.

        Parameters
        ----------
        batch
            image, text (b, d): the student's unit-norm rows. ids (b,): of the captions, None where
            samples that share one are each other's negatives. By `needs`: label (b,),
            teacher_image, teacher_text (b, teacher's width); ensemble_image, ensemble_text.
        logit_scale
            Exponentiated.
        """
        raise NotImplementedError


def every() -> dict[str, type[Term]]:
    """The terms by name, in their order."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        content = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        mine = [x for x in content if isinstance(x, type) and issubclass(x, Term) and x is not Term]
        if len(mine) != 1:
            raise TypeError(f"{__name__}.{module.name}: expected one Term, found {len(mine)}")
        found[module.name] = mine[0]
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


def needs(weight: Mapping[str, float]) -> dict[str, list[str]]:
    """The side data that terms with a weight above 0 need, each with the names of those terms."""
    out: dict[str, list[str]] = {}
    for name, term in every().items():
        for need in term.needs if weight[name] else ():
            out.setdefault(need, []).append(name)
    return out
