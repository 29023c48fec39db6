"""Image augmentations as parameters that can be stored and replayed (papers.md 2.1).

An augmentation is one row of 4 + 2 * ops float32 numbers: `[top, left, height, width, op,
magnitude, op, magnitude, ...]`; the crop box is in pixels of the source image, `op` indexes OPS and
`magnitude` is the signed value that torchvision's RandAugment applies at `image_px`.

`draw` makes rows from a sample's key alone, so they don't depend on order, shard or worker.
`replay` turns a row and the source image into the augmented picture of `image_px` pixels. The
picture is *defined* at that size; a teacher or student of another size resizes it. So teacher and
student see the same picture, and a translation in pixels means the same to both. (The published
reinforced sets replay translations of 224 px unscaled at other sizes.)
"""

import functools
import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import RandAugment, _apply_op

OPS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
    "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
RATIO = (3 / 4, 4 / 3)
BINS = 31


def rng_for(key: str, seed: int, purpose: str = "") -> np.random.Generator:
    """A generator that depends only on the sample's key, the seed and the purpose."""
    digest = hashlib.sha256(f"{purpose}\0{seed}\0{key}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def draw(
    key: str,
    size: tuple[int, int],
    n: int,
    *,
    image_px: int,
    seed: int,
    scale_min: float = 0.08,
    ops: int = 2,
    magnitude: int = 9,
) -> np.ndarray:
    """n augmentations of one image: RandomResizedCrop, then `ops` RandAugment operations.

    Parameters
    ----------
    key : the sample's key; rows are a function of (key, seed) and the settings.
    size : (width, height) of the source image, pixels.
    image_px : side of the augmented picture, pixels; sets the reach of translations.
    scale_min : smallest crop area as a fraction of the image; the largest is 1.
    magnitude : RandAugment's, of 31 bins.

    Returns
    -------
    (n, 4 + 2 * ops) float32
    """
    rng = rng_for(key, seed, f"augment-{scale_min}-{ops}-{magnitude}-{image_px}")
    space = _space(image_px) if ops else {}
    out = np.zeros((n, 4 + 2 * ops), dtype=np.float32)
    for row in out:
        row[:4] = _crop(rng, *size, scale_min)
        for i in range(ops):
            op = int(rng.integers(len(OPS)))
            magnitudes, signed = space[OPS[op]]
            value = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
            if signed and rng.integers(2):
                value = -value
            row[4 + 2 * i : 6 + 2 * i] = op, value
    return out


@functools.cache
def _space(image_px: int) -> dict[str, tuple[torch.Tensor, bool]]:
    """torchvision's magnitudes of each operation, one a bin, and whether they have a sign."""
    return RandAugment(num_magnitude_bins=BINS)._augmentation_space(BINS, (image_px, image_px))


def _crop(
    rng: np.random.Generator, width: int, height: int, scale_min: float
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params with a numpy generator: (top, left, height,
    width).
    """
    for _ in range(10):
        area = width * height * rng.uniform(scale_min, 1.0)
        ratio = np.exp(rng.uniform(np.log(RATIO[0]), np.log(RATIO[1])))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # the whole image, trimmed to the nearest allowed ratio
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def replay(image: Image.Image, row: np.ndarray, image_px: int) -> Image.Image:
    """The augmented picture (RGB, image_px x image_px) of one row of `draw`."""
    top, left, height, width = (float(v) for v in row[:4])
    box = (left, top, left + width, top + height)
    image = image.resize((image_px, image_px), Image.Resampling.BICUBIC, box=box)
    for op, value in row[4:].reshape(-1, 2):
        image = _apply_op(image, OPS[int(op)], float(value), InterpolationMode.BILINEAR, fill=None)
    return image


def replay_all(image: Image.Image, rows: Iterable[np.ndarray], image_px: int) -> np.ndarray:
    """Every augmentation of an image: (n, 3, image_px, image_px) uint8."""
    pictures = [np.asarray(replay(image, row, image_px)) for row in rows]
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))


def to_input(pixels: torch.Tensor, size_px: int, mean: tuple, std: tuple) -> torch.Tensor:
    """uint8 pictures (b, 3, h, w) as a model's input: resized (bicubic, antialiased), scaled,
    normalised, float32.
    """
    x = pixels.float()
    if x.shape[-1] != size_px or x.shape[-2] != size_px:
        x = torch.nn.functional.interpolate(
            x, (size_px, size_px), mode="bicubic", antialias=True
        ).clamp_(0, 255)
    mean_t = torch.tensor(mean, device=x.device).view(1, 3, 1, 1) * 255
    std_t = torch.tensor(std, device=x.device).view(1, 3, 1, 1) * 255
    return ((x - mean_t) / std_t).contiguous(memory_format=torch.channels_last)


def from_published(param_aug: list) -> np.ndarray:
    """Rows from a published set's `param_aug` (papers.md 2.6): per augmentation
    `[[top, left, h, w], [[op, magnitude], ...]]`.

    Raises ValueError naming what is wrong when an entry is not of that form.
    """
    rows = []
    for i, entry in enumerate(param_aug):
        try:
            (top, left, height, width), ops = entry
            rows.append(
                [top, left, height, width, *(v for op, value in ops for v in (op, value or 0.0))]
            )
        except (TypeError, ValueError):
            raise ValueError(
                f"param_aug[{i}]: expected [[top, left, h, w], [[op, magnitude], ...]]"
            ) from None
    return np.asarray(rows, dtype=np.float32)


def to_published(rows: np.ndarray) -> list:
    """The inverse of `from_published`."""
    return [
        [
            [int(v) for v in row[:4]],
            [[int(op), float(value)] for op, value in row[4:].reshape(-1, 2)],
        ]
        for row in rows
    ]
