"""Feature maps: what an image tower sees where in a picture, and which caption fits there.

    eye = maps.load("local-dir:models/students/clip/seed0", 256)   # any open_clip model; 256 pixels
    maps.feature_maps(eye, images)                                  # (n, 16, 16, c), images: PIL
    captions = [["a cat", "a dog"]] * len(images)
    scores, cosine = maps.caption_maps(eye, images, captions)       # (n, 2, 16, 16), (n, 2)

The map is the one that the tower pools: the patch tokens of a ViT, the last feature map of a
convolutional tower. At its own picture size a small tower's map has few cells (2 x 2 for the
default student: stride 16 at 32 pixels), so `load` enlarges the pictures, and with them the map;
position embeddings are interpolated. The tower then sees parts of things at the size at which it
was trained on whole ones.

A caption's map needs no gradients: the head that the tower applies to its pooled features is
applied to every cell, and each cell's score is its share of the cosine between picture and caption.
Where the pool is a mean and the head linear (the default student and teachers, ViTs with average
pooling) the shares' mean *is* that cosine: the class activation map of Zhou et al. (arXiv
1512.04150), with a caption for a class. With a class token or an attention pool it is not (the
cells are then projected as in MaskCLIP, arXiv 2112.01071): compare the two numbers.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from PIL import Image
from torch import Tensor, nn

from mclip import models
from mclip.models.factory import preprocessing
from mclip.system.threads import side_by_side

BATCH = 8  # pictures at once: enlarged ones take memory


class Eye(NamedTuple):
    """A model at a picture size of one's own choice."""

    model: nn.Module
    preprocess: Any  # PIL image -> (3, side, side)
    tokenizer: Any
    side: int  # pixels
    own_side: int  # pixels, of the model itself
    stride: int  # pixels a cell of the map


def load(name: str, side: int | None = None, *, times: int = 1) -> Eye:
    """A model by name (see `models.create`), for pictures of `side` pixels; None: of its own size,
    `times` that.
    """
    model, _, preprocess, tokenizer = models.create(name)
    own = models.image_size(model)
    stride = own // feature_map(model, torch.zeros(1, 3, own, own)).shape[1]
    return resized(Eye(model, preprocess, tokenizer, own, own, stride), side or own * times)


def resized(eye: Eye, side: int) -> Eye:
    """The same model for pictures of another size; its weights are shared where it has no position
    embeddings.
    """
    if side == eye.side:
        return eye
    model = eye.model
    if not _is_convolutional(model.visual):
        model = copy.deepcopy(model)
        _resize(model.visual, side)
    return eye._replace(
        model=model, preprocess=preprocessing(side, model.visual.preprocess_cfg), side=side
    )


