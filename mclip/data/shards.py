"""Write and read image-text pairs as webdataset tars.

A shard is a tar of `KEY.{jpg,jpeg,png,webp}` + `KEY.txt` + `KEY.json`, as img2dataset writes it and
open_clip's trainer reads it. A folder of shards is complete when it has its manifest.json, written
last::

    {"shards": [{"file", "samples", "sha256"}, ...], "samples": n,
     "skipped": [{"file", "key", "reason"}, ...]}

`file` is relative to the folder, absolute or a URL; `samples` counts what is kept. For shards from
elsewhere `mclip.data.check` makes the manifest and lists there what to skip; `iter_samples` skips
exactly that. Their manifest has two further keys: `captions`, where it is not `txt`, says which
file has a sample's caption, and `exif_turned`, where it is not 0, counts pictures that their EXIF
data want turned. Nobody turns them, as open_clip does not.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mclip.data import tars
from mclip.system.files import whole_folder, write_json

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MANIFEST = "manifest.json"
CAPTIONS = "txt"  # the file that has a sample's caption; "json.KEY": that key of its .json
# where others keep them: said where a caption is missing
OTHER_CAPTIONS = ("txt", "cap", "caption", "text", "alt")
JSON_CAPTIONS = ("caption", "text", "TEXT", "alt_text", "alt", "title")
FIRST_DOT = "a key ends at the first dot of the file's name: rename what has dots in it"


class ShardError(ValueError):
    """A folder of shards is missing, not whole or not what its manifest says; the message names the
    file.
    """


class Sample(NamedTuple):
    """One pair: `image` holds the encoded file of extension `ext`, `meta` what the .json has."""

    key: str
    image: bytes
    ext: str
    caption: str
    meta: dict[str, Any]


# --- writing --------------------------------------------------------------------------------------


def write_shards(
    samples: Iterable[Sample],
    folder: str | Path,
    *,
    shard_size: int,
    prefix: str = "pairs",
    skipped: Iterable[dict[str, Any]] = (),
    info: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write samples to `folder`/`prefix`-000000.tar ... and a manifest, all of it or nothing.

    Parameters
    ----------
    samples : in the order to be kept; keys must differ
    shard_size : samples a shard
    skipped : what the caller left out, for the manifest's list: {"file", "key", "reason"}
    info : further keys of the manifest

    Returns
    -------
    the manifest
    """
    shards: list[dict[str, Any]] = []
    batch: list[dict[str, Any]] = []
    seen = set()

    def flush() -> None:
        name = f"{prefix}-{len(shards):06d}.tar"
        count, digest = tars.write_tar(scratch / name, batch)
        shards.append({"file": name, "samples": count, "sha256": digest})
        batch.clear()

    with whole_folder(folder) as scratch:
        for sample in samples:
            if sample.key in seen or "." in sample.key.rpartition("/")[2]:
                raise ShardError(
                    f"{folder}: key {sample.key!r} {'twice' if sample.key in seen else 'has a dot'}"
                )
            seen.add(sample.key)
            batch.append(
                {
                    "__key__": sample.key,
                    sample.ext: sample.image,
                    "txt": sample.caption.encode(),
                    "json": _json(sample.meta),
                }
            )
            if len(batch) == shard_size:
                flush()
        if batch:
            flush()
        manifest = manifest_of(shards, list(skipped), info)
        write_json(scratch / MANIFEST, manifest)
    return manifest


# --- reading --------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a whole folder of shards."""
    path = Path(folder) / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: run `dvc repro data` first") from None
    except ValueError as err:
        raise ShardError(f"{path}: not JSON ({err}): run `dvc repro -f data`") from None


def iter_samples(folder: str | Path, *, shards: list[int] | None = None) -> Iterator[Sample]:
    """Yield the samples of a checked folder in the manifest's order, without those it skips.

    shards: indices into the manifest's shards; None: all. Nothing is decoded.
    """
    try:
        state = (Path(folder) / MANIFEST).stat()
    except OSError:
        state = None  # which read_manifest says
    entries, skip, captions = _entries(
        Path(folder), state and (state.st_size, state.st_mtime_ns, state.st_ino)
    )
    for number in range(len(entries)) if shards is None else shards:
        shard = entries[number]
        out, count = skip.get(shard["file"], set()), 0
        source = (
            shard["file"]
            if tars.is_url(shard["file"])
            else os.path.normpath(Path(folder) / shard["file"])
        )
        try:
            with tars.open_source(source) as file:
                for index, (key, files, _) in enumerate(tars.groups(file)):
                    if key is None or index in out:
                        continue
                    sample = as_sample(key, files, captions)
                    if isinstance(sample, str):
                        raise ShardError(
                            f"{source}: {key}: {sample}; not so when it was checked: run "
                            "`dvc repro -f data`"
                        )
                    count += 1
                    yield sample
        except OSError as err:
            raise ShardError(f"{source}: {err.strerror or err}: run `dvc repro -f data`") from None
        if count != shard["samples"]:
            raise ShardError(
                f"{source}: {count} samples, {shard['samples']} when it was checked: run "
                "`dvc repro -f data`"
            )


