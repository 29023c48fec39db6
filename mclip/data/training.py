"""What a training step sees: pictures (one stored view each), captions, and what teachers said of them.

A `TrainingSet` ties together what the stages wrote, shard by shard: the pairs, which of them `balance` kept, cluster
labels, teacher embeddings, the reinforced set. Two loaders give the same batches' content from it:

- `CachedLoader`: every view decoded and augmented once into a memory-mapped uint8 file under data/cache, shared by
  all recipes and seeds; for sets that fit on a local disk. Batches are a function of (seed, step): resuming is exact.
- `StreamedLoader`: shards are read, decoded and augmented as they come; for sets that don't.

A batch is a dict of tensors: image (b, 3, s, s) uint8; tokens (b, context), ids (b,) int64 (equal captions have equal
ids); with synthetic captions syn_tokens, syn_ids; with a teacher label (b,), teacher_image and teacher_text (b, d);
with a reinforced set ensemble_image, ensemble_text, ensemble_syn (b, D).
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..files import made_once
from ..progress import bar
from ..runs import TrainingSet, in_part
from . import augment, balanced, clustered, embedded, reinforced, shards
from .captions import Tokenizer, caption_id, read_captions, tokenise

SHUFFLE_BUFFER = 2000


@dataclass
class Side:
    """All but the pixels, of n samples; row[i] is sample i's row in the pixel cache.

    known : the captions of all pairs that these were picked from, the same for all such sets.
    """

    row: np.ndarray
    keys: list[str]
    captions: list[str]
    known: list[str]
    arrays: dict[str, torch.Tensor]
    syn_text: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def n_syn(self) -> int:
        """Synthetic captions a sample; 1 where there are none to draw."""
        return self.arrays["syn_tokens"].shape[1] if "syn_tokens" in self.arrays else 1


def pair_count(spec: TrainingSet) -> int:
    """How many pairs a set trains on."""
    if spec.fraction < 1:
        return sum(in_part(key, spec.fraction) for key in _keys(spec))
    if spec.pairs_kind == "reinforced":
        return reinforced.read_meta(spec.reinforced)["samples"]
    if spec.pairs_kind == "kept":
        return int(balanced.read(spec.balance).keep.sum())
    return shards.read_manifest(spec.pairs)["samples"]


def _keys(spec: TrainingSet) -> list[str]:
    """Of all pairs of a kind, whatever the fraction."""
    if spec.pairs_kind == "reinforced":
        count = len(shards.read_manifest(spec.pairs)["shards"])
        return [key for i in range(count) for key in reinforced.read_shard(spec.reinforced, i).keys]
    if spec.pairs_kind == "kept":
        balance = balanced.read(spec.balance)
        return list(balance.keys[balance.keep])
    return read_captions(spec.pairs, spec.cache)[0]


def load_side(spec: TrainingSet, shard: tuple[int, list[shards.Sample]] | None = None) -> Side:
    """Everything but the pixels, of all shards or of one, given by its index and its samples, in memory.

    Raises FileNotFoundError naming the stage to run, ValueError where the parts do not fit together.
    """
    manifest = shards.read_manifest(spec.pairs)
    indices = range(len(manifest["shards"])) if shard is None else [shard[0]]
    arrays: dict[str, torch.Tensor] = {}
    syn_text = None
    if spec.pairs_kind == "reinforced":
        parts = [reinforced.read_shard(spec.reinforced, i) for i in indices]
        keys = [k for p in parts for k in p.keys]
        captions = known = [c for p in parts for c in p.captions]
        syn_text = [s for p in parts for s in p.syn_text]
        arrays["ensemble_image"] = torch.cat([p.image_emb for p in parts])
        arrays["ensemble_texts"] = torch.cat([p.text_emb for p in parts])
        row = np.arange(len(keys))
    else:
        if shard is not None:
            keys, captions = [s.key for s in shard[1]], [s.caption for s in shard[1]]
        else:
            keys, captions = read_captions(spec.pairs, spec.cache)
        known = captions
        row = np.arange(len(keys))
        if spec.pairs_kind == "kept":
            balance = balanced.read(spec.balance)
            kept = set(balance.keys[balance.keep])
            row = np.asarray([i for i, k in enumerate(keys) if k in kept], dtype=np.int64)
            keys, captions = [keys[i] for i in row], [captions[i] for i in row]
    if spec.fraction < 1:
        part = [i for i, key in enumerate(keys) if in_part(key, spec.fraction)]
        row, keys, captions = row[part], [keys[i] for i in part], [captions[i] for i in part]
        syn_text = syn_text and [syn_text[i] for i in part]
        arrays = {name: values[part] for name, values in arrays.items()}
    if not keys and len(indices) == len(manifest["shards"]):
        raise ValueError(f"no pair to train on ({spec.pairs_kind} pairs of {spec.pairs})")
    if spec.teacher is not None:
        arrays |= _teacher_arrays(spec, keys)
    return Side(row=row, keys=keys, captions=captions, known=known, arrays=arrays, syn_text=syn_text)


def _teacher_arrays(spec: TrainingSet, keys: list[str]) -> dict[str, torch.Tensor]:
    """Cluster label and the teacher's embeddings of each key's picture and caption."""
    clusters = clustered.read(spec.clusters)
    label_of = pd.Series(clusters.labels, index=clusters.keys)
    if missing := [k for k in keys if k not in label_of.index]:
        raise ValueError(f"{spec.clusters}: no cluster label for {len(missing)} pairs, the first is {missing[0]}; "
                         "run `dvc repro cluster`")
    table = embedded.load(Path(spec.embeddings) / spec.teacher)
    position = pd.Series(np.arange(len(table.keys)), index=table.keys)
    rows = position.loc[keys].to_numpy()
    return {
        "label": torch.from_numpy(label_of.loc[keys].to_numpy().astype(np.int64)),
        "teacher_image": torch.from_numpy(np.asarray(table.image[rows])),
        "teacher_text": torch.from_numpy(np.asarray(table.text[rows])),
    }


def add_tokens(side: Side, tokenizer: Tokenizer, *, synthetic: bool, cache: str | None = None) -> None:
    """Tokenise the captions, each distinct one once, into `tokens`, `ids` (and `syn_tokens`, `syn_ids`).

    cache : a folder that keeps the tokens for the next run.
    """
    lists = {"": [[c] for c in side.captions]}
    if synthetic:
        if not side.syn_text or not side.syn_text[0]:
            raise ValueError("synthetic captions wanted, but the reinforced set has none (reinforce.n_syn)")
        lists["syn_"] = side.syn_text
    for prefix, texts in lists.items():
        distinct = sorted({t for group in texts for t in group} if prefix else set(side.known))
        index = {t: i for i, t in enumerate(distinct)}
        tokens = tokenise(distinct, tokenizer, cache)
        where = torch.tensor([[index[t] for t in group] for group in texts])
        ids = torch.tensor([caption_id(t) for t in distinct])
        side.arrays[f"{prefix}tokens"] = tokens[where]
        side.arrays[f"{prefix}ids"] = ids[where]


def select(side: Side, rows: np.ndarray, view: np.ndarray, pick: np.ndarray,
           teacher_slice: list[int] | None) -> dict[str, torch.Tensor]:
    """The side of one batch: for each row its arrays, the embedding of its view, its synthetic caption `pick`.

    `teacher_slice`: where the teacher is one of the ensemble, its slice; then teacher_image is its embedding of the
    augmented picture rather than of the plain one.
    """
    a, at, v = side.arrays, torch.from_numpy(rows), torch.from_numpy(view)
    batch = {"tokens": a["tokens"][at, 0].long(), "ids": a["ids"][at, 0]}
    for name in ("label", "teacher_image", "teacher_text"):
        if name in a:
            batch[name] = a[name][at] if name == "label" else a[name][at].float()
    if "ensemble_image" in a:
        batch["ensemble_image"] = a["ensemble_image"][at, v].float()
        batch["ensemble_text"] = a["ensemble_texts"][at, 0].float()
        if teacher_slice is not None and "teacher_image" in a:
            batch["teacher_image"] = batch["ensemble_image"][:, slice(*teacher_slice)]
    if "syn_tokens" in a:
        k = torch.from_numpy(pick)
        batch["syn_tokens"] = a["syn_tokens"][at, k].long()
        batch["syn_ids"] = a["syn_ids"][at, k]
        batch["ensemble_syn"] = a["ensemble_texts"][at, 1 + k].float()
    return batch


# --- pixels -----------------------------------------------------------------------------------------------------


def views_of(image: Image.Image, rows: np.ndarray, view_px: int, image_px: int) -> np.ndarray:
    """Views of a picture at the student's size, one a row of parameters: (n, 3, image_px, image_px) uint8."""
    pictures = [augment.replay(image, row, view_px) for row in rows]
    if view_px != image_px:
        pictures = [p.resize((image_px, image_px), Image.Resampling.BICUBIC) for p in pictures]
    return np.stack([np.asarray(p) for p in pictures]).transpose(0, 3, 1, 2)


