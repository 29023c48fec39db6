"""Folders of embeddings, read: those that `mclip.embed` writes, and any that clip-retrieval wrote.

    FOLDER/img_emb/img_emb_0000.npy          (n, d) fp16, unit norm; one file for each input shard
    FOLDER/text_emb/text_emb_0000.npy        (n, d) fp16, unit norm; row i belongs to row i of img_emb
    FOLDER/metadata/metadata_0000.parquet    key, image_path (= key), caption
    FOLDER/meta.json                         which model and weights, which input shards

Of clip-retrieval's: no zero padding or any, files in natural order, metadata and text optional,
rows normalised if they are not. Apart from how embeddings are made, so that who only reads them is
not made anew when a model's code changes.

    embeddings = mclip.data.stores.embeddings.load("data/embeddings/large")
    embeddings.image        # (n, d) fp16

Web sets are too large for that: `index` has their keys and files and reads no row, `load_shard`
reads one shard.
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

    keys : n sample keys. image : (n, d) fp16, unit norm. text : (n, d) fp16 or None where there is
        none.
    logit_scale : the teacher's own, exponentiated (100 where the folder doesn't say). model : its
        name or "".
    captions : n true captions, or None. shard : (n,) the number of each row's file, ours: of its
        shard of pairs.
    """

    keys: list[str]
    image: np.ndarray
    text: np.ndarray | None
    logit_scale: float
    model: str
    captions: list[str] | None = None
    shard: np.ndarray | None = None


@dataclass(frozen=True)
class Index:
    """A folder without its rows: row i of the files in `image`, one after the other, belongs to
    `keys[i]` and comes from the file numbered `shard[i]`. What takes a list of files
    (`mclip.data.stores.rows.Rows`) reads them block by block.
    """

    keys: np.ndarray
    image: list[Path]
    shard: np.ndarray


def load(folder: str | Path, limit: int | None = None) -> Embeddings:
    """Read a folder of embeddings (ours or clip-retrieval's); EmbeddingsError in one line if it is
    broken.

    limit : about so many rows at most, of whole files that are spread over the folder.
    """
    folder = Path(folder)
    files, meta = _image_files(folder)
    rows = [len(_rows(path)) for path in files.values()]
    if limit is not None and sum(rows) > limit:
        few = max(1, int(limit / (sum(rows) / len(rows))))
        places = np.unique(np.linspace(0, len(rows) - 1, few).round().astype(int))
        files, rows = (
            dict(np.array(list(files.items()), object)[places].tolist()),
            [rows[i] for i in places],
        )
    image = _stack(list(files.values()))
    text_files = _numbered(folder, "text_emb")
    if limit is not None:
        text_files = {number: path for number, path in text_files.items() if number in files}
    text = _stack(list(text_files.values())) if text_files else None
    if text is not None and len(text) != len(image):
        raise EmbeddingsError(f"{folder}: {len(image)} image rows but {len(text)} text rows")
    keys, captions = _keys(folder, files, len(image), _numbered(folder, "metadata"))
    scale = float(meta.get("logit_scale", 100.0))
    return Embeddings(
        keys, image, text, scale, meta.get("model", ""), captions, np.repeat(list(files), rows)
    )


def index(folder: str | Path) -> Index:
    """Keys and image files of a folder; EmbeddingsError as in `load`, but for what only the rows
    would tell.
    """
    folder = Path(folder)
    files, _ = _image_files(folder)
    tables = _numbered(folder, "metadata")
    rows = [len(_rows(path)) for path in files.values()]
    shard = np.repeat(list(files), rows)
    if not tables:
        return Index(
            np.array([f"{i:09d}" for i in range(len(shard))], str), list(files.values()), shard
        )
    keys = [
        np.array(_keys(folder, {number: path}, n, tables)[0], str)
        for (number, path), n in zip(files.items(), rows, strict=True)
    ]
    return Index(np.concatenate(keys), list(files.values()), shard)


