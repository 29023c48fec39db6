"""What a training set holds for each pair besides pixels: the caption and the teachers' targets.

It combines the output of several stages: the pairs of a run (`mclip.distill.pairs`), their cluster
labels and teacher embeddings. `load_side` reads all of it, for sets that are held in memory;
`shard_side` reads one shard's part, for sets that are not: it finds a shard's keys in mapped tables
(`mclip.data.stores.lookup`) and opens that shard's files only.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mclip.data import shards
from mclip.data.stores import embeddings as embedding_store
from mclip.distill.captions import Tokenizer, caption_id, tokenise
from mclip.distill.pairs import AllPairs, Crops, Side


def load_side(pairs: AllPairs) -> Side:
    """Load everything but the pixels of a set that is held in memory.

    Raises
    ------
    FileNotFoundError
        Something is missing; the message names the stage to run.
    ValueError
        The parts do not fit together.
    """
    spec, side = pairs.spec, pairs.side()
    if not side.keys:
        raise ValueError(f"no pair to train on ({spec.which} pairs of {spec.pairs})")
    if spec.teacher is not None:
        table = embedding_store.load(Path(spec.embeddings) / spec.teacher)
        side.arrays |= _taught(pairs, side.keys, table.keys, table.image, table.text)
    return side


def shard_side(pairs: AllPairs, index: int, samples: Sequence[shards.Sample]) -> tuple[Side, Crops]:
    """`load_side` of one shard, given its samples, and the crops of its pictures.

    It may have no pair. Raises as `load_side`.
    """
    spec = pairs.spec
    side, crops = pairs.shard_side(index, samples)
    if side.keys and spec.teacher is not None:
        table = embedding_store.load_shard(Path(spec.embeddings) / spec.teacher, index)
        side.arrays |= _taught(pairs, side.keys, *table)
    return side, crops


def _taught(
    pairs: AllPairs,
    keys: list[str],
    table_keys: list[str],
    image: np.ndarray,
    text: np.ndarray,
) -> dict[str, torch.Tensor]:
    """Each key's cluster label and the teacher's embeddings of its picture and caption."""
    spec, labels = pairs.spec, pairs.labels(keys)
    if spec.which == "kept" and (labels < 0).any():  # of the others no term asks for a label
        raise ValueError(
            f"{spec.clusters}: no cluster label for {(labels < 0).sum()} pairs, the first is "
            f"{keys[int(np.argmax(labels < 0))]}; run `dvc repro cluster`"
        )
    position = {key: i for i, key in enumerate(table_keys)}
    if missing := [key for key in keys if key not in position]:
        raise ValueError(
            f"{Path(spec.embeddings) / spec.teacher}: no embedding of {len(missing)} pairs, "
            "the first is "
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
