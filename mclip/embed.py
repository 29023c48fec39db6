"""Image and text embeddings of every pair, in clip-retrieval's layout.

    FOLDER/img_emb/img_emb_0000.npy          (n, d) fp16, unit norm; one file for each input shard
    FOLDER/text_emb/text_emb_0000.npy        (n, d) fp16, unit norm; row i belongs to row i of img_emb
    FOLDER/metadata/metadata_0000.parquet    key, image_path (= key), caption
    FOLDER/meta.json                         which model and weights, which input shards

`run` writes a shard's three files whole, so an interrupted run goes on where it stopped; a shard is embedded
again when the model's weights, the precision or the shard's bytes have changed.

`load` reads such a folder, and any that clip-retrieval wrote: no zero padding or any, files in natural order,
metadata and text optional, rows normalised if they are not.

    embeddings = mclip.embed.load("data/embeddings/large")
    embeddings.image        # (n, d) fp16
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mclip import progress
from mclip.data import shards
from mclip.files import write_json, write_whole

PARTS = {"img_emb": ".npy", "text_emb": ".npy", "metadata": ".parquet"}


class EmbeddingsError(ValueError):
    """A folder of embeddings is missing or broken; the message names the file, and the row."""


@dataclass(frozen=True)
class Embeddings:
    """Row i of `image` and `text` belongs to `keys[i]`.

    keys : n sample keys. image : (n, d) fp16, unit norm. text : (n, d) fp16 or None where there is none.
    logit_scale : the teacher's own, exponentiated (100 where the folder doesn't say). model : its name or "".
    captions : n true captions, or None.
    """

    keys: list[str]
    image: np.ndarray
    text: np.ndarray | None
    logit_scale: float
    model: str
    captions: list[str] | None = None


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
    import torch  # here: balancing and clustering read embeddings, and do without torch's and open_clip's imports

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


def load(folder: str | Path) -> Embeddings:
    """Read a folder of embeddings (ours or clip-retrieval's); EmbeddingsError in one line if it is broken."""
    folder = Path(folder)
    files = _numbered(folder, "img_emb")
    if not files:
        ours = folder.parts[-3:-1] == ("data", "embeddings")
        todo = ": run `dvc repro embed` first" if ours else " (expected img_emb/img_emb_0.npy, ...)"
        raise EmbeddingsError(f"{folder}/img_emb is missing{todo}")
    meta = _read_json(folder / "meta.json")
    if meta and len(meta["shards"]) > len(files):
        raise EmbeddingsError(f"{folder}: {len(files)} of {len(meta['shards'])} shards embedded: "
                              "run `dvc repro embed` to the end")
    image = _stack(list(files.values()))
    text_files = _numbered(folder, "text_emb")
    text = _stack(list(text_files.values())) if text_files else None
    if text is not None and len(text) != len(image):
        raise EmbeddingsError(f"{folder}: {len(image)} image rows but {len(text)} text rows")
    keys, captions = _keys(folder, files, len(image))
    scale = float(meta.get("logit_scale", 100.0))
    return Embeddings(keys, image, text, scale, meta.get("model", ""), captions)


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
        before = _read_json(folder / "meta.json")
        done = before.get("shards", []) if identity.items() <= before.items() else []
        wanted = [{"sha256": s["sha256"], "samples": s["samples"]} for s in manifest["shards"]]
        meta = {**identity, "teacher": name, "logit_scale": round(scale, 6), "image_size": models.image_size(model),
                "shards": wanted}
        todo = {i for i, shard in enumerate(wanted)
                if done[i:i + 1] != [shard] or not all(_file(folder, part, i).is_file() for part in PARTS)}
        keep = {_file(folder, part, i) for part in PARTS for i in range(len(wanted)) if i not in todo}
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
        write_whole(_file(teacher.folder, "img_emb", i), _npy(image.numpy().astype(np.float16)))
        write_whole(_file(teacher.folder, "text_emb", i), _npy(text.numpy().astype(np.float16)))
        write_whole(_file(teacher.folder, "metadata", i), table)


def _counted(loader: Iterable, bar) -> Iterator:
    for batch in loader:
        yield batch
        bar.update(len(batch))


def _file(folder: Path, part: str, i: int) -> Path:
    return folder / part / f"{part}_{i:04d}{PARTS[part]}"


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as err:
        raise EmbeddingsError(f"{file}: not valid JSON ({err})") from err


def _numbered(folder: Path, part: str) -> dict[int, Path]:
    """The files PART/PART_<number>.* of a folder by their number, in its order."""
    found = {}
    for file in (folder / part).glob(f"*{PARTS[part]}"):
        if not file.name.startswith(".") and (number := re.search(r"(\d+)$", file.stem)):
            found[int(number[1])] = file
    return dict(sorted(found.items()))


def _stack(files: list[Path]) -> np.ndarray:
    """Rows of all files, (n, d) fp16 and unit norm; a single fp16 file stays memory-mapped."""
    parts = []
    for file in files:
        try:
            rows = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as err:
            raise EmbeddingsError(f"{file}: not a whole .npy file ({err})") from err
        if rows.ndim == 2 and not len(rows):  # an empty shard has no columns either
            continue
        if rows.ndim != 2 or rows.dtype.kind != "f":
            raise EmbeddingsError(f"{file}: expected (n, d) floats, found {rows.dtype} {rows.shape}")
        if parts and rows.shape[1] != parts[0].shape[1]:
            raise EmbeddingsError(f"{file}: {rows.shape[1]} columns, {files[0].name} has {parts[0].shape[1]}")
        norm = np.concatenate([np.linalg.norm(rows[i:i + 65536].astype(np.float32), axis=1)
                               for i in range(0, len(rows), 65536)] or [np.empty(0, np.float32)])
        bad = np.flatnonzero(~np.isfinite(norm) | (norm < 1e-6))
        if bad.size:
            what = "is all zeros" if np.isfinite(norm[bad[0]]) else "is not finite"
            raise EmbeddingsError(f"{file}: row {bad[0]} {what} ({bad.size} such rows in this file)")
        if np.abs(norm - 1).max(initial=0) > 0.01:
            rows = rows.astype(np.float32) / norm[:, None]
        parts.append(rows if rows.dtype == np.float16 else rows.astype(np.float16))
    if not parts:
        raise EmbeddingsError(f"{files[0].parent}: no rows")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _keys(folder: Path, files: dict[int, Path], n: int) -> tuple[list[str], list[str] | None]:
    """Keys and captions from the metadata, or row numbers where there is none."""
    tables = _numbered(folder, "metadata")
    if not tables:
        return [f"{i:09d}" for i in range(n)], None
    if missing := sorted(set(files) - set(tables)):
        raise EmbeddingsError(f"{folder}/metadata: no file for {files[missing[0]].name}")
    table = pd.concat([pd.read_parquet(tables[i]) for i in files], ignore_index=True)
    if len(table) != n:
        raise EmbeddingsError(f"{folder}: {n} image rows but {len(table)} rows of metadata")
    column = next((c for c in ("key", "uid", "image_path") if c in table), None)
    keys = table[column].astype(str).tolist() if column else [f"{i:09d}" for i in range(n)]
    return keys, table["caption"].tolist() if "caption" in table else None
