"""A ResNet for pictures of 32 pixels, registered with timm when mclip.models is imported.

open_clip then makes it from `{"timm_model_name": "mclip_resnet_s16", "timm_pool": "avg",
"timm_proj": "linear"}`.

timm's ResNets end at stride 32: their last stage sees 32 pixels as a map of 1 x 1, where eight
ninths of a 3 x 3 convolution multiply padding. That stage is a third of resnet10t's training step
and is worth about a point at equal samples; a narrower stem saves as much again. What was tried
(18,432 samples, 2 seeds, resnet10t 3; ms: the image tower's part of a step of 128 on one CPU
thread; then CIFAR-10 zero-shot and unseen concepts R@1 of two recipes):

    resnet10t           383 ms   clip 33.8, 11.1   combined 42.4, 13.0
    64, 128, 256        183 ms   clip 32.5,  9.8   combined 41.4, 12.0
    stem twice as wide  241 ms   clip 32.2,  9.7   combined 42.0, 11.0
    test_resnet, 48 px  172 ms   clip 30.8,  8.9   combined 40.8, 10.5
    test_byobnet, 64 px 149 ms   clip 29.1,  8.3   combined 34.1, 10.3

Then, with Muon and today's data (25,600 samples of clip, 1 seed; ms a sample in fp32; CIFAR-10 and
the held-out mean), narrower early stages cost less and lose nothing that one seed would show:

    64, 128, 256, stem 16   0.84 ms   33.1, 5.7
    32,  96, 256, stem 16   0.56 ms   34.1, 7.3
    48,  96, 256, stem 8    0.53 ms   34.4, 8.6   this one
    48,  96, 192, stem 8    not timed 31.4, 7.3

The map of the last stage is 4 x 4 going in and 2 x 2 after that, where oneDNN's convolutions reach
a third of their speed and multiply padding besides: `FewPositions` does them with matrix products,
in half the time (of the default's training step a tenth; forward and backward at a batch of 64 on
one CPU thread: 27 against 16 ms, 18 against 9 ms).
"""

import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from mclip.models.small import arguments, describe

FEW = 4  # positions of the output up to which one matrix product each is faster


class FewPositions(nn.Conv2d):
    """A convolution that, where its output has at most FEW positions, multiplies for each of them
    the part of the map that its kernel covers; elsewhere, and on a GPU, torch's own. The same
    parameters and, to rounding, values.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "FewPositions":
        """With the weights of a convolution of one group, without dilation or bias, that pads with
        zeros.
        """
        new = nn.utils.skip_init(
            cls,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            bias=False,
        )
        new.weight = conv.weight
        return new

    def forward(self, x: Tensor) -> Tensor:
        size, (kernel, _), (stride, _), (pad, _) = (
            x.shape[2:],
            self.kernel_size,
            self.stride,
            self.padding,  # type: ignore[str-unpack]
        )
        steps = [(s + 2 * pad - kernel) // stride + 1 for s in size]
        if x.is_cuda or steps[0] * steps[1] > FEW:
            return super().forward(x)
        # of each axis and step: what the kernel covers of the map, and which part of the kernel
        # that is
        parts = []
        for s, count in zip(size, steps, strict=True):
            first = [i * stride - pad for i in range(count)]
            parts.append(
                [
                    (slice(max(f, 0), min(f + kernel, s)), slice(max(-f, 0), min(kernel, s - f)))
                    for f in first
                ]
            )
        rows, weight = x.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1)
        out = torch.stack(
            [
                F.linear(rows[:, y, x_].flatten(1), weight[:, ky, kx].flatten(1), self.bias)
                for y, ky in parts[0]
                for x_, kx in parts[1]
            ],
            dim=1,
        )
        return out.unflatten(1, steps).permute(0, 3, 1, 2)


@register_model
def mclip_resnet_s16(pretrained: bool = False, **kwargs) -> ResNet:
    """Three stages of one basic block each, 48, 96 and 256 channels, stride 16.

    pretrained : there are no weights; ValueError if they are asked for.
    """
    kwargs = arguments("mclip_resnet_s16", pretrained, kwargs)
    model = ResNet(
        BasicBlock,
        [1, 1, 1, 0],
        channels=(48, 96, 256, 256),
        stem_width=8,
        stem_type="deep",
        avg_down=True,
        **kwargs,
    )
    for name in ("conv1", "conv2"):
        block = model.layer3[0]
        setattr(block, name, FewPositions.of(getattr(block, name)))
    describe(model, "mclip_resnet_s16", first_conv="conv1.0", classifier="fc")
    return model