def light_rows(key: str, size: tuple[int, int], spec: TrainingSet, n: int | None = None) -> np.ndarray:
    """CLIP's own augmentation, a RandomResizedCrop of at least light_scale_min of the area, light_views times.

    n: the first n of them only.
    """
    return augment.draw(key, size, spec.light_views if n is None else n, image_px=spec.image_px, seed=spec.seed,
                        scale_min=spec.light_scale_min, ops=0)


class _Decode(Dataset):
    """Item i: the views of the i-th shard's samples."""

    def __init__(self, spec: TrainingSet):
        self.spec = spec
        self.count = len(shards.read_manifest(spec.pairs)["shards"])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        found = [v for _, v in shard_views(self.spec, index)]
        return np.stack(found) if found else np.zeros((0, 1, 3, self.spec.image_px, self.spec.image_px), np.uint8)


def shard_views(spec: TrainingSet, index: int) -> Iterator[tuple[str, np.ndarray]]:
    """(key, views) of every sample of a shard that the set has pixels of: all, or those reinforced."""
    if spec.pairs_kind == "reinforced":
        stored = reinforced.read_shard(spec.reinforced, index)
        view_px = reinforced.read_meta(spec.reinforced)["settings"]["image_px"]
        rows = dict(zip(stored.keys, stored.augment, strict=True))
        for sample in shards.iter_samples(spec.pairs, shards=[index]):
            if sample.key in rows:
                yield sample.key, views_of(shards.decode(sample), rows[sample.key], view_px, spec.image_px)
    else:
        for sample in shards.iter_samples(spec.pairs, shards=[index]):
            image = shards.decode(sample)
            yield sample.key, views_of(image, light_rows(sample.key, image.size, spec), spec.image_px, spec.image_px)


