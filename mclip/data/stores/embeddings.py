"""Read folders of embeddings: those that `mclip.embed` writes, and any of clip-retrieval's.

    FOLDER/img_emb/img_emb_0000.npy          (n, d) fp16, unit norm; one file for each input shard
    FOLDER/text_emb/text_emb_0000.npy        (n, d) fp16, unit norm; row i belongs to the image's
    FOLDER/metadata/metadata_0000.parquet    key, image_path (= key), caption
    FOLDER/meta.json                         which model and weights, which input shards

    FOLDER/UUID.npz, FOLDER/UUID.parquet     DataComp's metadata, in FOLDER or FOLDER/metadata: of
                                             several embeddings (b32_img, l14_img) the widest

clip-retrieval's folders may number their files with or without zero padding (files are read in
numerical order), may lack metadata and text, and may hold rows that are not unit-norm, which are
normalised. A sample is named by the first of the metadata columns `key`, `uid` and `image_path`
that exists (so by DataComp's uid where nothing else names it), or by the column that the caller
asks for; without metadata, by the row's number in nine digits. Files are memory-mapped, except for
compressed .npz and rows in another machine's number format, which are held in memory.

    embeddings = mclip.data.stores.embeddings.load("data/embeddings/large")
    embeddings.image        # (n, d) fp16

Web sets are too large for that: `index` has their keys and files and reads no row, `load_shard`
reads one shard. Kept separate from `mclip.embed`, so that readers of embeddings do not rerun when
the code that makes them changes.
"""

import json
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mclip.system.files import LFS_POINTER, is_lfs_pointer

NAMES = ("key", "uid", "image_path")  # metadata columns that name a sample, the first there is
CAPTIONS = ("caption", "text")  # metadata columns that have the caption, the first there is
PARTS = {"img_emb": ".npy", "text_emb": ".npy", "metadata": ".parquet"}


class EmbeddingsError(ValueError):
    """Embeddings or their keys are missing or broken; the message names the file, row or key."""


