"""MCt, the text encoder of MobileCLIP-S0 (papers.md 2.4; arXiv 2311.17049, section 4,
"Text-RepMixer").

A transformer of four layers between two convolutional blocks. Their 1-D kernels, eleven tokens
wide, have several branches in training and are one convolution each at inference (`reparameterize`,
which timm's `reparameterize_model` calls for `mclip.models.for_inference`). In all 42.4 M
parameters, 25.3 M of them the token embedding.

open_clip has neither the tower nor a place to register one. What builds it is one function of
open_clip, `open_clip.model._build_text_tower`: `register`, which importing mclip.models calls, lays
another over it that looks for `mclip_mct_kernel` in a configuration's `text_cfg` and leaves every
other configuration alone. The tower is open_clip's own TextTransformer with a RepMixerBlock before
and after its layers, so that its factory makes, saves, loads, locks and checkpoints it as any
other; open_clip without mclip refuses such a folder, naming that key.

Names and shapes are those of the published checkpoint (mobileclip_s0.pt) below `text_encoder.`;
those of the transformer layers become open_clip's as for MobileCLIP-S1 and -S2, and open_clip's own
converter does it:

    published, below text_encoder.                        here, below text.
    embedding_layer.weight               (49408, 512)     token_embedding.weight
    positional_embedding.pos_embed.pos_embed (1,1,77,512) positional_embedding            (77, 512)
    transformer.{0,5}.token_mixer.norm.rbr_skip.*         transformer.resblocks.{0,5}.    the same
    transformer.{0,5}.token_mixer.mixer.rbr_skip.*
    transformer.{0,5}.token_mixer.mixer.rbr_conv.0.conv.weight (512, 1, 1, 11), .bn.*
    transformer.{0,5}.token_mixer.layer_scale, layer_scale     (512, 1, 1)
    transformer.{0,5}.convffn.conv.conv.weight            (512, 1, 1, 11), convffn.conv.bn.*
    transformer.{0,5}.convffn.fc1.*, fc2.*                (2048, 512, 1, 1), (512, 2048, 1, 1)
    transformer.{1..4}.pre_norm_mha.{0, 1.qkv_proj, 1.out_proj}.*
                                                          .ln_1, .attn.in_proj_*, .attn.out_proj
    transformer.{1..4}.pre_norm_ffn.{0, 1, 4}.*           .ln_2, .mlp.c_fc, .mlp.c_proj
    final_layer_norm.*, projection_layer (512, 512)       ln_final.*, text_projection
"""

import functools
from typing import Any

import open_clip.model
import open_clip.pretrained
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

KEY = "mclip_mct_kernel"  # of text_cfg: the width of the kernels, in tokens
START = 1e-5  # of a layer scale: a new block passes its input on