def pixel_cache(spec: TrainingSet, *, workers: int = 2) -> np.ndarray:
    """Every view decoded once: (n, views, 3, s, s) uint8, memory-mapped; built when it isn't there.

    For `all` and `kept` pairs it holds all pairs (Side.row picks), for `reinforced` the reinforced ones.
    """
    manifest = json.dumps(shards.read_manifest(spec.pairs), sort_keys=True)
    kind = "reinforced" if spec.pairs_kind == "reinforced" else "light"
    made_of = [manifest, kind, spec.image_px]
    if kind == "reinforced":
        made_of.append(reinforced.pictures(reinforced.read_meta(spec.reinforced)))
    else:
        made_of += [spec.light_scale_min, spec.light_views, spec.seed]
    path = made_once(spec.cache, f"pixels-{kind}", ".npy", made_of, lambda draft: _build_cache(spec, draft, workers))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _build_cache(spec: TrainingSet, draft: Path, workers: int) -> None:
    if spec.pairs_kind == "reinforced":
        counts = [len(reinforced.read_shard(spec.reinforced, i).keys)
                  for i in range(len(shards.read_manifest(spec.pairs)["shards"]))]
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
            raise ValueError(f"{spec.pairs}: {at} readable pairs, the manifest says {shape[0]}: run `dvc repro data`")
        pixels.flush()


# --- loaders ----------------------------------------------------------------------------------------------------


class CachedLoader:
    """Batches of a set whose pixels are cached; batch `step` is a function of (seed, step).

    A global batch is cut into `world` equal parts, one a rank, so the samples of a step don't depend on `world`.
    """

    def __init__(self, side: Side, pixels: np.ndarray, batch_size: int, *, seed: int, rank: int = 0, world: int = 1,
                 teacher_slice: list[int] | None = None):
        if batch_size > len(side):
            raise ValueError(f"distill.train.batch_size {batch_size} is more than the {len(side)} pairs there are")
        self.side, self.pixels, self.batch_size, self.seed = side, pixels, batch_size, seed
        self.rank, self.world, self.teacher_slice = rank, world, teacher_slice

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step (0-based)."""
        per_epoch = len(self.side) // self.batch_size
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.side))
        rng = np.random.default_rng([self.seed, 2, step])
        rows = order[at * self.batch_size : (at + 1) * self.batch_size]
        view = rng.integers(self.pixels.shape[1], size=len(rows))
        pick = rng.integers(self.side.n_syn, size=len(rows))
        share = slice(self.rank, None, self.world)
        rows, view = rows[share], view[share]
        batch = select(self.side, rows, view, pick[share], self.teacher_slice)
        batch["image"] = torch.from_numpy(self.pixels[self.side.row[rows], view])
        return batch


@dataclass(frozen=True)
class _Opened:
    """A shard in a stream: everything but its pixels, and which augmentations each of its samples has."""

    side: Side
    rows: dict[str, np.ndarray] | None  # stored augmentations by key; None: light ones, drawn from the key
    view_px: int

    def picture(self, sample: shards.Sample, view: int, spec: TrainingSet) -> np.ndarray:
        """One view of a sample at the student's size: (3, image_px, image_px) uint8."""
        image = shards.decode(sample)
        rows = light_rows(sample.key, image.size, spec, view + 1) if self.rows is None else self.rows[sample.key]
        return views_of(image, rows[view : view + 1], self.view_px, spec.image_px)[0]


