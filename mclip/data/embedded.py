"""Folders of embeddings, read: those that `mclip.embed` writes, and any that clip-retrieval wrote.

    FOLDER/img_emb/img_emb_0000.npy          (n, d) fp16, unit norm; one file for each input shard
    FOLDER/text_emb/text_emb_0000.npy        (n, d) fp16, unit norm; row i belongs to row i of img_emb
    FOLDER/metadata/metadata_0000.parquet    key, image_path (= key), caption
    FOLDER/meta.json                         which model and weights, which input shards

Of clip-retrieval's: no zero padding or any, files in natural order, metadata and text optional, rows normalised if they
are not. Apart from how embeddings are made, so that who only reads them is not made anew when a model's code changes.

    embeddings = mclip.data.embedded.load("data/embeddings/large")
    embeddings.image        # (n, d) fp16
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

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


def load(folder: str | Path) -> Embeddings:
    """Read a folder of embeddings (ours or clip-retrieval's); EmbeddingsError in one line if it is broken."""
    folder = Path(folder)
    files = _numbered(folder, "img_emb")
    if not files:
        ours = folder.parts[-3:-1] == ("data", "embeddings")
        todo = ": run `dvc repro embed` first" if ours else " (expected img_emb/img_emb_0.npy, ...)"
        raise EmbeddingsError(f"{folder}/img_emb is missing{todo}")
    meta = read_meta(folder)
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


def read_meta(folder: Path) -> dict:
    """The folder's meta.json; {} where it has none."""
    file = folder / "meta.json"
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
