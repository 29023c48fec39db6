"""Features that an evaluation compares: pictures and classes as several models see them, each made
once.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mclip.data.evalsets import Split, batches, same_pictures, without
from mclip.models import image_encoder
from mclip.system.threads import side_by_side


def image_features(
    models: Sequence[torch.nn.Module],
    split: Split,
    preprocess,
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    known: list[tuple[Split, list[int], dict[int, str], list[Tensor]]] | None = None,
) -> tuple[Split, list[Tensor]]:
    """Unit-norm (n, d) float32 embeddings of every readable picture by each model, decoded once for
    all.

    known : what these models have encoded so far, to which this is added; the same pictures are not
        encoded again.
    """
    for other, kept, broken, features in known or ():
        if same_pictures(split, other):
            return without(split, kept, broken), features
    kept, broken = [], {}
    encoders = [image_encoder(model, precision) for model in models]

    def pictures() -> Iterator[Tensor]:
        for indices, readable, bad in batches(split, preprocess, batch_size, workers):
            kept.extend(indices)
            broken.update(bad)
            if readable is not None:
                yield readable

    device = next(models[0].parameters()).device
    parts = list(
        side_by_side(lambda batch: [encode(batch) for encode in encoders], pictures(), device)
    )
    features = [torch.cat(own) for own in zip(*parts, strict=True)] or [
        torch.empty(0, 0) for _ in models
    ]
    if known is not None:
        known.append((split, kept, broken, features))
    return without(split, kept, broken), features


def prompts(split: Split) -> list[str]:
    """Every class in every template, class by class."""
    return [t.replace("{c}", name) for name in split.classes for t in split.templates or ["{c}"]]


def class_features(features: Tensor, classes: int) -> Tensor:
    """(classes * templates, d) unit-norm embeddings of `prompts` -> (classes, d): their mean,
    normalised again.
    """
    return F.normalize(features.view(classes, -1, features.shape[-1]).mean(1), dim=-1)


def once(tokenizer: Callable[[list[str]], Tensor]) -> Callable[[list[str]], Tensor]:
    """The tokenizer for models that are given the same texts, which it takes apart for the first of
    them only.
    """
    known: dict[tuple[str, ...], Tensor] = {}

    def tokenize(texts: list[str]) -> Tensor:
        if (key := tuple(texts)) not in known:
            known[key] = tokenizer(texts)
        return known[key]

    return tokenize