def load_shard(folder: str | Path, number: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys, image and text rows of one shard that `mclip.embed` wrote; the rows stay in their
    files.

    Raises EmbeddingsError where one of its files is missing or not whole.
    """
    files = {part: part_file(Path(folder), part, number) for part in PARTS}
    for path in files.values():
        if not path.is_file():
            raise EmbeddingsError(f"{path} is missing: run `dvc repro embed` first")
    image, text = (_rows(files[part]) for part in ("img_emb", "text_emb"))
    keys, _ = _keys(
        Path(folder), {number: files["img_emb"]}, len(image), {number: files["metadata"]}
    )
    return keys, image, text


def part_file(folder: Path, part: str, number: int) -> Path:
    """Where `mclip.embed` writes a part (of PARTS) of a shard."""
    return folder / part / f"{part}_{number:04d}{PARTS[part]}"


def read_meta(folder: Path) -> dict:
    """The folder's meta.json; {} where it has none."""
    path = folder / "meta.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as err:
        raise EmbeddingsError(f"{path}: not valid JSON ({err})") from err


def _image_files(folder: Path) -> tuple[dict[int, Path], dict]:
    """The image files of a folder that is whole, by their number, and its meta.json."""
    files = _numbered(folder, "img_emb")
    if not files:
        ours = folder.parts[-3:-1] == ("data", "embeddings")
        todo = ": run `dvc repro embed` first" if ours else " (expected img_emb/img_emb_0.npy, ...)"
        raise EmbeddingsError(f"{folder}/img_emb is missing{todo}")
    meta = read_meta(folder)
    if meta and len(meta["shards"]) > len(files):
        raise EmbeddingsError(
            f"{folder}: {len(files)} of {len(meta['shards'])} shards embedded: "
            "run `dvc repro embed` to the end"
        )
    return files, meta


def _numbered(folder: Path, part: str) -> dict[int, Path]:
    """The files PART/PART_<number>.* of a folder by their number, in its order."""
    found = {}
    for path in (folder / part).glob(f"*{PARTS[part]}"):
        if not path.name.startswith(".") and (number := re.search(r"(\d+)$", path.stem)):
            found[int(number[1])] = path
    return dict(sorted(found.items()))


def _rows(path: Path) -> np.ndarray:
    """A .npy file of (n, d) floats, memory-mapped."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as err:
        raise EmbeddingsError(f"{path}: not a whole .npy file ({err})") from err
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise EmbeddingsError(f"{path}: expected (n, d) floats, found {rows.dtype} {rows.shape}")
    return rows


def _stack(files: list[Path]) -> np.ndarray:
    """Rows of all files, (n, d) fp16 and unit norm; a single fp16 file stays memory-mapped."""
    # no file stays open: there may be more than a process may open; an empty shard has no columns
    # either
    counts = {path: len(rows) for path in files if len(rows := _rows(path))}
    if not counts:
        raise EmbeddingsError(f"{files[0].parent}: no rows")
    first, at = next(iter(counts)), 0
    if len(counts) == 1:
        return _unit(first)
    out = np.empty((sum(counts.values()), _rows(first).shape[1]), np.float16)
    for path, count in counts.items():
        rows = _unit(path)
        if rows.shape[1] != out.shape[1]:
            raise EmbeddingsError(
                f"{path}: {rows.shape[1]} columns, {first.name} has {out.shape[1]}"
            )
        out[at : at + count] = rows
        at += count
    return out


def _unit(path: Path) -> np.ndarray:
    """A file's rows, (n, d) fp16 and unit norm; memory-mapped where they are so already."""
    rows = _rows(path)
    norm = np.concatenate(
        [
            np.linalg.norm(rows[i : i + 65536].astype(np.float32), axis=1)
            for i in range(0, len(rows), 65536)
        ]
    )
    bad = np.flatnonzero(~np.isfinite(norm) | (norm < 1e-6))
    if bad.size:
        what = "is all zeros" if np.isfinite(norm[bad[0]]) else "is not finite"
        raise EmbeddingsError(f"{path}: row {bad[0]} {what} ({bad.size} such rows in this file)")
    if np.abs(norm - 1).max() > 0.01:
        rows = rows.astype(np.float32) / norm[:, None]
    return rows if rows.dtype == np.float16 else rows.astype(np.float16)


def _keys(
    folder: Path, files: dict[int, Path], n: int, tables: dict[int, Path]
) -> tuple[list[str], list[str] | None]:
    """Keys and captions of the files' n rows from the metadata, or row numbers where there is none."""
    if not tables:
        return [f"{i:09d}" for i in range(n)], None
    if missing := sorted(set(files) - set(tables)):
        raise EmbeddingsError(f"{folder}/metadata: no file for {files[missing[0]].name}")
    table = pd.concat([pd.read_parquet(tables[i]) for i in files], ignore_index=True)
    if len(table) != n:
        where = folder if len(files) > 1 else next(iter(files.values()))
        raise EmbeddingsError(f"{where}: {n} image rows but {len(table)} rows of metadata")
    column = next((c for c in ("key", "uid", "image_path") if c in table), None)
    keys = table[column].astype(str).tolist() if column else [f"{i:09d}" for i in range(n)]
    return keys, table["caption"].tolist() if "caption" in table else None
