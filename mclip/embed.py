"""Image and text embeddings of every pair, in clip-retrieval's layout (mclip.data.embedded, which also reads it).

`run` writes a shard's three files whole, so an interrupted run goes on where it stopped; a shard is embedded
again when the model's weights, the precision or the shard's bytes have changed.

    embeddings = mclip.embed.load("data/embeddings/large")
    embeddings.image        # (n, d) fp16
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mclip import progress
from mclip.data import shards
from mclip.data.embedded import PARTS, Embeddings, EmbeddingsError, load, part_file, read_meta
from mclip.files import write_json, write_whole


def run(teachers: dict[str, str], *, pairs: str | Path = "data/pairs", out: str | Path = "data/embeddings",
        batch_size: int = 64, precision: str = "auto", workers: int | None = None,
        device: str | None = None) -> dict[str, dict]:
    """Embed every pair with every teacher into OUT/<teacher>; shards that are there already are kept.

    Shard by shard, with all teachers: those that share a frozen text encoder run it once. All are in memory at once.

    Parameters
    ----------
    teachers : name -> open_clip model string: the entries of `teachers.models` that `embed.teachers` names.
    pairs : folder with the manifest of stage `data`.
    workers : decoding processes; 0 decodes in this one, None: see models.decoders.

    Returns
    -------
    teacher -> its meta.json.
    """
    import torch  # here: who loads embeddings does without torch's and open_clip's imports

    manifest = shards.read_manifest(pairs)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    own = [_Teacher.begin(name, model, manifest, Path(out) / name, precision, device)
           for name, model in teachers.items()]
    total = sum(manifest["shards"][i]["samples"] for teacher in own for i in teacher.todo)
    with progress.bar(desc="embed", unit="embedding", total=total) as bar:
        for i in sorted({i for teacher in own for i in teacher.todo}):
            _embed_shard(i, [teacher for teacher in own if i in teacher.todo], Path(pairs), bar, batch_size=batch_size,
                         precision=precision, workers=workers, device=device)
    return {teacher.name: teacher.meta for teacher in own}


@dataclass
class _Teacher:
    """A model that embeds, and which shards it has still to do."""

    name: str
    model: Any
    preprocess: Callable
    tokenizer: Any
    folder: Path
    meta: dict
    todo: set[int]

    @classmethod
    def begin(cls, name: str, model_name: str, manifest: dict, folder: Path, precision: str, device: str) -> "_Teacher":
        """Load it, and leave those of its files that are right."""
        from mclip import models

        model, _, preprocess, tokenizer = models.create(model_name, device=device)
        scale = models.logit_scale(model)
        dtype = str(models.resolve_precision(precision, device)).removeprefix("torch.")
        identity = {"model": model_name, "weights_sha256": models.weights_sha256(model_name), "precision": dtype}
        before = read_meta(folder)
        done = before.get("shards", []) if identity.items() <= before.items() else []
        wanted = [{"sha256": s["sha256"], "samples": s["samples"]} for s in manifest["shards"]]
        meta = {**identity, "teacher": name, "logit_scale": round(scale, 6), "image_size": models.image_size(model),
                "shards": wanted}
        todo = {i for i, shard in enumerate(wanted)
                if done[i:i + 1] != [shard] or not all(part_file(folder, part, i).is_file() for part in PARTS)}
        keep = {part_file(folder, part, i) for part in PARTS for i in range(len(wanted)) if i not in todo}
        for part, suffix in PARTS.items():  # what another run left
            for file in set((folder / part).glob(f"*{suffix}")) - keep:
                file.unlink()
        # from here on meta.json says what the files are or will be; a shard is done when its three are there
        write_json(folder / "meta.json", meta)
        return cls(name, models.for_inference(model), preprocess, tokenizer, folder, meta, todo)


def _embed_shard(i: int, teachers: list[_Teacher], pairs: Path, bar, *, batch_size: int, precision: str,
                 workers: int | None, device: str) -> None:
    """The shard's files of each of the teachers; a text encoder that they share runs once."""
    from torch.utils.data import DataLoader

    from mclip import models

    samples = list(shards.iter_samples(pairs, shards=[i]))
    table = pd.DataFrame({"key": [s.key for s in samples], "image_path": [s.key for s in samples],
                          "caption": [s.caption for s in samples]}).to_parquet(index=False)
    texts = models.encode_texts_with_all([(t.model, t.tokenizer) for t in teachers], [s.caption for s in samples],
                                         precision=precision)
    for teacher, text in zip(teachers, texts, strict=True):
        loader = DataLoader(shards.Pictures(samples, teacher.preprocess), batch_size=batch_size,
                            num_workers=models.decoders(device, workers), pin_memory=device.startswith("cuda"))
        image = models.encode_images(teacher.model, _counted(loader, bar), precision=precision)
        write_whole(part_file(teacher.folder, "img_emb", i), _npy(image.numpy().astype(np.float16)))
        write_whole(part_file(teacher.folder, "text_emb", i), _npy(text.numpy().astype(np.float16)))
        write_whole(part_file(teacher.folder, "metadata", i), table)


def _counted(loader: Iterable, bar) -> Iterator:
    for batch in loader:
        yield batch
        bar.update(len(batch))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


__all__ = ["Embeddings", "EmbeddingsError", "load", "run"]
