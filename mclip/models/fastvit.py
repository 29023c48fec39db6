"""A MobileCLIP-like image tower for pictures of 32 pixels, registered with timm when mclip.models
is imported.

open_clip then makes it from `{"timm_model_name": "mclip_mci_s16", "timm_pool": "avg", "timm_proj":
"linear"}`.

MobileCLIP's MCi towers (papers.md 2.4) are FastViTs: RepMixer stages, then one of attention, every
convolution trained as several branches and folded into one for inference. This one has their parts
(MLP ratio 3, squeeze-excite in the last downsampling) with three stages instead of four, so that 32
pixels end as a map of 2 x 2 rather than 1 x 1.

What was tried (11,520 samples of `combined`, one seed; ms: the image tower's part of a step of 128
on one CPU thread, in one run; then CIFAR-10 zero-shot and unseen concepts R@1 in percent):

    a ResNet, 64 / 128 / 256        260 ms   33.6, 7.8
    this one, 64 / 128 / 256        537 ms   29.8, 7.1
    channels 48 / 96 / 192          373 ms   30.6, 4.6
    channels 32 / 96 / 192          306 ms   26.0, 5.6

The widest reaches the lowest loss of all (8.9 where the ResNet is at 9.0 and the others at 9.5 and
9.8). A second block in every stage (1.8 M parameters) costs 1.4 times as much and was not trained.
With 23,040 samples of `clip-cid` in batches of 128, two seeds, this one reached 38.1 and 11.8, the
ResNet 41.6 and 13.8; what the default gives now: reports/ablations/students.ipynb.
"""

from timm.models import register_model
from timm.models.fastvit import FastVit
from torch import Tensor, nn
from torch.nn import functional as F

from mclip.models.small import arguments, describe

FEW = 8  # input channels from which on oneDNN is right


@register_model
def mclip_mci_s16(pretrained: bool = False, **kwargs) -> FastVit:
    """Three stages of one block each, 64, 128 and 256 channels, the last with attention; stride 16,
    1.0 M parameters.

    pretrained : there are no weights; ValueError if they are asked for.
    """
    kwargs = arguments("mclip_mci_s16", pretrained, kwargs)
    # timm's layer scale begins at 1e-5: at a few hundred steps a block would hardly be there
    model = FastVit(
        layers=(1, 1, 1),
        embed_dims=(64, 128, 256),
        mlp_ratios=(3, 3, 3),
        pos_embs=(None, None, None),
        token_mixers=("repmixer", "repmixer", "attention"),
        downsamples=(False, True, True),
        se_downsamples=(False, False, True),
        down_patch_size=3,
        lkc_use_act=True,
        cls_ratio=1.0,
        layer_scale_init_value=0.1,
        **kwargs,
    )
    describe(model, "mclip_mci_s16", first_conv="stem.0", classifier="head.fc")
    return model


class StridedPointwise(nn.Conv2d):
    """A strided 1 x 1 convolution as one without a stride on the positions that it reads: the same
    values.
    """

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.stride
        return F.conv2d(x[..., ::down, ::across], self.weight, self.bias, groups=self.groups)


def avoid_crash(model: nn.Module) -> int:
    """Put a `StridedPointwise` in place of every convolution of a model that oneDNN may crash on.

    MobileCLIP's stems have one: 1 x 1, with a stride, from three channels. On a CPU, in
    channels-last memory, the backward pass of such a convolution of fewer than eight channels
    writes past its workspace (https://github.com/uxlfoundation/oneDNN/issues/6035, with torch 2.15
    on CPUs without AVX-512): the process ends with a segmentation fault or, worse, goes on.

    Returns
    -------
    how many there were.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d and _crashes(module)
    ]
    for name, old in found:
        new = nn.utils.skip_init(
            StridedPointwise,
            old.in_channels,
            old.out_channels,
            1,
            old.stride,
            groups=old.groups,
            bias=old.bias is not None,
        )
        new.weight, new.bias, new.training = old.weight, old.bias, old.training
        model.set_submodule(name, new)
    return len(found)


def _crashes(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (1, 1)
        and max(conv.stride) > 1
        and conv.padding in ((0, 0), "valid")
        and conv.in_channels < FEW
    )
