"""What the image towers for pictures of 32 pixels share: timm makes them, without weights."""

from typing import Any

from torch import nn


def arguments(name: str, pretrained: bool, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a tower, of those `given` by timm's create_model; ValueError where weights
    are asked for.
    """
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights")
    return {k: v for k, v in given.items() if not k.startswith("pretrained_") and k != "cache_dir"}


def describe(model: nn.Module, name: str, *, first_conv: str, classifier: str) -> None:
    """Set the tower's `default_cfg`, which timm and open_clip read."""
    model.default_cfg = {  # type: ignore[assignment]
        "architecture": name,
        "input_size": (3, 32, 32),
        "pool_size": (2, 2),
        "num_classes": model.num_classes,
        "first_conv": first_conv,
        "classifier": classifier,
    }
