"""The pictures of a training set: stored views, decoded into a mapped file or streamed."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mclip.data import augment, shards
from mclip.distill.pairs import AllPairs
from mclip.system.files import made_once
from mclip.system.progress import bar


def views_of(image: Image.Image, rows: np.ndarray, view_px: int, image_px: int) -> np.ndarray:
    """Views of a picture at the student's size, one a row of parameters: (n, 3, image_px, image_px)
    uint8.
    """
    pictures = [augment.replay(image, row, view_px) for row in rows]
    if view_px != image_px:
        pictures = [p.resize((image_px, image_px), Image.Resampling.BICUBIC) for p in pictures]
    return np.stack([np.asarray(p) for p in pictures]).transpose(0, 3, 1, 2)


class _Decode(Dataset):
    """Item i: the views of the i-th shard's samples."""

    def __init__(self, pairs: AllPairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return self.pairs.shard_count

    def __getitem__(self, index: int) -> np.ndarray:
        side = self.pairs.spec.image_px
        views = [v for _, v in shard_views(self.pairs, index)]
        return np.stack(views) if views else np.zeros((0, 1, 3, side, side), np.uint8)


def shard_views(pairs: AllPairs, index: int) -> Iterator[tuple[str, np.ndarray]]:
    """(key, views) of every sample of a shard that has crops."""
    spec, crops = pairs.spec, pairs.crops(index)
    for sample in shards.iter_samples(spec.pairs, shards=[index]):
        if sample.key in crops:
            image = shards.decode(sample)
            rows = crops.rows(sample.key, image.size)
            yield sample.key, views_of(image, rows, pairs.view_px, spec.image_px)


def pixel_cache(pairs: AllPairs, *, workers: int = 2) -> np.ndarray:
    """Every view decoded once: (n, views, 3, s, s) uint8, memory-mapped; built where missing.

    n are the pairs that have crops: Side.row picks of them.
    """
    libraries = [version(name) for name in ("pillow", "torchvision", "numpy")]
    path = made_once(
        pairs.spec.cache,
        f"pixels-{pairs.pictures}",
        ".npy",
        [pairs.pictures_made_of(), libraries],
        lambda draft: _build_cache(pairs, draft, workers),
    )
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _build_cache(pairs: AllPairs, draft: Path, workers: int) -> None:
    side = pairs.spec.image_px
    shape = (pairs.picture_count(), pairs.n_views, 3, side, side)
    at = 0
    loader = DataLoader(_Decode(pairs), batch_size=None, num_workers=workers)
    with bar(desc="decode and augment", unit="pair", total=shape[0]) as progress:
        pixels = np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=shape)
        for views in loader:
            pixels[at : at + len(views)] = views
            at += len(views)
            progress.update(len(views))
        if at != shape[0]:
            raise ValueError(
                f"{pairs.spec.pairs}: {at} readable pairs, the manifest says {shape[0]}: "
                "run `dvc repro data`"
            )
        pixels.flush()