@dataclass(frozen=True)
class Embeddings:
    """A folder of embeddings in memory; row i of `image` and `text` belongs to `keys[i]`.

    Parameters
    ----------
    keys : list of str
        Names of the n samples.
    image : ndarray of float16, shape (n, d)
        Unit-norm rows.
    text : ndarray of float16, shape (n, d), or None
        Unit-norm rows, where the folder has them.
    logit_scale : float
        The teacher's own, exponentiated; 100 where the folder does not say.
    model : str
        The teacher's name, or "".
    captions : list of str, optional
        The n true captions.
    shard : ndarray of int64, shape (n,), optional
        Number of each row's file; of our own folders, of its shard of pairs.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from mclip.data.stores import embeddings
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "img_emb").mkdir()
    >>> np.save(folder / "img_emb" / "img_emb_0.npy", 2 * np.eye(3))
    >>> found = embeddings.load(folder)
    >>> found.keys, found.image[0].tolist()
    (['000000000', '000000001', '000000002'], [1.0, 0.0, 0.0])
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
    """Keys and files of a folder of embeddings, without its rows.

    Row i of the files in `image`, one after the other, belongs to `keys[i]`. What takes a list of
    files, such as `mclip.balance.balance`, reads them block by block.

    Parameters
    ----------
    keys : ndarray of str, shape (n,)
        Names of the samples.
    image : list of pathlib.Path
        The .npy files.
    shard : ndarray of int64, shape (n,)
        Number of the file that each row comes from.
    has_metadata : bool, default True
        False where the keys are row numbers.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from mclip.data.stores import embeddings
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "img_emb").mkdir()
    >>> np.save(folder / "img_emb" / "img_emb_0.npy", np.eye(2))
    >>> embeddings.index(folder).has_metadata
    False
    """

    keys: np.ndarray
    image: list[Path]
    shard: np.ndarray
    has_metadata: bool = True


def load(folder: str | Path, limit: int | None = None) -> Embeddings:
    """Read a folder of embeddings, ours or clip-retrieval's.

    Parameters
    ----------
    folder : path
        With img_emb/ and, optionally, text_emb/, metadata/ and meta.json.
    limit : int, optional
        Read about so many rows at most: whole files that are spread over the folder.

    Returns
    -------
    Embeddings
        Keys and unit-norm rows.

    Raises
    ------
    EmbeddingsError
        In one line: no image files, a file that is not whole, a row without direction, text or
        metadata that do not fit.

    See Also
    --------
    index : Keys and files only, for sets larger than memory.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from mclip.data.stores import embeddings
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "img_emb").mkdir()
    >>> np.save(folder / "img_emb" / "img_emb_0.npy", np.eye(3))
    >>> embeddings.load(folder).image.shape
    (3, 3)
    """
    folder = Path(folder)
    files, meta = _image_files(folder)
    rows = [len(open_rows(path)) for path in files.values()]
    if limit is not None and sum(rows) > limit:
        few = max(1, int(limit / (sum(rows) / len(rows))))
        places = np.unique(np.linspace(0, len(rows) - 1, few).round().astype(int))
        files, rows = (
            dict(np.array(list(files.items()), object)[places].tolist()),
            [rows[i] for i in places],
        )
    image = _stack(list(files.values()))
    texts = _part(folder, "text_emb")
    if texts:
        texts = {n: _text_file(folder, texts.get(n), files[n]) for n in files}
    text = _stack(list(texts.values())) if texts else None
    keys, captions = _metadata(folder, files, rows)
    return Embeddings(
        keys.tolist(),
        image,
        text,
        float(meta.get("logit_scale", 100.0)),
        meta.get("model", ""),
        captions,
        np.repeat(list(files), rows),
    )


def index(folder: str | Path, key: str | None = None) -> Index:
    """List keys and image files of a folder, ours or clip-retrieval's; no row is read.

    Parameters
    ----------
    folder : path
        With img_emb/ and, unless row numbers name the samples, metadata/.
    key : str, optional
        Metadata column that names a sample; by default the first of key, uid and image_path that
        there is.

    Returns
    -------
    Index
        What `mclip.balance.balance` and `mclip.cluster.cluster` take: `image` and `keys`.

    Raises
    ------
    EmbeddingsError
        In one line: no image files, a file that is not whole, no metadata for an image file or not
        as many rows, no such column, a row without a key.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from mclip.data.stores import embeddings
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "img_emb").mkdir()
    >>> np.save(folder / "img_emb" / "img_emb_0.npy", np.eye(3))
    >>> len(embeddings.index(folder).keys)
    3
    """
    folder = Path(folder)
    files, _ = _image_files(folder)
    rows = [len(open_rows(path)) for path in files.values()]
    keys, _ = _metadata(folder, files, rows, key)
    return Index(
        keys,
        list(files.values()),
        np.repeat(list(files), rows),
        has_metadata=bool(_part(folder, "metadata")),
    )


def load_shard(folder: str | Path, number: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Open one shard that `mclip.embed` wrote; its rows stay in their files.

    Parameters
    ----------
    folder : path
        Of one teacher's embeddings.
    number : int
        Of the shard of pairs.

    Returns
    -------
    keys : list of str
        Names of the n samples.
    image, text : ndarray of float16, shape (n, d)
        Unit-norm rows, memory-mapped.

    Raises
    ------
    EmbeddingsError
        If one of the shard's files is missing or not whole.

    Examples
    --------
    >>> from mclip.data.stores import embeddings
    >>> embeddings.load_shard("data/none", 0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    mclip.data.stores.embeddings.EmbeddingsError: data/none/img_emb/img_emb_0000.npy is missing: ...
    """
    files = {part: part_file(Path(folder), part, number) for part in PARTS}
    for path in files.values():
        if not path.is_file():
            raise EmbeddingsError(f"{path} is missing: run `dvc repro embed` first")
    image, text = (open_rows(files[part]) for part in ("img_emb", "text_emb"))
    keys, _ = _read_table(files["metadata"], files["img_emb"], len(image), None)
    return keys.tolist(), image, text


def part_file(folder: Path, part: str, number: int) -> Path:
    """Name the file in which `mclip.embed` writes a part of a shard.

    Parameters
    ----------
    folder : pathlib.Path
        Of one teacher's embeddings.
    part : {"img_emb", "text_emb", "metadata"}
        Which part.
    number : int
        Of the shard of pairs.

    Returns
    -------
    pathlib.Path
        It need not exist.

    Examples
    --------
    >>> from pathlib import Path
    >>> from mclip.data.stores.embeddings import part_file
    >>> part_file(Path("large"), "metadata", 3).as_posix()
    'large/metadata/metadata_0003.parquet'
    """
    return folder / part / f"{part}_{number:04d}{PARTS[part]}"


def read_meta(folder: Path) -> dict:
    """Read a folder's meta.json.

    Parameters
    ----------
    folder : pathlib.Path
        Of one teacher's embeddings.

    Returns
    -------
    dict
        Which model, weights and shards; {} without the file.

    Raises
    ------
    EmbeddingsError
        If the file is not JSON.

    Examples
    --------
    >>> from pathlib import Path
    >>> from mclip.data.stores.embeddings import read_meta
    >>> read_meta(Path("no/such/folder"))
    {}
    """
    path = folder / "meta.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as err:
        raise EmbeddingsError(f"{path}: not valid JSON ({err})") from err


