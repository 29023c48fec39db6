"""What a picture looks like to a student: the principal components of its feature map
(`mclip.models.maps`), and whether captions find their pictures (notebooks/ablations/pca.ipynb).

    features = maps.feature_maps(eye, images)           # (n, h, w, c)
    first, mask = pca.foreground(features)              # CLIP-CID (arXiv 2408.09441), Figure 5
    rgb = pca.colours(features, mask)                   # (n, h, w, 3)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from PIL import Image
from pydantic import Field, PositiveInt
from threadpoolctl import threadpool_limits

from mclip.params import Params, Section, absent

if TYPE_CHECKING:
    from mclip.data.evalsets import Split
    from mclip.evaluate.tasks import Task


class Settings(Section):
    """`ablations.pca`."""

    group: ClassVar[str] = "pictures"  # of the report's index
    recipe: str  # of the distilled student, side by side with
    baseline: str
    teacher: str
    image_px: Annotated[int, Field(ge=32)]  # pictures are enlarged to this
    shown: dict[str, str | None] = Field(min_length=1)  # set -> class; null: its most frequent one
    columns: Annotated[int, Field(ge=2)]  # pictures a class
    classes: PositiveInt  # most frequent classes of the first set: is the foreground the drawing?
    captions: str  # the set of the caption maps
    mosaics: PositiveInt  # of four pictures: does a caption's map lie on the right one?

    def check(self, p: Params) -> Iterator[str]:
        yield from absent("recipe", [self.recipe], p.distill.recipes, "recipe")
        yield from absent("baseline", [self.baseline], p.distill.recipes, "recipe")
        yield from absent("teacher", [self.teacher], p.teachers.models, "teacher")
        yield from absent("shown", self.shown, p.evaluate.sets, "evaluation set")
        yield from absent("captions", [self.captions], p.evaluate.sets, "evaluation set")


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
    from mclip.data.evalsets import read_image

    if name is None:
        name = split.classes[int(np.bincount(split.answers).argmax())]
    if name not in split.classes:
        raise ValueError(f"no such class {name!r}; there are {', '.join(split.classes[:8])}, ...")
    rows = [i for i, label in enumerate(split.answers) if split.classes[label] == name]
    return name, [read_image(split.places[i]) for i in rows[:count]]


def one_each(
    split: Split, task: Task, count: int, seed: int = 0
) -> tuple[list[Image.Image], list[str]]:
    """Pictures of `count` different texts (captions, or classes in the first template), one each,
    shuffled by seed.
    """
    from mclip.data.evalsets import read_image

    texts = [task.prompts(split, own[0])[0] for own in task.right(split)]
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
    rows, columns = _halves(h), _halves(w)
    return np.einsum("ah,bw,...hw->...ab", rows, columns, scores).reshape(*lead, 4)


def _halves(n: int) -> np.ndarray:
    """(2, n): how much each cell counts for the first and the second half; the middle one of an odd
    number counts for both, half.
    """
    first = np.clip(n / 2 - np.arange(n), 0, 1)
    return np.stack([first, 1 - first]) / (n / 2)
