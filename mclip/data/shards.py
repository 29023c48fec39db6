"""Image-text pairs as webdataset tars: write, check, read.

A shard is a tar of `KEY.{jpg,jpeg,png,webp}` + `KEY.txt` + `KEY.json`, as img2dataset writes it and
open_clip's trainer reads it. A folder of shards is whole when it has its manifest.json, written last::

    {"shards": [{"file", "samples", "sha256"}, ...], "samples": n,
     "skipped": [{"file", "key", "reason"}, ...]}

`file` is relative to the folder, absolute or a URL; `samples` counts what is kept. `check_shards` reads each
shard of somebody else's set once, decodes every image and lists what it skips; `iter_samples` then skips
exactly that.
"""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from glob import glob, has_magic
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mclip.data import tars
from mclip.files import whole_folder, write_json
from mclip.progress import bar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MANIFEST = "manifest.json"


class ShardError(ValueError):
    """A folder of shards is missing, not whole or not what its manifest says; the message names the file."""


class Sample(NamedTuple):
    """One pair: `image` holds the encoded file of extension `ext`, `meta` what the .json has."""

    key: str
    image: bytes
    ext: str
    caption: str
    meta: dict[str, Any]


# ---------------------------------------------------------------------------------------------- writing


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
    shards, seen, batch = [], set(), []

    def flush() -> None:
        name = f"{prefix}-{len(shards):06d}.tar"
        count, digest = tars.write_tar(scratch / name, batch)
        shards.append({"file": name, "samples": count, "sha256": digest})
        batch.clear()

    with whole_folder(folder) as scratch:
        for sample in samples:
            if sample.key in seen or "." in sample.key.rpartition("/")[2]:
                raise ShardError(f"{folder}: key {sample.key!r} {'twice' if sample.key in seen else 'has a dot'}")
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
        manifest = _manifest(shards, list(skipped), info)
        write_json(scratch / MANIFEST, manifest)
    return manifest


# --------------------------------------------------------------------------------------------- checking


def expand(patterns: Iterable[str]) -> list[str]:
    """Shards that patterns name, in order, each once: `{000..099}` and globs expand, URLs stay as they are.

    A glob that matches nothing stays too, so that it is reported as missing instead of silently dropped.
    """
    from webdataset.shardlists import expand_urls

    found: list[str] = []
    for pattern in patterns:
        for url in expand_urls(pattern):
            matches = sorted(glob(url, recursive=True)) if has_magic(url) and not tars.is_url(url) else []
            found.extend(matches or [url])
    return list(dict.fromkeys(found))


def check_shards(sources: Iterable[str], folder: str | Path, *, workers: int | None = None) -> dict[str, Any]:
    """Read every shard once, decode every image, and write `folder`/manifest.json of what is good.

    Skipped, each named with its reason: a corrupt image, an empty or missing caption, a missing image, an
    extension nobody reads, a duplicate key (the first good one is kept), what a truncated tar cuts off (what
    comes before is kept), a missing shard. Nothing is copied: the manifest points at the sources.

    Parameters
    ----------
    sources : as `expand` takes them
    folder : where the manifest goes; not a folder that holds the sources
    workers : processes; None: one a core

    Returns
    -------
    the manifest
    """
    sources, folder = expand(sources), Path(folder)
    inside = [s for s in sources if not tars.is_url(s) and folder.resolve() in Path(s).resolve().parents]
    if inside:
        raise ShardError(f"data.shards: {inside[0]} lies in {folder}, which this stage writes: move it elsewhere")
    if not sources:
        raise ShardError("data.shards: no shard named")
    workers = min(workers or os.cpu_count() or 1, len(sources))
    shards, skipped, seen = [], [], set()
    # spawned, not forked: notebooks and torch have threads
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = pool.map(_check_shard, sources) if workers > 1 else map(_check_shard, sources)
        for source, found in zip(
            sources, bar(results, desc="check shards", unit="shard", total=len(sources)), strict=True
        ):
            file = source if tars.is_url(source) or Path(source).is_absolute() else os.path.relpath(source, folder)
            bad = [{"file": file, **entry} for entry in found.skipped]
            kept = 0
            for index, key in found.good:
                if key in seen:
                    bad.append({"file": file, "index": index, "key": key, "reason": "duplicate key"})
                else:
                    seen.add(key)
                    kept += 1
            if found.sha256 is not None:
                shards.append({"file": file, "samples": kept, "sha256": found.sha256})
            skipped += sorted(bad, key=lambda entry: entry.get("index", 1 << 62))
    if not seen:
        first = f"; {skipped[0]['file']}: {skipped[0]['reason']}" if skipped else ""
        raise ShardError(f"data.shards: no good pair in {len(sources)} shards{first}")
    manifest = _manifest(shards, skipped)
    with whole_folder(folder) as scratch:
        write_json(scratch / MANIFEST, manifest)
    return manifest


