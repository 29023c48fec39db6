"""timm trunks as the vision tower of open_clip's CoCa, which needs a vector and tokens of an image.

open_clip's own timm towers give the vector only. These are registered with timm when mclip.models
is imported; open_clip then makes them from `{"timm_model_name": "mclip_tokens_efficientnet_lite0",
"timm_proj": ""}`.
"""

import timm
from timm.models import register_model
from torch import Tensor, nn


class Tokens(nn.Module):
    """A timm trunk as CoCa's vision tower: (b, 3, h, w) -> latent (b, d), tokens (b, h/32 * w/32,
    d).
    """

    def __init__(self, trunk: nn.Module, width: int):
        super().__init__()
        self.trunk = trunk
        self.norm = nn.LayerNorm(trunk.num_features)
        self.project = nn.Linear(trunk.num_features, width)
        self.latent = nn.Linear(width, width)
        self.default_cfg = trunk.default_cfg

    def features(self, images: Tensor) -> Tensor:
        """The trunk's last map, (b, tokens, channels)."""
        return self.trunk.forward_features(images).flatten(2).transpose(1, 2)

    def head(self, features: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.project(self.norm(features))
        return self.latent(tokens.mean(1)), tokens

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.features(images))


def _tokens(tower: str, num_classes: int, **kwargs) -> Tokens:
    kwargs = {k: v for k, v in kwargs.items() if k in ("drop_path_rate",)}
    return Tokens(timm.create_model(f"tf_{tower}", num_classes=0, **kwargs), num_classes)


@register_model
def mclip_tokens_efficientnet_lite0(pretrained=False, num_classes=256, **kwargs):
    return _tokens("efficientnet_lite0", num_classes, **kwargs)


@register_model
def mclip_tokens_efficientnet_lite1(pretrained=False, num_classes=256, **kwargs):
    return _tokens("efficientnet_lite1", num_classes, **kwargs)


@register_model
def mclip_tokens_efficientnet_lite2(pretrained=False, num_classes=256, **kwargs):
    return _tokens("efficientnet_lite2", num_classes, **kwargs)
