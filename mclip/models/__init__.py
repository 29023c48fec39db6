"""Models by name, in and out of files, and fast inference with them.

- `create(name)`: a model, its two preprocessings and its tokenizer from one string, always open_clip's:
  `ViT-bigG-14/laion2b_s39b_b160k`, `local-dir:models/teachers/large`, `hf-hub:org/repo`, or the name of a
  file in mclip/models/configs (random init, to be trained).
- `export(model, folder)`: open_clip's `local-dir` layout, for `open_clip.create_model_and_transforms`.
- `for_inference(model)`: batch norm folded into the convolutions, channels last; the same outputs, faster.
- `encode_images`, `encode_texts`: unit-norm float32 embeddings, each distinct caption encoded once
  (`encode_texts_with_all`: by several models, a text encoder that they share runs once).

    model, _, preprocess, tokenizer = mclip.models.create("local-dir:models/teachers/large")
    text = mclip.models.encode_texts(mclip.models.for_inference(model), tokenizer, ["a red apple"])   # (1, d)
"""

from mclip.models import fastvit, resnet, tokens  # noqa: F401 - registers towers with timm
from mclip.models.factory import ModelError, create, export, image_size, logit_scale, weights_sha256
from mclip.models.inference import (
    decoders,
    encode_images,
    encode_texts,
    encode_texts_with_all,
    for_inference,
    image_encoder,
    resolve_precision,
    side_by_side,
)

__all__ = ["ModelError", "create", "decoders", "encode_images", "encode_texts",
           "encode_texts_with_all", "export", "for_inference",
           "image_encoder", "image_size", "logit_scale", "resolve_precision", "side_by_side", "weights_sha256"]