class _Found(NamedTuple):
    sha256: str | None  # None: the shard could not be opened
    good: list[tuple[int, str]]  # (index in the shard, key)
    skipped: list[dict[str, Any]]


def _check_shard(source: str) -> _Found:
    good, skipped = [], []
    try:
        with tars.open_source(source) as file:
            stream = tars.Recorder(file)
            for index, (key, files, damage) in enumerate(tars.groups(stream)):
                if key is None:
                    skipped.append({"key": None, "reason": damage})
                # a cut between files that nobody needs leaves the last sample whole
                elif reason := (isinstance(_sample(key, files), str) and damage) or _problem(key, files):
                    skipped.append({"index": index, "key": key, "reason": reason})
                else:
                    good.append((index, key))
            stream.drain()
            if not stream.length and tars.is_url(source):
                raise OSError("nothing came from it")
            return _Found(stream.sha256.hexdigest(), good, skipped)
    except OSError as err:
        return _Found(None, [], [{"key": None, "reason": f"missing shard: {err.strerror or tars.short(err)}"}])


def _problem(key: str, files: dict[str, bytes]) -> str | None:
    """Why a sample can't be used, or None."""
    sample = _sample(key, files)
    if isinstance(sample, str):
        return sample
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            image.draft("RGB", (32, 32))  # JPEG: every byte is still parsed, eight times fewer pixels are made
            image.load()
    except Exception as err:  # Pillow's decoders raise nearly anything on damaged bytes
        return f"corrupt image: {tars.short(err)}"
    return None


def _sample(key: str, files: dict[str, bytes]) -> Sample | str:
    """A tar's files of one key as a Sample, or the reason why they are none. The image is not decoded."""
    ext = next((e for e in IMAGE_EXTENSIONS if e in files), None)
    if ext is None:
        odd = sorted(set(files) - {"txt", "json"})
        if odd:
            return f"odd extension .{odd[0]}: an image is {', '.join(IMAGE_EXTENSIONS)}"
        return "missing image"
    if "txt" not in files:
        return "missing caption"
    try:
        caption = files["txt"].decode("utf-8").strip()
    except UnicodeDecodeError:
        return "caption is not UTF-8"
    if not caption:
        return "empty caption"
    try:
        meta = json.loads(files.get("json", b"{}"))
    except ValueError:
        meta = None
    if not isinstance(meta, dict):
        return "metadata is not a JSON object"
    return Sample(key, files[ext], ext, caption, meta)


# ---------------------------------------------------------------------------------------------- reading


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
    """The samples of a checked folder in the manifest's order, less exactly what it lists as skipped.

    shards: indices into the manifest's shards; None: all. Nothing is decoded.
    """
    manifest = read_manifest(folder)
    skip: dict[str, set[int]] = {}
    for entry in manifest["skipped"]:
        if "index" in entry:
            skip.setdefault(entry["file"], set()).add(entry["index"])
    for number in range(len(manifest["shards"])) if shards is None else shards:
        shard = manifest["shards"][number]
        out, count = skip.get(shard["file"], set()), 0
        source = shard["file"] if tars.is_url(shard["file"]) else os.path.normpath(Path(folder) / shard["file"])
        try:
            with tars.open_source(source) as file:
                for index, (key, files, _) in enumerate(tars.groups(file)):
                    if key is None or index in out:
                        continue
                    sample = _sample(key, files)
                    if isinstance(sample, str):
                        raise ShardError(
                            f"{source}: {key}: {sample}; not so when it was checked: run `dvc repro -f data`"
                        )
                    count += 1
                    yield sample
        except OSError as err:
            raise ShardError(f"{source}: {err.strerror or err}: run `dvc repro -f data`") from None
        if count != shard["samples"]:
            raise ShardError(
                f"{source}: {count} samples, {shard['samples']} when it was checked: run `dvc repro -f data`"
            )


class Pictures:
    """Decoded, transformed images of a list of samples: a map-style dataset for torch's DataLoader."""

    def __init__(self, samples: list[Sample], transform: Callable[[Image.Image], Any]):
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        return self.transform(decode(self.samples[i]))


def decode(sample: Sample | bytes) -> Image.Image:
    """The image as RGB; transparent pixels come out on white."""
    image = Image.open(io.BytesIO(sample.image if isinstance(sample, Sample) else sample))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _manifest(shards: list[dict], skipped: list[dict], info: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "shards": shards,
        "samples": sum(s["samples"] for s in shards),
        "skipped": skipped,
        **(info or {}),
    }


def _json(meta: dict[str, Any]) -> bytes:
    return json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
