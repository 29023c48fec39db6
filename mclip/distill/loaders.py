"""Batches of a training set (`mclip.distill.targets`). Two loaders give the same content:

- `CachedLoader`: every view decoded and augmented once into a memory-mapped uint8 file under
  data/cache, shared by all recipes and seeds; for sets that fit on a local disk. Batches are a
  function of (seed, step): resuming is exact.
- `StreamedLoader`: shards are read, decoded and augmented as they come, and of the other stages'
  files only what a shard needs; for sets that don't.

A batch is a dict of tensors: image (b, 3, s, s) uint8; tokens (b, context), ids (b,) int64 (equal
captions have equal ids); with synthetic captions syn_tokens, syn_ids; with a teacher label (b,),
teacher_image and teacher_text (b, d); with a reinforced set ensemble_image, ensemble_text,
ensemble_syn (b, D).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from mclip.data import shards
from mclip.distill.captions import Tokenizer
from mclip.distill.pairs import AllPairs, Crops, Side
from mclip.distill.pixels import views_of
from mclip.distill.targets import add_tokens, select, shard_side

SHUFFLE_BUFFER = 2000


class CachedLoader:
    """Batches of a set whose pixels are cached; batch `step` is a function of (seed, step).

    A global batch is cut into `world` equal parts, one a rank, so the samples of a step don't
    depend on `world`.
    """

    def __init__(
        self,
        side: Side,
        pixels: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        teacher_slice: list[int] | None = None,
    ):
        _check_size(batch_size, len(side))
        self.side, self.pixels, self.batch_size, self.seed = side, pixels, batch_size, seed
        self.rank, self.world, self.teacher_slice = rank, world, teacher_slice
        # of the epoch that is under way: to shuffle millions of pairs at each step would take
        # longer than the step
        self._order = lru_cache(maxsize=1)(
            lambda epoch: np.random.default_rng([seed, 1, epoch]).permutation(len(side))
        )

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step (0-based)."""
        per_epoch = len(self.side) // self.batch_size
        epoch, at = divmod(step, per_epoch)
        rng = np.random.default_rng([self.seed, 2, step])
        rows = self._order(epoch)[at * self.batch_size : (at + 1) * self.batch_size]
        view = rng.integers(self.pixels.shape[1], size=len(rows))
        pick = rng.integers(self.side.n_syn, size=len(rows))
        share = slice(self.rank, None, self.world)
        rows, view = rows[share], view[share]
        batch = select(self.side, rows, view, pick[share], self.teacher_slice)
        batch["image"] = torch.from_numpy(self.pixels[self.side.row[rows], view])
        return batch


def _check_size(batch_size: int, pairs: int) -> None:
    if batch_size > pairs:
        raise ValueError(
            f"distill.train.batch_size {batch_size} is more than the {pairs} pairs there are"
        )


@dataclass(frozen=True)
class _Opened:
    """A shard in a stream: everything but its pixels, and its pictures' crops."""

    side: Side
    crops: Crops

    def picture(self, sample: shards.Sample, view: int, pairs: AllPairs) -> np.ndarray:
        """One view of a sample at the student's size: (3, image_px, image_px) uint8."""
        image = shards.decode(sample)
        rows = self.crops.rows(sample.key, image.size, view + 1)
        return views_of(image, rows[view:], pairs.view_px, pairs.spec.image_px)[0]


class _Stream(IterableDataset):
    """Batches from shuffled shards, through a shuffle buffer; endless. A picture is decoded as its
    batch is made.
    """

    def __init__(
        self,
        pairs: AllPairs,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        teacher_slice: list[int] | None,
    ):
        self.pairs, self.tokenizer, self.batch_size, self.seed = pairs, tokenizer, batch_size, seed
        self.rank, self.world, self.teacher_slice = rank, world, teacher_slice
        pairs.open_tables()  # here, once for all workers

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = torch.utils.data.get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        mine, parts = self.rank * workers + worker, self.world * workers
        rng = np.random.default_rng([self.seed, 4, mine])
        samples = self._samples(mine, parts, rng)
        while True:
            yield self._batch(list(itertools.islice(samples, self.batch_size)), rng)

    def _samples(
        self, mine: int, parts: int, rng: np.random.Generator
    ) -> Iterator[tuple[_Opened, int, shards.Sample]]:
        """Shuffled samples, each with its shard and its place there."""
        count = self.pairs.shard_count
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
        spec = self.pairs.spec
        samples = list(shards.iter_samples(spec.pairs, shards=[index]))
        side, crops = shard_side(self.pairs, index, samples)
        if not len(side):
            return
        add_tokens(side, self.tokenizer, synthetic=spec.synthetic)
        opened = _Opened(side, crops)
        at = {key: i for i, key in enumerate(side.keys)}
        for sample in samples:
            if sample.key in at:
                yield opened, at[sample.key], sample

    def _batch(
        self, items: list[tuple[_Opened, int, shards.Sample]], rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        view = rng.integers(self.pairs.n_views, size=len(items))
        parts, places = [], []
        for opened in {id(o): o for o, _, _ in items}.values():  # one selection a shard
            place = np.asarray([i for i, (o, _, _) in enumerate(items) if o is opened])
            rows = np.asarray([items[i][1] for i in place])
            pick = rng.integers(opened.side.n_syn, size=len(rows))
            parts.append(select(opened.side, rows, view[place], pick, self.teacher_slice))
            places.append(place)
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        batch = {name: torch.cat([p[name] for p in parts])[back] for name in parts[0]}
        pictures = [
            o.picture(sample, int(v), self.pairs)
            for (o, _, sample), v in zip(items, view, strict=True)
        ]
        batch["image"] = torch.from_numpy(np.stack(pictures))
        return batch


class StreamedLoader:
    """Batches from shards as they are read. `batch(step)` must be called with rising steps; after a
    resume the stream starts anew with a seed of its own, so no sample is preferred.
    """

    def __init__(
        self,
        pairs: AllPairs,
        tokenizer: Tokenizer,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
        teacher_slice: list[int] | None = None,
    ):
        if pairs.spec.fraction == 1:  # of a part only reading everything tells
            # a stream of nothing would never come to an end
            _check_size(batch_size, pairs.count())
        stream = _Stream(
            pairs,
            tokenizer,
            batch_size // world,
            seed + 1_000_003 * start,
            rank,
            world,
            teacher_slice,
        )
        self._batches = iter(
            DataLoader(
                stream, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available()
            )
        )

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The next batch."""
        return next(self._batches)
