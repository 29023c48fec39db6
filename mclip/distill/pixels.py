"""The pictures that a training set shows: each a few stored views, decoded once into a mapped file
or as they come.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mclip.data import augment, shards
from mclip.data.stores import reinforced
from mclip.distill.runs import TrainingSet
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


def light_rows(
    key: str, size: tuple[int, int], spec: TrainingSet, n: int | None = None
) -> np.ndarray:
    """CLIP's own augmentation, a RandomResizedCrop of at least light_scale_min of the area,
    light_views times.

    n: the first n of them only.
    """
    return augment.draw(
        key,
        size,
        spec.light_views if n is None else n,
        image_px=spec.image_px,
        seed=spec.seed,
        scale_min=spec.light_scale_min,
        ops=0,
    )


class _Decode(Dataset):
    """Item i: the views of the i-th shard's samples."""

    def __init__(self, spec: TrainingSet):
        self.spec = spec
        self.count = len(shards.read_manifest(spec.pairs)["shards"])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        found = [v for _, v in shard_views(self.spec, index)]
        return (
            np.stack(found)
            if found
            else np.zeros((0, 1, 3, self.spec.image_px, self.spec.image_px), np.uint8)
        )


def shard_views(spec: TrainingSet, index: int) -> Iterator[tuple[str, np.ndarray]]:
    """(key, views) of every sample of a shard that the set has pixels of: all, or those reinforced."""
    if spec.pairs_kind == "reinforced":
        stored = reinforced.read_shard(spec.reinforced, index)
        view_px = reinforced.read_meta(spec.reinforced)["settings"]["image_px"]
        rows = dict(zip(stored.keys, stored.augment, strict=True))
        for sample in shards.iter_samples(spec.pairs, shards=[index]):
            if sample.key in rows:
                yield (
                    sample.key,
                    views_of(shards.decode(sample), rows[sample.key], view_px, spec.image_px),
                )
    else:
        for sample in shards.iter_samples(spec.pairs, shards=[index]):
            image = shards.decode(sample)
            yield (
                sample.key,
                views_of(
                    image, light_rows(sample.key, image.size, spec), spec.image_px, spec.image_px
                ),
            )


def pixel_cache(spec: TrainingSet, *, workers: int = 2) -> np.ndarray:
    """Every view decoded once: (n, views, 3, s, s) uint8, memory-mapped; built when it isn't there.

    For `all` and `kept` pairs it holds all pairs (Side.row picks), for `reinforced` the reinforced
    ones.
    """
    manifest = json.dumps(shards.read_manifest(spec.pairs), sort_keys=True)
    kind = "reinforced" if spec.pairs_kind == "reinforced" else "light"
    made_of = [manifest, kind, spec.image_px]
    if kind == "reinforced":
        made_of.append(reinforced.pictures(reinforced.read_meta(spec.reinforced)))
    else:
        made_of += [spec.light_scale_min, spec.light_views, spec.seed]
    path = made_once(
        spec.cache,
        f"pixels-{kind}",
        ".npy",
        made_of,
        lambda draft: _build_cache(spec, draft, workers),
    )
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _build_cache(spec: TrainingSet, draft: Path, workers: int) -> None:
    if spec.pairs_kind == "reinforced":
        counts = [
            reinforced.count(spec.reinforced, i)
            for i in range(len(shards.read_manifest(spec.pairs)["shards"]))
        ]
        n_views = reinforced.read_meta(spec.reinforced)["settings"]["n_aug"]
    else:
        counts = [s["samples"] for s in shards.read_manifest(spec.pairs)["shards"]]
        n_views = spec.light_views
    shape = (sum(counts), n_views, 3, spec.image_px, spec.image_px)
    at = 0
    loader = DataLoader(_Decode(spec), batch_size=None, num_workers=workers)
    with bar(desc="decode and augment", unit="pair", total=shape[0]) as progress:
        pixels = np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=shape)
        for views in loader:
            pixels[at : at + len(views)] = views
            at += len(views)
            progress.update(len(views))
        if at != shape[0]:
            raise ValueError(
                f"{spec.pairs}: {at} readable pairs, the manifest says {shape[0]}: run `dvc repro data`"
            )
        pixels.flush()