def _image_files(folder: Path) -> tuple[dict[int, Path], dict]:
    """The image files of a folder that is whole, by their number, and its meta.json."""
    files = _part(folder, "img_emb")
    if not files:
        ours = folder.parts[-3:-1] == ("data", "embeddings")
        layout = (
            " (clip-retrieval's layout is expected: img_emb/img_emb_0.npy, ..., "
            "or DataComp's: UUID.npz, UUID.parquet)"
        )
        todo = ": run `dvc repro embed` first" if ours else layout
        raise EmbeddingsError(f"{folder}/img_emb is missing{todo}")
    meta = read_meta(folder)
    if meta and len(meta["shards"]) > len(files):
        raise EmbeddingsError(
            f"{folder}: {len(files)} of {len(meta['shards'])} shards embedded: "
            "run `dvc repro embed` to the end"
        )
    return files, meta


def _part(folder: Path, part: str) -> dict[int, Path]:
    """A part's files by their number, in its order: clip-retrieval's, else DataComp's, numbered in
    the order of their names.
    """
    if (folder / "img_emb").is_dir():
        return _numbered(folder, part)
    files = sorted(folder.glob("*.npz")) or sorted((folder / "metadata").glob("*.npz"))
    if not files:
        return {}
    if part == "metadata":
        tables = {i: path.with_suffix(".parquet") for i, path in enumerate(files)}
        return {i: path for i, path in tables.items() if path.exists()}
    image, text = _arrays(files[0])
    array = image if part == "img_emb" else text
    return {i: path / array for i, path in enumerate(files)} if array else {}


def _arrays(path: Path) -> tuple[str, str | None]:
    """The names of the image and text rows of DataComp's .npz: of several the widest."""
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.removesuffix(".npy") for name in file.namelist()]
    except (zipfile.BadZipFile, OSError) as err:
        raise EmbeddingsError(f"{path}: not a whole .npz file ({_why(path, err)})") from None
    images = [name for name in names if name.endswith("_img")]
    if not images:
        raise EmbeddingsError(f"{path}: no array of images, *_img (there are {', '.join(names)})")
    image = max(images, key=lambda name: open_rows(path / name).shape[1])
    text = f"{image.removesuffix('_img')}_txt"
    return image, text if text in names else None


def _numbered(folder: Path, part: str) -> dict[int, Path]:
    """The files PART/PART_<number>.* of a folder by their number, in its order."""
    found: dict[int, Path] = {}
    for path in sorted((folder / part).glob(f"*{PARTS[part]}")):
        if path.name.startswith("."):
            continue
        match = re.search(r"(\d+)$", path.stem)
        if not match:
            raise EmbeddingsError(f"{path}: its name has no number at its end, as {part}_0 has")
        number = int(match[1])
        if number in found:
            raise EmbeddingsError(f"{path}: {found[number].name} has the same number")
        found[number] = path
    return dict(sorted(found.items()))


def open_rows(path: str | Path) -> np.ndarray:
    """Open a .npy file of rows, memory-mapped.

    Parameters
    ----------
    path : path
        Of the file, or FILE.npz/ARRAY for an array of one.

    Returns
    -------
    ndarray of float, shape (n, d)
        In this machine's number format. Nothing is read yet, unless the array is compressed, of
        another byte order or of long doubles.

    Raises
    ------
    EmbeddingsError
        If the file is missing, cut short, pickled, or holds something else.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from mclip.data.stores.embeddings import open_rows
    >>> np.save(path := tempfile.mkdtemp() + "/rows.npy", np.eye(3))
    >>> open_rows(path).shape
    (3, 3)
    """
    path = Path(path)
    inside = path.parent.suffix == ".npz"
    try:
        if inside:
            rows = _open_in_npz(path.parent, path.name)
        else:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise EmbeddingsError(f"{path}: no such file") from None
    except KeyError:
        raise EmbeddingsError(f"{path.parent}: no array {path.name}") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as err:
        why = _why(path.parent if inside else path, err)
        raise EmbeddingsError(f"{path}: not a whole .npy file of numbers ({why})") from None
    return native(check_rows(rows, path))


def native(rows: np.ndarray) -> np.ndarray:
    """Give floats this machine's byte order and at most 64 bits, as torch needs them.

    Parameters
    ----------
    rows : ndarray of float
        Of any shape.

    Returns
    -------
    ndarray of float
        `rows` itself where it is so already, else a copy in memory.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.data.stores.embeddings import native
    >>> native(np.ones((2, 3), ">f4")).dtype, native(np.ones((2, 3), np.longdouble)).dtype
    (dtype('float32'), dtype('float64'))
    """
    dtype = rows.dtype.newbyteorder("=")
    return rows.astype(np.float64 if dtype.itemsize > 8 else dtype, copy=False)