def depthwise(width: int, kernel: int, *, bias: bool = False) -> nn.Conv2d:
    """A convolution along the tokens, one channel at a time: (b, width, 1, tokens) to the same
    shape.
    """
    return nn.Conv2d(width, width, (1, kernel), padding=(0, kernel // 2), groups=width, bias=bias)


def conv_norm(width: int, kernel: int) -> nn.Sequential:
    module = nn.Sequential()
    module.add_module("conv", depthwise(width, kernel))
    module.add_module("bn", nn.BatchNorm2d(width))
    return module


class Branches(nn.Module):
    """The sum of a normalised skip and of `convolutions` normalised depthwise convolutions."""

    def __init__(self, width: int, kernel: int, convolutions: int):
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(width)
        if convolutions:
            self.rbr_conv = nn.ModuleList(conv_norm(width, kernel) for _ in range(convolutions))

    def forward(self, x: Tensor) -> Tensor:
        out = self.rbr_skip(x)
        for branch in getattr(self, "rbr_conv", ()):
            out = out + branch(x)
        return out

    def merged(self, kernel: int) -> tuple[Tensor, Tensor]:
        """The one convolution that does the same in eval mode, float64: weight (width, 1, 1,
        kernel), bias (width,).
        """
        scale, bias = _affine(self.rbr_skip)
        weight = scale.new_zeros(len(scale), 1, 1, kernel)
        weight[..., kernel // 2] = scale[:, None, None]
        for branch in getattr(self, "rbr_conv", ()):
            scale, shift = _affine(branch.bn)
            weight += scale[:, None, None, None] * branch.conv.weight.double()
            bias = bias + shift
        return weight, bias


class RepMixer(nn.Module):
    """Mixes tokens: x + layer_scale * (mixer(x) - norm(x)), in eval mode one depthwise convolution.

    x : (b, width, 1, tokens), as the result.
    """

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.width, self.kernel = width, kernel
        self.norm = Branches(width, kernel, 0)
        self.mixer = Branches(width, kernel, 1)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), START))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam_conv"):
            return self.reparam_conv(x)
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Become one convolution, in place; once is as good as twice."""
        if hasattr(self, "reparam_conv"):
            return
        (weight, bias), (weight_norm, bias_norm) = (
            self.mixer.merged(self.kernel),
            self.norm.merged(self.kernel),
        )
        scale = self.layer_scale.double()
        weight = scale[..., None] * (weight - weight_norm)
        weight[..., self.kernel // 2] += 1
        conv = depthwise(self.width, self.kernel, bias=True).to(self.layer_scale)
        conv.weight.copy_(weight)
        conv.bias.copy_(scale.flatten() * (bias - bias_norm))
        del self.norm, self.mixer, self.layer_scale
        self.reparam_conv = conv.requires_grad_(False)


class ConvFFN(nn.Module):
    """A normalised depthwise convolution, then two pointwise ones with `ratio` times the width
    between them.

    The pointwise ones have the published shapes, (out, in, 1, 1), and are multiplied as the
    matrices that they are: half the time of a convolution at batch 1 on a CPU.
    """

    def __init__(self, width: int, kernel: int, ratio: int = 4):
        super().__init__()
        self.conv = conv_norm(width, kernel)
        self.fc1 = nn.Conv2d(width, ratio * width, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(ratio * width, width, 1)
        for layer in (self.conv.conv, self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        for layer in (self.fc1, self.fc2):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).squeeze(2).transpose(1, 2)
        x = F.linear(x, self.fc1.weight.flatten(1), self.fc1.bias)
        x = F.linear(self.act(x), self.fc2.weight.flatten(1), self.fc2.bias)
        return x.transpose(1, 2).unsqueeze(2)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Batch norm into the convolution before it, in place."""
        if isinstance(self.conv, nn.Sequential):
            conv: Any = self.conv
            self.conv = fuse_conv_bn_eval(conv.conv, conv.bn).requires_grad_(False)


class RepMixerBlock(nn.Module):
    """A block of open_clip's Transformer that mixes tokens by convolution: (b, tokens, width) to
    the same shape.
    """

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.token_mixer = RepMixer(width, kernel)
        self.convffn = ConvFFN(width, kernel)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), START))

    def get_weight_dtype(self) -> torch.dtype:  # what open_clip asks the first block for
        return self.convffn.fc1.weight.dtype

    def forward(
        self, x: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """x : (b, tokens, width). Keys, values and a mask are for attention: the block takes and
        leaves them.
        """
        x = x.transpose(1, 2).unsqueeze(2)
        x = self.token_mixer(x)
        x = x + self.layer_scale * self.convffn(x)
        return x.squeeze(2).transpose(1, 2)


def register() -> None:
    """Teach open_clip's factory the tower and where its published weights lie; called once more it
    does nothing.
    """
    plain = open_clip.model._build_text_tower
    if hasattr(plain, "mct"):
        return

    @functools.wraps(plain)
    def build(embed_dim, text_cfg, *args, **kwargs):
        if not (isinstance(text_cfg, dict) and KEY in text_cfg):
            return plain(embed_dim, text_cfg, *args, **kwargs)
        kernel = text_cfg[KEY]
        if not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"text_cfg.{KEY}: expected an odd number of tokens, found {kernel!r}")
        tower = plain(embed_dim, {k: v for k, v in text_cfg.items() if k != KEY}, *args, **kwargs)
        if tower.attn_mask is not None:
            raise ValueError(
                f"text_cfg.{KEY} needs no_causal_mask: true (its convolutions see later tokens)"
            )
        first, last = (RepMixerBlock(tower.width, kernel) for _ in range(2))
        tower.transformer.resblocks = nn.ModuleList([first, *tower.transformer.resblocks, last])
        return tower

    build.mct = True  # type: ignore[attr-defined]
    open_clip.model._build_text_tower = build
    s1 = open_clip.pretrained._PRETRAINED["MobileCLIP-S1"]["datacompdr"]
    published = {"datacompdr": s1 | {"hf_hub": "apple/MobileCLIP-S0/mobileclip_s0.pt"}}
    open_clip.pretrained._PRETRAINED.setdefault("MobileCLIP-S0", published)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm does in eval mode, float64: x -> scale * x + shift, both (channels,)."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - scale * norm.running_mean.double()
