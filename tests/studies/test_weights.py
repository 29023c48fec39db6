"""mclip.studies.weights: the right layer, densities that add up, and widths against what they
are made of.
"""

import numpy as np
import pytest
import torch

from mclip import models
from mclip.studies import weights


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("demo-student", "layer3.0.conv2", "resblocks.1.mlp.c_proj"),
        ("demo-mci", "stages.2.blocks.0.mlp.fc2", "resblocks.1.mlp.c_proj"),
        ("demo-vit", "resblocks.3.mlp.c_proj", "resblocks.1.mlp.c_proj"),
    ],
)
def test_the_last_fully_connected_layer_of_a_tower(name, image, text):
    model = models.create(name)[0]
    assert weights.last_layer(model.visual)[0] == image
    found, weight = weights.last_layer(model)
    assert found == text and torch.equal(
        weight, model.get_parameter(f"transformer.{text}.weight").detach()
    )
    with pytest.raises(ValueError, match="ReLU has no fully connected layer"):
        weights.last_layer(torch.nn.ReLU())


def test_densities_add_up_and_share_their_bins():
    generator = torch.Generator().manual_seed(0)
    layers = {("clip", s): torch.randn(40, 50, generator=generator) for s in (0, 1)}
    layers |= {("wide", s): 2 * torch.randn(2000, generator=generator) for s in (0, 1)}
    frame = weights.densities(layers, bins=61)
    groups = frame.groupby(["recipe", "seed"])
    assert groups.size().eq(61).all() and groups["weight"].first().nunique() == 1
    area = groups["density"].sum() * frame["weight"].diff().iloc[1]
    assert area.between(0.995, 1.0001).all()
    middle = frame[frame["weight"].abs() < 0.1].groupby("recipe")["density"].mean()
    np.testing.assert_allclose(middle[["clip", "wide"]], [0.3989, 0.1995], rtol=0.15)


def test_numbers_of_a_uniform_layer():
    flat = {
        "image": ("a", torch.linspace(-1, 1, 100_001)),
        "text": ("b", torch.linspace(-3, 3, 100_001)),
    }
    half = {tower: (name, w / 2) for tower, (name, w) in flat.items()}
    frame = weights.numbers({("clip", 0): flat, ("other", 0): half}, baseline="clip", near_zero=0.1)
    frame = frame.set_index(["tower", "recipe"])
    std = 1 / 3**0.5
    np.testing.assert_allclose(
        frame.loc[("image", "clip"), ["std", "near_zero"]].astype(float), [std, std / 10], rtol=1e-3
    )
    np.testing.assert_allclose(
        frame.loc[("text", "other"), ["std", "near_zero"]].astype(float),
        [1.5 * std, std / 5],
        rtol=1e-3,
    )


@pytest.mark.slow
def test_towers_of_models_by_name_and_seed():
    found = weights.last_weights(
        {("untrained", 0): "demo-student", ("untrained", 1): "demo-student"}
    )
    first, second = (found["untrained", s]["text"][1] for s in (0, 1))
    assert first.shape == (128, 512) and not torch.equal(first, second)
    assert torch.equal(first, weights.last_weights({("x", 0): "demo-student"})["x", 0]["text"][1])
