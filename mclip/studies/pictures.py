"""What a picture looks like to an image tower: its last feature map, cut into principal components
and captions.

    eye = pictures.load("local-dir:models/students/clip/seed0", 256)        # any open_clip model string; 256 pixels
    maps = pictures.feature_maps(eye, images)                               # (n, 16, 16, c), images: PIL
    first, mask = pictures.foreground(maps)                                 # CLIP-CID (arXiv 2408.09441), Figure 5
    rgb = pictures.colours(maps, mask)                                      # (n, 16, 16, 3)
    scores, cosine = pictures.caption_maps(eye, images, [["a cat", "a dog"]] * len(images))   # (n, 2, 16, 16), (n, 2)

The map is the one that the tower pools: the patch tokens of a ViT, the last feature map of a
convolutional tower. At its own picture size a small tower's map has few cells (2 x 2 for the
default student: stride 16 at 32 pixels), so `load` enlarges the pictures, and with them the map;
position embeddings are interpolated. The tower then sees parts of things at the size at which it
was trained on whole ones.

A caption's map is gradient-free: the head that the tower puts on its pooled features is put on
every cell, and each cell's score is its share of the cosine between picture and caption. Where the
pool is a mean and the head linear (the default student and teachers, ViTs with average pooling) the
shares' mean *is* that cosine: the class activation map of Zhou et al. (arXiv 1512.04150), with a
caption for a class. With a class token or an attention pool it is not (the cells are then projected
as in MaskCLIP, arXiv 2112.01071): compare the two numbers.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from mclip import models
from mclip.data.evalsets import Split, read_image
from mclip.models.factory import preprocessing

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


def _resize(visual: nn.Module, side: int) -> None:
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
    visual = model.visual
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
    visual, cells = model.visual, maps.flatten(0, 2)
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

    return torch.cat(list(models.side_by_side(one, _batches(eye, images)))).numpy()


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
    found = models.side_by_side(
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


# ---------------------------------------------------------------- components


def principal(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (c,) and the first k principal axes (k, c) of (n, c) rows; the largest entry of each
    axis is positive.

    So the same rows give the same signs on any machine. With fewer than k axes of any variance the
    rest are zero.
    """
    rows = np.asarray(rows, np.float64)
    mean = rows.mean(0) if len(rows) else np.zeros(rows.shape[1])
    axes = np.zeros((k, rows.shape[1]))
    if len(rows) > 1:
        with threadpool_limits(
            1
        ):  # small matrices: threads that wait for each other take many times as long
            size, found = np.linalg.eigh((rows - mean).T @ (rows - mean))
        found = found.T[::-1][size[::-1] > 1e-12 * max(size[-1], 1e-300)][:k]
        axes[: len(found)] = (
            found * np.sign(found[np.arange(len(found)), np.abs(found).argmax(1)])[:, None]
        )
    return mean, axes


def otsu(values: np.ndarray) -> float:
    """The threshold that splits values into two groups with the largest variance between them (Otsu
    1979).
    """
    values = np.sort(np.asarray(values, np.float64).ravel())
    below = np.arange(1, len(values))
    sums = np.cumsum(values)
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / (len(values) - below)
    cut = int((below * (len(values) - below) * gap**2).argmax())
    return float((values[cut] + values[cut + 1]) / 2)