def _resize(visual: Any, side: int) -> None:
    """Have a tower take square pictures of `side` pixels, its position embeddings interpolated."""
    if hasattr(visual, "trunk"):
        if hasattr(visual.trunk, "set_input_size"):
            visual.set_input_size(side)
        visual.image_size = (side, side)
        return
    holder = visual.attnpool if isinstance(visual, ModifiedResNet) else visual
    position = (
        holder.positional_embedding.detach()
    )  # (1 + cells, width): the class token's, or the mean's, first
    old = round((len(position) - 1) ** 0.5)
    new = old * side // models.image_size(nn.ModuleDict({"visual": visual}))
    grid = position[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    holder.positional_embedding = nn.Parameter(
        torch.cat([position[:1], grid.flatten(2)[0].T]), requires_grad=False
    )
    visual.image_size, visual.grid_size = (side, side), (new, new)


# ---------------------------------------------------------------- features


@torch.no_grad()
def feature_map(model: nn.Module, batch: Tensor) -> Tensor:
    """(n, 3, s, s) preprocessed pictures -> (n, h, w, c): what the image tower pools."""
    visual: Any = model.visual
    if hasattr(visual, "trunk"):
        out = visual.trunk.forward_features(batch)
        if out.ndim == 4:
            return (
                out
                if getattr(visual.trunk, "output_fmt", "NCHW") == "NHWC"
                else out.permute(0, 2, 3, 1)
            )
        out = out[:, getattr(visual.trunk, "num_prefix_tokens", 0) :]
        side = round(out.shape[1] ** 0.5)
        return out.unflatten(1, (side, side))
    norm = (
        {}
        if isinstance(visual, ModifiedResNet)
        else {"normalize_intermediates": not visual.final_ln_after_pool}
    )
    found = visual.forward_intermediates(batch, indices=1, intermediates_only=True, **norm)
    return found["image_intermediates"][-1].permute(0, 2, 3, 1)


@torch.no_grad()
def embed_cells(model: nn.Module, maps: Tensor) -> Tensor:
    """(n, h, w, c) from `feature_map` -> (n, h, w, d): the tower's head on every cell by itself."""
    visual: Any = model.visual
    cells = maps.flatten(0, 2)
    if isinstance(visual, ModifiedResNet):  # what the attention pool does to the values
        out = visual.attnpool.c_proj(visual.attnpool.v_proj(cells))
    elif not hasattr(visual, "trunk"):
        cells = visual.ln_post(cells) if visual.final_ln_after_pool else cells
        out = cells if visual.proj is None else cells @ visual.proj
    elif hasattr(visual.trunk, "num_prefix_tokens"):  # each cell stands for all tokens
        tokens = cells[:, None].expand(-1, visual.trunk.num_prefix_tokens + 1, -1)
        out = visual.head(visual.trunk.forward_head(tokens))
    else:
        nhwc = getattr(visual.trunk, "output_fmt", "NCHW") == "NHWC"
        out = visual.head(
            visual.trunk.forward_head(cells[:, None, None] if nhwc else cells[:, :, None, None])
        )
    return out.unflatten(0, maps.shape[:3])


def _batches(eye: Eye, images: Sequence[Image.Image]):
    return (
        torch.stack([eye.preprocess(x) for x in images[i : i + BATCH]])
        for i in range(0, len(images), BATCH)
    )


def feature_maps(eye: Eye, images: Sequence[Image.Image]) -> np.ndarray:
    """(n, h, w, c) float32 of pictures, see `feature_map`; on all cores.

    A convolutional tower gets each picture with one more cell of its own edge all around, which is
    cut off again: the padding with zeros shows in the outermost cells of a map, where a component
    would find it.
    """
    margin = int(_is_convolutional(eye.model.visual))

    def one(batch: Tensor) -> Tensor:
        wide = F.pad(batch, [margin * eye.stride] * 4, mode="replicate")
        maps = feature_map(eye.model, wide).float().cpu()
        return maps[:, margin : maps.shape[1] - margin, margin : maps.shape[2] - margin]

    return torch.cat(list(side_by_side(one, _batches(eye, images)))).numpy()


def _is_convolutional(visual: nn.Module) -> bool:
    trunk = getattr(visual, "trunk", visual)
    return not hasattr(trunk, "num_prefix_tokens") and not hasattr(trunk, "class_embedding")


def caption_maps(
    eye: Eye, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Where each picture is like each of its m captions, and how like them it is as a whole.

    Returns
    -------
    scores : (n, m, h, w) each cell's share of the cosine: one with small features counts little.
    cosine : (n, m) between the whole picture's embedding and the captions'.
    """
    flat = models.encode_texts(eye.model, eye.tokenizer, [text for own in captions for text in own])
    texts = flat.double().unflatten(0, (len(images), -1))
    found = side_by_side(
        lambda batch: (
            embed_cells(eye.model, feature_map(eye.model, batch)).float(),
            eye.model.encode_image(batch).float(),
        ),
        _batches(eye, images),
    )
    cells, whole = (torch.cat(parts).double() for parts in zip(*list(found), strict=True))
    unit = 1 / whole.norm(dim=-1)
    scores = torch.einsum("nhwd,nmd,n->nmhw", cells, texts, unit)
    return scores.numpy(), torch.einsum("nd,nmd,n->nm", whole, texts, unit).numpy()