@lru_cache(maxsize=4)
def _entries(folder: Path, state: Any) -> tuple[list[dict], dict[str, set[int]], str]:
    """The manifest's shards, the indices that each file skips, and which file has the captions:
    read once, not for each shard of thousands.
    """
    manifest = read_manifest(folder)
    skip: dict[str, set[int]] = {}
    for entry in manifest["skipped"]:
        if "index" in entry:
            skip.setdefault(entry["file"], set()).add(entry["index"])
    return manifest["shards"], skip, manifest.get("captions", CAPTIONS)


def in_part(key: str, fraction: float) -> bool:
    """Is a pair in that fraction of all? By a hash of its key: a shard need not know the others.

    A smaller part lies in a larger one.
    """
    if fraction >= 1:
        return True
    return int.from_bytes(hashlib.sha1(key.encode()).digest()[:8], "big") < fraction * 2**64


def as_sample(key: str, files: dict[str, bytes], captions: str = CAPTIONS) -> Sample | str:
    """A tar's files of one key as a Sample, or the reason why they are none. The image is not
    decoded.

    captions : the extension that has the caption, or `json.KEY` for a key of the .json.
    """
    ext = next((e for e in IMAGE_EXTENSIONS if e in files), None)
    if ext is None:
        odd = sorted(set(files) - {"txt", "json", captions})
        if odd:
            why = FIRST_DOT if "." in odd[0] else f"an image is {', '.join(IMAGE_EXTENSIONS)}"
            return f"odd extension .{odd[0]}: {why}"
        return "missing image"
    try:
        meta = json.loads(files.get("json", b"{}"))
    except ValueError:
        meta = None
    if not isinstance(meta, dict):
        return "metadata is not a JSON object"
    file, _, field = captions.partition(".")
    try:
        text = meta.get(field) if field else files[file].decode("utf-8")
    except KeyError:
        text = None
    except UnicodeDecodeError:
        return "caption is not UTF-8"
    if text is None:
        return "missing caption" + _elsewhere(files, meta, captions)
    if not isinstance(text, str):
        return f"caption is no text: {captions} is a {type(text).__name__}"
    caption = text.strip()
    return Sample(key, files[ext], ext, caption, meta) if caption else "empty caption"


def _elsewhere(files: dict[str, bytes], meta: dict[str, Any], captions: str) -> str:
    """Where a sample without a caption seems to have one, and how to say so."""
    others = [e for e in OTHER_CAPTIONS if e in files]
    others += [f"json.{k}" for k in JSON_CAPTIONS if isinstance(meta.get(k), str)]
    others = [other for other in others if other != captions]
    if not others:
        return ""
    return f": no .{captions}, but there is {others[0]} (--captions, data.captions)"


class Pictures:
    """Decoded, transformed images of a list of samples: a map-style dataset for a DataLoader."""

    def __init__(self, samples: list[Sample], transform: Callable[[Image.Image], Any]):
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        return self.transform(decode(self.samples[i]))


def decode(sample: Sample | bytes) -> Image.Image:
    """The image as RGB; transparent pixels come out on white, 16 bits as their upper 8.

    Float pixels are 0 to 1; with others, and with integers of 32 bits, which value is white is not
    known: ValueError. EXIF's orientation is not applied, as open_clip does not.
    """
    image: Image.Image = Image.open(
        io.BytesIO(sample.image if isinstance(sample, Sample) else sample)
    )
    if image.mode.startswith(("I", "F")):  # whose conversion would clip at 255: to white
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of wider pixels as one of 8 bits; ValueError where it is not known which value
    is white.
    """
    pixels = np.asarray(image)
    if image.mode.startswith("I;16") or image.format == "PNG":
        return Image.fromarray((pixels >> 8).astype(np.uint8))
    low, high = float(pixels.min()), float(pixels.max())
    if image.mode != "F" or not 0 <= low <= high <= 1:
        raise ValueError(
            f"32-bit pixels from {low:g} to {high:g}: write 8 or 16 bits, or floats from 0 to 1"
        )
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def manifest_of(
    shards: list[dict], skipped: list[dict], info: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What manifest.json holds."""
    return {
        "shards": shards,
        "samples": sum(s["samples"] for s in shards),
        "skipped": skipped,
        **(info or {}),
    }


def _json(meta: dict[str, Any]) -> bytes:
    return json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
