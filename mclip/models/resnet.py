"""A ResNet for pictures of 32 pixels, registered with timm when mclip.models is imported.

open_clip then makes it from `{"timm_model_name": "mclip_resnet_s16", "timm_pool": "avg", "timm_proj": "linear"}`.

timm's ResNets end at stride 32: their last stage sees 32 pixels as a map of 1 x 1, where eight ninths of a 3 x 3
convolution multiply padding. That stage is a third of resnet10t's training step and is worth about a point at equal
samples; a narrower stem saves as much again. What was tried (18,432 samples, 2 seeds, resnet10t 3; ms: the image
tower's part of a step of 128 on one CPU thread; then CIFAR-10 zero-shot and unseen concepts R@1 of two recipes):

    resnet10t           383 ms   clip 33.8, 11.1   combined 42.4, 13.0
    this one            183 ms   clip 32.5,  9.8   combined 41.4, 12.0
    its stem twice wide 241 ms   clip 32.2,  9.7   combined 42.0, 11.0
    test_resnet, 48 px  172 ms   clip 30.8,  8.9   combined 40.8, 10.5
    test_byobnet, 64 px 149 ms   clip 29.1,  8.3   combined 34.1, 10.3
"""

from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet


@register_model
def mclip_resnet_s16(pretrained: bool = False, **kwargs) -> ResNet:
    """Three stages of one basic block each, 64, 128 and 256 channels, stride 16; 1.3 M parameters.

    pretrained : there are no weights; ValueError if they are asked for.
    """
    if pretrained:
        raise ValueError("mclip_resnet_s16 has no pretrained weights")
    kwargs = {k: v for k, v in kwargs.items() if not k.startswith("pretrained_") and k != "cache_dir"}
    model = ResNet(BasicBlock, [1, 1, 1, 0], channels=(64, 128, 256, 256), stem_width=16, stem_type="deep",
                   avg_down=True, **kwargs)
    model.default_cfg = {"architecture": "mclip_resnet_s16", "input_size": (3, 32, 32), "pool_size": (2, 2),
                         "num_classes": model.num_classes, "first_conv": "conv1.0", "classifier": "fc"}
    return model