def foreground(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first principal component of all cells of several pictures, and where it says that
    something is.

    maps : (n, h, w, c). Returns (n, h, w) component and (n, h, w) bool. Its sign is arbitrary, so
        the side on which the
    maps' border lies less is called foreground; the threshold is Otsu's (the paper names none).
    """
    mean, axes = principal(maps.reshape(-1, maps.shape[-1]), 1)
    first = (maps - mean) @ axes[0]
    border = np.ones(maps.shape[1:3], bool)
    border[1:-1, 1:-1] = False
    if not border.all() and first[:, border].mean() > first[:, ~border].mean():
        first = -first
    return first, first > otsu(first)


def colours(maps: np.ndarray, mask: np.ndarray, paper: float = 1.0) -> np.ndarray:
    """(n, h, w, 3) in 0..1: three components of the foreground's cells of all pictures together as
    red, green, blue.

    Like colours mean like features within one call, and nothing between two calls. Components are
    cut at their 2nd and 98th percentile; the background is `paper`.
    """
    rows = maps[mask]
    out = np.full((*mask.shape, 3), paper)
    if len(rows):
        mean, axes = principal(rows, 3)
        values = (rows - mean) @ axes.T
        low, high = np.percentile(values, [2, 98], axis=0)
        out[mask] = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    return out


# ---------------------------------------------------------------- what is really there


def silhouette(image: Image.Image, white: int = 245) -> np.ndarray | None:
    """(h, w) bool: what is drawn, on a white background; None for a picture without one (a
    photograph).

    The background is the white that is connected to the border, which must be mostly white: white
    parts inside count as drawn.
    """
    from scipy import ndimage

    blank = np.asarray(image.convert("RGB")).min(-1) >= white
    border = np.ones(blank.shape, bool)
    border[1:-1, 1:-1] = False
    if blank[border].mean() < 0.5:
        return None
    drawn = ~ndimage.binary_propagation(border & blank, mask=blank)
    return drawn if drawn.any() else None


def overlap(mask: np.ndarray, drawn: np.ndarray) -> float:
    """Intersection over union of a mask of cells, enlarged, and a silhouette."""
    size = drawn.shape[::-1]
    mask = np.asarray(
        Image.fromarray(np.asarray(mask, bool)).resize(size, Image.Resampling.NEAREST)
    )
    return float((mask & drawn).sum() / max((mask | drawn).sum(), 1))


def of_class(split: Split, name: str | None, count: int) -> tuple[str, list[Image.Image]]:
    """A class's first `count` pictures; None: the most frequent class (of equals the first)."""
    if name is None:
        name = split.classes[int(np.bincount(split.labels).argmax())]
    if name not in split.classes:
        raise ValueError(f"no such class {name!r}; there are {', '.join(split.classes[:8])}, ...")
    rows = [i for i, label in enumerate(split.labels) if split.classes[label] == name]
    return name, [read_image(split.places[i]) for i in rows[:count]]


def one_each(split: Split, count: int, seed: int = 0) -> tuple[list[Image.Image], list[str]]:
    """Pictures of `count` different texts (captions, or classes in the first template), one each,
    shuffled by seed.
    """
    template = (split.templates or ["{c}"])[0]
    texts = [own[0] for own in split.captions] or [
        template.replace("{c}", split.classes[i]) for i in split.labels
    ]
    rows: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        rows.setdefault(text, []).append(i)
    chosen = np.random.default_rng(seed).permutation(sorted(rows)).tolist()[:count]
    places = [split.places[rows[text][k % len(rows[text])]] for k, text in enumerate(chosen)]
    return [read_image(place) for place in places], chosen


def mosaics(images: Sequence[Image.Image], side: int = 64) -> list[Image.Image]:
    """Every four pictures as the quarters of one of twice the side; a rest of fewer than four is
    left out.
    """
    out = []
    for i in range(0, len(images) // 4 * 4, 4):
        sheet = Image.new("RGB", (2 * side, 2 * side))
        for k, image in enumerate(images[i : i + 4]):
            image = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(image, (k % 2 * side, k // 2 * side))
        out.append(sheet)
    return out


def quarters(scores: np.ndarray) -> np.ndarray:
    """(..., h, w) maps of `mosaics` -> (..., 4): the mean score of each quarter, in the order of
    its pictures.
    """
    *lead, h, w = scores.shape
    return scores.reshape(*lead, 2, h // 2, 2, w // 2).mean((-3, -1)).reshape(*lead, 4)
