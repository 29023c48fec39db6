"""What a training set says of each pair beside its pixels: caption, and what the teachers said of
it.

It ties together what the stages wrote: the pairs, which of them `balance` kept, cluster labels,
teacher embeddings, the reinforced set. `load_side` reads all of it, for sets that are held in
memory; `ShardSides` one shard's part, for sets that are not: it finds a shard's keys in mapped
tables (`mclip.data.stores.lookup`) and opens that shard's files only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mclip.data import shards
from mclip.data.stores import balance as balance_store
from mclip.data.stores import clusters as cluster_store
from mclip.data.stores import embeddings as embedding_store
from mclip.data.stores import lookup, reinforced
from mclip.distill.captions import Tokenizer, caption_id, read_captions, tokenise
from mclip.distill.runs import TrainingSet, in_part

Kept = Callable[[list[str]], np.ndarray]  # (n,) bool


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
        return balance_store.count_kept(spec.balance)
    return shards.read_manifest(spec.pairs)["samples"]


def _keys(spec: TrainingSet) -> Iterator[str]:
    """Of all pairs of a kind, whatever the fraction."""
    if spec.pairs_kind == "reinforced":
        for index in range(len(shards.read_manifest(spec.pairs)["shards"])):
            yield from reinforced.read_keys(spec.reinforced, index)
    elif spec.pairs_kind == "kept":
        for keys in balance_store.kept(spec.balance):
            yield from map(str, keys)
    else:
        yield from read_captions(spec.pairs, spec.cache)[0]


def load_side(spec: TrainingSet) -> Side:
    """Everything but the pixels, in memory.

    Raises FileNotFoundError naming the stage to run, ValueError where the parts do not fit
    together.
    """
    if spec.pairs_kind == "reinforced":
        count = len(shards.read_manifest(spec.pairs)["shards"])
        side = _reinforced(spec, [reinforced.read_shard(spec.reinforced, i) for i in range(count)])
    else:
        kept = None
        if spec.pairs_kind == "kept":
            names = {str(key) for keys in balance_store.kept(spec.balance) for key in keys}
            kept = lambda keys: np.array([key in names for key in keys], bool)  # noqa: E731
        side = _plain(spec, *read_captions(spec.pairs, spec.cache), kept)
    if not side.keys:
        raise ValueError(f"no pair to train on ({spec.pairs_kind} pairs of {spec.pairs})")
    if spec.teacher is not None:
        clusters, table = (
            cluster_store.read(spec.clusters),
            embedding_store.load(Path(spec.embeddings) / spec.teacher),
        )
        label_of = dict(zip(map(str, clusters.keys), clusters.labels.tolist(), strict=True))
        labels = np.array([label_of.get(key, -1) for key in side.keys], np.int64)
        side.arrays |= _taught(spec, side.keys, labels, table.keys, table.image, table.text)
    return side


class ShardSides:
    """`load_side` for one shard at a time: `sides(index, samples)` holds what those samples need
    and nothing else.

    The tables in which it finds their keys are made once under `spec.cache`, by the first process
    that wants them.
    """

    def __init__(self, spec: TrainingSet):
        self.spec = spec
        self.kept = self.labels = None
        if spec.pairs_kind == "kept":
            self.kept = balance_store.lookup_kept(spec.balance, spec.cache)
        if spec.teacher is not None:
            self.labels = lookup.make(
                spec.cache,
                "labels",
                cluster_store.table(spec.clusters),
                lambda: cluster_store.labels(spec.clusters),
            )

    def __call__(
        self, index: int, samples: list[shards.Sample]
    ) -> tuple[Side, reinforced.Shard | None]:
        """The shard's side, which may have no pair, and where it is reinforced what is stored of
        it.

        Raises as `load_side`.
        """
        spec, stored = self.spec, None
        if spec.pairs_kind == "reinforced":
            stored = reinforced.read_shard(spec.reinforced, index)
            side = _reinforced(spec, [stored])
        else:
            kept = (lambda keys: self.kept.find(keys) >= 0) if self.kept is not None else None
            side = _plain(spec, [s.key for s in samples], [s.caption for s in samples], kept)
        if side.keys and self.labels is not None:
            table = embedding_store.load_shard(Path(spec.embeddings) / spec.teacher, index)
            side.arrays |= _taught(spec, side.keys, self.labels.find(side.keys), *table)
        return side, stored


def _reinforced(spec: TrainingSet, parts: list[reinforced.Shard]) -> Side:
    keys, captions = ([x for p in parts for x in getattr(p, name)] for name in ("keys", "captions"))
    arrays = {
        "ensemble_image": torch.cat([p.image_emb for p in parts]),
        "ensemble_texts": torch.cat([p.text_emb for p in parts]),
    }
    side = Side(
        row=np.arange(len(keys)),
        keys=keys,
        captions=captions,
        known=captions,
        arrays=arrays,
        syn_text=[texts for p in parts for texts in p.syn_text],
    )
    return (
        _cut(side, np.array([in_part(key, spec.fraction) for key in keys], bool))
        if spec.fraction < 1
        else side
    )


def _plain(spec: TrainingSet, keys: list[str], captions: list[str], kept: Kept | None) -> Side:
    side = Side(row=np.arange(len(keys)), keys=keys, captions=captions, known=captions, arrays={})
    if kept is not None:
        side = _cut(side, kept(keys))
    return (
        _cut(side, np.array([in_part(key, spec.fraction) for key in side.keys], bool))
        if spec.fraction < 1
        else side
    )


def _cut(side: Side, chosen: np.ndarray) -> Side:
    """The chosen samples (n,) bool of a side; `known` stays."""
    part = np.flatnonzero(chosen)
    return Side(
        row=side.row[part],
        keys=[side.keys[i] for i in part],
        captions=[side.captions[i] for i in part],
        known=side.known,
        arrays={name: values[part] for name, values in side.arrays.items()},
        syn_text=side.syn_text and [side.syn_text[i] for i in part],
    )


def _taught(
    spec: TrainingSet,
    keys: list[str],
    labels: np.ndarray,
    table_keys: list[str],
    image: np.ndarray,
    text: np.ndarray,
) -> dict[str, torch.Tensor]:
    """Cluster label and the teacher's embeddings of each key's picture and caption; labels: -1
    where there is none.
    """
    if (labels < 0).any():
        raise ValueError(
            f"{spec.clusters}: no cluster label for {(labels < 0).sum()} pairs, the first is "
            f"{keys[int(np.argmax(labels < 0))]}; run `dvc repro cluster`"
        )
    position = {key: i for i, key in enumerate(table_keys)}
    if missing := [key for key in keys if key not in position]:
        raise ValueError(
            f"{Path(spec.embeddings) / spec.teacher}: no embedding of {len(missing)} pairs, the first is "
            f"{missing[0]}; run `dvc repro embed`"
        )
    rows = np.array([position[key] for key in keys], np.int64)
    return {
        "label": torch.from_numpy(labels),
        "teacher_image": torch.from_numpy(np.asarray(image[rows])),
        "teacher_text": torch.from_numpy(np.asarray(text[rows])),
    }


def add_tokens(
    side: Side, tokenizer: Tokenizer, *, synthetic: bool, cache: str | None = None
) -> None:
    """Tokenise the captions, each distinct one once, into `tokens`, `ids` (and `syn_tokens`,
    `syn_ids`).

    cache : a folder that keeps the tokens for the next run.
    """
    lists = {"": [[c] for c in side.captions]}
    if synthetic:
        if not side.syn_text or not side.syn_text[0]:
            raise ValueError(
                "synthetic captions wanted, but the reinforced set has none (reinforce.n_syn)"
            )
        lists["syn_"] = side.syn_text
    for prefix, texts in lists.items():
        distinct = sorted({t for group in texts for t in group} if prefix else set(side.known))
        index = {t: i for i, t in enumerate(distinct)}
        tokens = tokenise(distinct, tokenizer, cache)
        where = torch.tensor([[index[t] for t in group] for group in texts])
        ids = torch.tensor([caption_id(t) for t in distinct])
        side.arrays[f"{prefix}tokens"] = tokens[where]
        side.arrays[f"{prefix}ids"] = ids[where]


def select(
    side: Side,
    rows: np.ndarray,
    view: np.ndarray,
    pick: np.ndarray,
    teacher_slice: list[int] | None,
) -> dict[str, torch.Tensor]:
    """The side of one batch: for each row its arrays, the embedding of its view, its synthetic
    caption `pick`.

    `teacher_slice`: where the teacher is one of the ensemble, its slice; then teacher_image is its
    embedding of the augmented picture rather than of the plain one.
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
