"""Embed every pair, images and texts, in clip-retrieval's layout.

`mclip.data.stores.embeddings` has the layout and reads it. `run` writes a shard's three files
whole, so an interrupted run continues where it stopped; a shard is embedded again when the model's
weights, the precision or the shard's bytes have changed. Where the stage `teachers` has kept the
features of a teacher's frozen trunk (mclip.data.stores.features), only the head is applied: the
same bytes, sooner.

    embeddings = mclip.embed.load("data/embeddings/large")
    embeddings.image        # (n, d) fp16
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mclip.data import shards
from mclip.data.stores import features
from mclip.data.stores.embeddings import (
    PARTS,
    Embeddings,
    EmbeddingsError,
    load,
    part_file,
    read_meta,
)
from mclip.system import progress
from mclip.system.files import write_json, write_whole
from mclip.system.workers import decoding_processes, is_alone, run_tasks, worker_device


def run(
    teachers: dict[str, str],
    *,
    pairs: str | Path = "data/pairs",
    out: str | Path = "data/embeddings",
    cache: str | Path = features.CACHE,
    batch_size: int = 64,
    precision: str = "auto",
    decoders: int | None = None,
    workers: int = 1,
    backend: str = "processes",
) -> dict[str, dict]:
    """Embed every pair with every teacher into OUT/TEACHER; existing shards are kept.

    Shard by shard, with all teachers: those that share a frozen text encoder run it once. All are
    in memory at once.

    Parameters
    ----------
    teachers : name -> open_clip model string: the entries of `teachers.models` that
        `embed.teachers` names.
    pairs : folder with the manifest of stage `data`.
    cache : folder of the trunks' features that are known already; nothing is written there.
    decoders : decoding processes; 0 decodes in the one that embeds, None: see
        mclip.system.workers.decoding_processes.
    workers, backend : processes that shards are dealt out to, each with a GPU of its own where
        there are any, see mclip.system.workers. They write the same bytes.

    Returns
    -------
    teacher -> its meta.json.
    """
    import torch  # here: who loads embeddings does without torch's and open_clip's imports

    manifest = shards.read_manifest(pairs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = is_alone(workers, backend)
    own = [
        _Teacher.begin(name, model, manifest, Path(out) / name, precision, device, load=alone)
        for name, model in teachers.items()
    ]
    todo = {
        i: [teacher for teacher in own if i in teacher.todo]
        for i in sorted({i for t in own for i in t.todo})
    }
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "precision": precision,
        "decoders": decoders,
        "cache": cache,
    }
    total = sum(manifest["shards"][i]["samples"] * len(wanted) for i, wanted in todo.items())
    with progress.bar(desc="embed", unit="embedding", total=total, hidden=not total) as bar:
        if alone:
            for i, wanted in todo.items():
                _embed_shard(
                    i,
                    [(t.loaded, t.folder) for t in wanted],  # type: ignore[misc]
                    Path(pairs),
                    done=bar.update,
                    device=device,
                    **options,
                )
        else:
            tasks = [
                (i, [(t.meta["model"], t.folder) for t in wanted], Path(pairs), options)
                for i, wanted in todo.items()
            ]
            for count in run_tasks(
                _embed_elsewhere, tasks, workers=workers, backend=backend, gpu=device == "cuda"
            ):
                bar.update(count)
    return {teacher.name: teacher.meta for teacher in own}


class _Loaded(NamedTuple):
    """A teacher in memory."""

    model: Any
    preprocess: Callable
    tokenizer: Any

    @classmethod
    def of(cls, model_name: str, device: str) -> "_Loaded":
        from mclip import models

        model, _, preprocess, tokenizer = models.create(model_name, device=device)
        return cls(models.for_inference(model), preprocess, tokenizer)


_loaded_once = cache(_Loaded.of)  # by a worker, for all its shards


@dataclass
class _Teacher:
    """A teacher, and the shards that it has not embedded yet."""

    name: str
    loaded: _Loaded | None
    folder: Path
    meta: dict
    todo: set[int]

    @classmethod
    def begin(
        cls,
        name: str,
        model_name: str,
        manifest: dict,
        folder: Path,
        precision: str,
        device: str,
        *,
        load: bool,
    ) -> "_Teacher":
        """See what there is to do, and leave those of its files that are right. load: it will embed
        here.
        """
        from mclip import models

        loaded = _Loaded.of(model_name, device if load else "cpu")
        dtype = str(models.resolve_precision(precision, device)).removeprefix("torch.")
        identity = {
            "model": model_name,
            "weights_sha256": models.weights_sha256(model_name),
            "precision": dtype,
        }
        before = read_meta(folder)
        done = before.get("shards", []) if identity.items() <= before.items() else []
        wanted = [{"sha256": s["sha256"], "samples": s["samples"]} for s in manifest["shards"]]
        meta = {
            **identity,
            "teacher": name,
            "logit_scale": round(models.logit_scale(loaded.model), 6),
            "image_size": models.image_size(loaded.model),
            "shards": wanted,
        }
        todo = {
            i
            for i, shard in enumerate(wanted)
            if done[i : i + 1] != [shard]
            or not all(part_file(folder, part, i).is_file() for part in PARTS)
        }
        keep = {
            part_file(folder, part, i)
            for part in PARTS
            for i in range(len(wanted))
            if i not in todo
        }
        for part, suffix in PARTS.items():  # what another run left
            for file in set((folder / part).glob(f"*{suffix}")) - keep:
                file.unlink()
        # from here on meta.json says what the files are or will be; a shard is done when its three
        # are there
        write_json(folder / "meta.json", meta)
        return cls(name, loaded if load else None, folder, meta, todo)


def _embed_elsewhere(i: int, teachers: list[tuple[str, Path]], pairs: Path, options: dict) -> int:
    """A worker's task: embed a shard by teachers that it loads itself; returns how many rows."""
    device = worker_device()
    counts: list[int] = []
    loaded = [(_loaded_once(model, device), folder) for model, folder in teachers]
    _embed_shard(i, loaded, pairs, done=counts.append, device=device, **options)
    return sum(counts)


