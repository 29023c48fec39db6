"""Models by name, in and out of files, and fast inference with them.

- `create(name)`: a model, its two preprocessings and its tokenizer from one string, always
  open_clip's: `ViT-bigG-14/laion2b_s39b_b160k`, `local-dir:models/teachers/large`,
  `hf-hub:org/repo`, a model and a file of weights (`MobileCLIP-S0/checkpoints/mobileclip_s0.pt`, as
  published), or a model alone (random init, to be trained): open_clip's and those of
  mclip/models/configs, MobileCLIP-S0 with its text encoder MCt among them.
- `export(model, folder)`: open_clip's `local-dir` layout, for
  `open_clip.create_model_and_transforms`.
- `for_inference(model)`: branches, batch norm and LayerScale folded into single convolutions,
  channels last; the same outputs.
- `encode_images`, `encode_texts`: unit-norm float32 embeddings, each distinct caption encoded once
  (`encode_texts_with_all`: by several models, a text encoder that they share runs once).

    model, _, preprocess, tokenizer = mclip.models.create("local-dir:models/teachers/large")
    fast = mclip.models.for_inference(model)
    text = mclip.models.encode_texts(fast, tokenizer, ["a red apple"])   # (1, d)
"""

from mclip.models import fastvit, mct, resnet, tokens  # noqa: F401 - they register towers and encoders
from mclip.models.attention import fast_attention
from mclip.models.factory import ModelError, create, export, image_size, logit_scale, weights_sha256
from mclip.models.inference import (
    encode_images,
    encode_texts,
    encode_texts_with_all,
    for_inference,
    image_encoder,
    resolve_precision,
)

mct.register()

__all__ = [
    "ModelError",
    "create",
    "encode_images",
    "encode_texts",
    "encode_texts_with_all",
    "export",
    "fast_attention",
    "for_inference",
    "image_encoder",
    "image_size",
    "logit_scale",
    "resolve_precision",
    "weights_sha256",
]
