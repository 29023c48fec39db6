"""Strided 1 x 1 convolutions of a few channels, as MobileCLIP's stems have them, trained without
oneDNN's crash.

On CPUs without AVX-512 torch 2.15's backward pass of such a convolution (stride 2 and more, fewer
than eight input channels, channels last) writes where it must not: the process ends with a
segmentation fault or, worse, goes on.
"""

from torch import Tensor, nn
from torch.nn import functional as F

FEW = 8  # input channels from which on oneDNN is right


class Pointwise(nn.Conv2d):
    """A strided 1 x 1 convolution as one without a stride on the positions that it reads: the same
    values.
    """

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.stride
        return F.conv2d(x[..., ::down, ::across], self.weight, self.bias, groups=self.groups)


def sidestep(model: nn.Module) -> int:
    """Put a `Pointwise` in place of each such convolution of a model; how many there were."""
    found = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d and _crashes(module)
    ]
    for name in found:
        old = model.get_submodule(name)
        new = nn.utils.skip_init(
            Pointwise,
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