def _embed_shard(
    i: int,
    teachers: list[tuple[_Loaded, Path]],
    pairs: Path,
    *,
    done: Callable[[int], object],
    batch_size: int,
    precision: str,
    decoders: int | None,
    cache: str | Path,
    device: str,
) -> None:
    """The shard's files of each of the teachers; a text encoder that they share runs once."""
    from torch.utils.data import DataLoader

    from mclip import models

    samples = list(shards.iter_samples(pairs, shards=[i]))
    entry = shards.read_manifest(pairs)["shards"][i]
    table = pd.DataFrame(
        {
            "key": [s.key for s in samples],
            "image_path": [s.key for s in samples],
            "caption": [s.caption for s in samples],
        }
    ).to_parquet(index=False)
    texts = models.encode_texts_with_all(
        [(t.model, t.tokenizer) for t, _ in teachers],
        [s.caption for s in samples],
        precision=precision,
    )
    for (teacher, folder), text in zip(teachers, texts, strict=True):
        options: dict[str, Any] = {"precision": precision, "batch_size": batch_size}
        processes = decoding_processes(device, decoders)
        if features.has_trunk(teacher.model):
            rows = features.image_features(
                teacher.model,
                samples,
                entry,
                decoders=processes,
                cache=cache,
                done=done,
                **options,
            )
            image = features.embed_images(teacher.model, rows, **options)
        else:
            loader: DataLoader = DataLoader(
                shards.Pictures(samples, teacher.preprocess),  # type: ignore[arg-type]
                batch_size=batch_size,
                num_workers=processes,
                pin_memory=device.startswith("cuda"),
            )
            image = models.encode_images(teacher.model, _counted(loader, done), precision=precision)
        write_whole(part_file(folder, "img_emb", i), _npy(image.numpy().astype(np.float16)))
        write_whole(part_file(folder, "text_emb", i), _npy(text.numpy().astype(np.float16)))
        write_whole(part_file(folder, "metadata", i), table)


def _counted(loader: Iterable, done: Callable[[int], object]) -> Iterator:
    for batch in loader:
        yield batch
        done(len(batch))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


__all__ = ["Embeddings", "EmbeddingsError", "load", "run"]