class _Stream(IterableDataset):
    """Batches from shuffled shards, through a shuffle buffer; endless. A picture is decoded as its batch is made."""

    def __init__(self, spec: TrainingSet, tokenizer: Tokenizer, batch_size: int, seed: int, rank: int, world: int,
                 teacher_slice: list[int] | None):
        self.spec, self.tokenizer, self.batch_size, self.seed = spec, tokenizer, batch_size, seed
        self.rank, self.world, self.teacher_slice = rank, world, teacher_slice
        reinforced_pairs = spec.pairs_kind == "reinforced"
        settings = reinforced.read_meta(spec.reinforced)["settings"] if reinforced_pairs else {}
        self.view_px = settings.get("image_px", spec.image_px)
        self.n_views = settings.get("n_aug", spec.light_views)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = torch.utils.data.get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        mine, parts = self.rank * workers + worker, self.world * workers
        rng = np.random.default_rng([self.seed, 4, mine])
        samples = self._samples(mine, parts, rng)
        while True:
            yield self._batch(list(itertools.islice(samples, self.batch_size)), rng)

    def _samples(self, mine: int, parts: int, rng: np.random.Generator) -> Iterator[tuple[_Opened, int, shards.Sample]]:
        """Shuffled samples, each with its shard and its place there."""
        count = len(shards.read_manifest(self.spec.pairs)["shards"])
        buffer: list[tuple[_Opened, int, shards.Sample]] = []
        for epoch in itertools.count():
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(count)
            # with fewer shards than workers everybody reads everything, each in an order of its own
            for index in order[mine::parts] if count >= parts else rng.permutation(count):
                for item in self._open(int(index)):
                    if len(buffer) < SHUFFLE_BUFFER:
                        buffer.append(item)
                        continue
                    at = int(rng.integers(len(buffer)))
                    item, buffer[at] = buffer[at], item
                    yield item
            if len(buffer) < SHUFFLE_BUFFER:  # a small set: it goes round the buffer once an epoch
                rng.shuffle(buffer)
                yield from buffer
                buffer = []

    def _open(self, index: int) -> Iterator[tuple[_Opened, int, shards.Sample]]:
        samples = list(shards.iter_samples(self.spec.pairs, shards=[index]))
        side = load_side(self.spec, (index, samples))
        if not len(side):
            return
        add_tokens(side, self.tokenizer, synthetic=self.spec.synthetic)
        rows = None
        if self.spec.pairs_kind == "reinforced":
            stored = reinforced.read_shard(self.spec.reinforced, index)
            rows = dict(zip(stored.keys, stored.augment, strict=True))
        opened = _Opened(side, rows, self.view_px)
        at = {key: i for i, key in enumerate(side.keys)}
        for sample in samples:
            if sample.key in at:
                yield opened, at[sample.key], sample

    def _batch(self, items: list[tuple[_Opened, int, shards.Sample]],
               rng: np.random.Generator) -> dict[str, torch.Tensor]:
        view = rng.integers(self.n_views, size=len(items))
        parts, places = [], []
        for opened in {id(o): o for o, _, _ in items}.values():  # one selection a shard
            place = np.asarray([i for i, (o, _, _) in enumerate(items) if o is opened])
            rows = np.asarray([items[i][1] for i in place])
            pick = rng.integers(opened.side.n_syn, size=len(rows))
            parts.append(select(opened.side, rows, view[place], pick, self.teacher_slice))
            places.append(place)
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        batch = {name: torch.cat([p[name] for p in parts])[back] for name in parts[0]}
        pictures = [o.picture(sample, int(v), self.spec) for (o, _, sample), v in zip(items, view, strict=True)]
        batch["image"] = torch.from_numpy(np.stack(pictures))
        return batch


class StreamedLoader:
    """Batches from shards as they are read. `batch(step)` must be called with rising steps; after a resume the
    stream starts anew with a seed of its own, so no sample is preferred."""

    def __init__(self, spec: TrainingSet, tokenizer: Tokenizer, batch_size: int, *, seed: int, start: int = 0,
                 rank: int = 0, world: int = 1, workers: int = 2, teacher_slice: list[int] | None = None):
        stream = _Stream(spec, tokenizer, batch_size // world, seed + 1_000_003 * start, rank, world, teacher_slice)
        self._batches = iter(DataLoader(stream, batch_size=None, num_workers=workers,
                                        pin_memory=torch.cuda.is_available()))

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The next batch."""
        return next(self._batches)
