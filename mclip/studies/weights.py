"""How wide the weights of a tower's last fully connected layer are (CLIP-CID, Figure 4).

arXiv 2408.09441.

    layers = weights.last_weights({("clip", 0): "local-dir:models/students/clip/seed0", ...})
    weights.densities({key: towers["text"][1] for key, towers in layers.items()})
    weights.numbers(layers, baseline="clip", near_zero=0.1)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import PositiveFloat

from mclip.params import Params, Section, absent

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn


class Settings(Section):
    """`ablations.weights`."""

    group: ClassVar[str] = "pictures"  # of the report's index
    baseline: str  # the recipe that the others are held against
    near_zero: PositiveFloat  # within so many standard deviations of its weights

    def check(self, p: Params) -> Iterator[str]:
        yield from absent("baseline", [self.baseline], p.distill.recipes, "recipe")


def last_layer(tower: nn.Module) -> tuple[str, Tensor]:
    """Name and weight of a tower's last fully connected layer before its pool: what CLIP-CID's
    Figure 4 shows.

    In the last block of a transformer or a MobileCLIP tower that is the second layer of the MLP. In
    a plain ResNet the last convolution of the main path stands for it (a fully connected layer from
    each position's neighbourhood). Depthwise convolutions, shortcuts, attention and heads do not
    count.
    """
    from torch import nn

    body = getattr(tower, "trunk", None) or getattr(tower, "transformer", None) or tower
    aside = {
        "attention",
        "attn",
        "attnpool",
        "classifier",
        "downsample",
        "fc",
        "head",
        "pooler",
        "se",
        "shortcut",
        "token_mixer",
    }
    found = [
        (name, m.weight)
        for name, m in body.named_modules()
        if not aside & set(name.split("."))
        and (isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1))
    ]
    if not found:
        raise ValueError(f"{type(tower).__name__} has no fully connected layer")
    return found[-1][0], found[-1][1].detach().float().cpu()


def last_weights(
    names: Mapping[tuple[str, int], str],
) -> dict[tuple[str, int], dict[str, tuple[str, Tensor]]]:
    """(recipe, seed) -> model string: each one's `last_layer` of its image and text tower; seed: of
    a random model.
    """
    import torch

    from mclip import models

    found = {}
    for (recipe, seed), name in names.items():
        torch.manual_seed(seed)
        model = models.create(name)[0]
        towers = {"image": model.get_submodule("visual"), "text": getattr(model, "text", model)}
        found[recipe, seed] = {kind: last_layer(tower) for kind, tower in towers.items()}
    return found


def densities(weights: Mapping[tuple[str, int], Tensor], bins: int = 81) -> pd.DataFrame:
    """Histograms as columns recipe, seed, weight (a bin's middle), density; common bins to the
    99.9th percentile.
    """
    import pandas as pd

    top = max(float(np.quantile(np.abs(w.numpy()), 0.999)) for w in weights.values())
    edges = np.linspace(-top, top, bins + 1)
    rows = []
    for (recipe, seed), w in weights.items():
        counts = np.histogram(w.numpy(), edges)[0]
        rows.append(
            pd.DataFrame(
                {
                    "recipe": recipe,
                    "seed": seed,
                    "weight": (edges[1:] + edges[:-1]) / 2,
                    "density": counts / w.numel() / np.diff(edges),
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


def numbers(
    weights: Mapping[tuple[str, int], Mapping[str, tuple[str, Tensor]]],
    *,
    baseline: str,
    near_zero: float,
) -> pd.DataFrame:
    """Widths of the weights: tower, recipe, seed, std, near_zero (share within near_zero x baseline
    std).
    """
    import pandas as pd

    rows = []
    for tower in next(iter(weights.values())):
        own = {key: towers[tower][1].numpy().ravel() for key, towers in weights.items()}
        limit = near_zero * np.mean(
            [w.std() for (recipe, _), w in own.items() if recipe == baseline]
        )
        rows += [
            (tower, *key, float(w.std()), float((np.abs(w) < limit).mean()))
            for key, w in own.items()
        ]
    return pd.DataFrame(rows, columns=["tower", "recipe", "seed", "std", "near_zero"])