def _open_in_npz(path: Path, array: str) -> np.ndarray:
    """An array of a .npz file, memory-mapped unless it is compressed."""
    with zipfile.ZipFile(path) as file:
        entry = file.getinfo(f"{array}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        return np.load(path, allow_pickle=False)[array]
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)  # the lengths of two fields before the data
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
        major, _ = np.lib.format.read_magic(file)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read[major](file)
        if dtype.hasobject:
            raise ValueError("it holds objects")
        return np.memmap(path, dtype, "r", file.tell(), shape, order="F" if by_columns else "C")


def _why(path: Path, err: Exception) -> str:
    """What is wrong with a file that can't be read."""
    with open(path, "rb") as file:
        return LFS_POINTER if is_lfs_pointer(file.read(64)) else str(err)


def check_rows(rows: np.ndarray, name: str | Path) -> np.ndarray:
    """Check that an array holds rows of floats.

    Parameters
    ----------
    rows : ndarray
        An empty file of a shard without samples may have no columns.
    name : str or pathlib.Path
        Of the array, for the message.

    Returns
    -------
    ndarray of float, shape (n, d)
        `rows` itself.

    Raises
    ------
    EmbeddingsError
        If it holds anything else.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.data.stores.embeddings import check_rows
    >>> check_rows(np.arange(3), "rows.npy")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    mclip.data.stores.embeddings.EmbeddingsError: rows.npy: expected floats of shape (n, d), ...
    """
    if rows.ndim != 2 or rows.dtype.kind != "f" or (len(rows) and not rows.shape[1]):
        raise EmbeddingsError(
            f"{name}: expected floats of shape (n, d), found {rows.dtype} {rows.shape}"
        )
    return rows


def _stack(files: list[Path]) -> np.ndarray:
    """Rows of all files, (n, d) fp16 and unit norm; a single fp16 file stays memory-mapped."""
    # no file stays open: there may be more than a process may open; an empty shard has no columns
    # either
    counts = {path: len(rows) for path in files if len(rows := open_rows(path))}
    if not counts:
        raise EmbeddingsError(f"{files[0].parent}: no rows")
    first, at = next(iter(counts)), 0
    if len(counts) == 1:
        return _unit(first)
    out = np.empty((sum(counts.values()), open_rows(first).shape[1]), np.float16)
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
    rows = open_rows(path)
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


def _text_file(folder: Path, text: Path | None, image: Path) -> Path:
    """The text rows that belong to an image file."""
    count = 0 if text is None else len(open_rows(text))
    if text is None or count != (wanted := len(open_rows(image))):
        found = f"{text}: {count} text rows" if text else f"{folder}/text_emb: no text rows"
        of = f", {image.name} has {wanted}" if text else f" for {image.name}"
        raise EmbeddingsError(found + of)
    return text


def _metadata(
    folder: Path, files: dict[int, Path], rows: list[int], key: str | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """Keys, and captions where there are any, of image files with so many rows each."""
    tables = _part(folder, "metadata")
    if not tables:
        return np.array([f"{i:09d}" for i in range(sum(rows))], str), None
    if missing := sorted(set(files) - set(tables)):
        raise EmbeddingsError(
            f"{folder}/metadata: there is no parquet file for {files[missing[0]].name}"
        )
    found = []
    for (number, image), count in zip(files.items(), rows, strict=True):
        found.append(_read_table(tables[number], image, count, key))
    keys = np.concatenate([keys for keys, _ in found])
    if any(captions is None for _, captions in found):
        return keys, None
    return keys, [caption for _, captions in found for caption in captions or ()]


def _read_table(
    path: Path, image: Path, rows: int, key: str | None
) -> tuple[np.ndarray, list[str] | None]:
    """Keys and captions of one metadata file, which has as many rows as its image file."""
    try:
        columns = pq.read_schema(path).names
        column = key or next((name for name in NAMES if name in columns), None)
        if column not in columns:
            raise EmbeddingsError(
                f"{path}: no column {key or ', '.join(NAMES)} to name samples "
                f"(there are {', '.join(columns)})"
            )
        caption = next((name for name in CAPTIONS if name in columns and name != column), None)
        wanted = [column, *([caption] if caption else [])]
        table = pq.read_table(path, columns=wanted)
    except (pa.ArrowException, OSError) as err:
        raise EmbeddingsError(f"{path}: not a whole parquet file ({_why(path, err)})") from None
    if len(table) != rows:
        raise EmbeddingsError(f"{path} has {len(table)} rows, {image.name} has {rows}")
    if table[column].null_count:
        row = table[column].is_null().to_pylist().index(True)
        raise EmbeddingsError(f"{path}: row {row} has no {column}")
    captions = table[caption].to_pylist() if caption else None
    return table[column].to_numpy().astype(str), captions
