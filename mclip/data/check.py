"""Check shards from elsewhere: read once, decode every image, list what can't be used by name.

    shards = ["/data/cc3m/{00000..00331}.tar"]
    manifest = check_shards(shards, "data/pairs", state="data/cache/checked")

Shards are independent, so they are distributed over as many processes as there are cores, or over a
Ray cluster (mclip.system.workers). The result for each stays in the `state` folder until all are
done, so that a killed check continues.
"""

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from mclip.data import tars
from mclip.data.shards import (
    CAPTIONS,
    MANIFEST,
    Sample,
    ShardError,
    as_sample,
    decode,
    manifest_of,
)
from mclip.system.files import digest, plain_path, whole_folder, write_json, write_whole
from mclip.system.progress import bar
from mclip.system.workers import run_tasks

APART = (
    "files lie apart in the tar: a sample's must follow one another, as `tar --sort=name` writes "
    "them"
)
ORIENTATION = ExifTags.Base.Orientation


def expand(patterns: Iterable[str]) -> list[str]:
    """Shards that patterns name, in order, each once: `{000..099}`, globs and `~` expand, a folder
    stands for the tars in it, `file:` is dropped, other URLs stay as they are.

    A glob that matches nothing and a folder without tars stay too, so that they are reported
    instead of silently dropped.
    """
    from webdataset.shardlists import expand_urls

    found: list[str] = []
    for pattern in patterns:
        for url in map(plain_path, expand_urls(pattern)):
            matches = []
            if has_magic(url) and not tars.is_url(url):
                matches = sorted(glob(url, recursive=True))
            for match in matches or [url]:
                inside = Path(match).iterdir() if os.path.isdir(match) else ()
                found.extend(
                    sorted(str(p) for p in inside if p.name.endswith(tars.TARS)) or [match]
                )
    return list(dict.fromkeys(found))


def check_shards(
    sources: Iterable[str],
    folder: str | Path,
    *,
    captions: str = CAPTIONS,
    leave_out: str | Path | None = None,
    state: str | Path | None = None,
    workers: int | None = None,
    backend: str = "processes",
) -> dict[str, Any]:
    """Read every shard once, decode every image, and write `folder`/manifest.json of what is good.

    Nothing is copied: the manifest points at the sources.

    Parameters
    ----------
    sources : as `expand` takes them
    folder : where the manifest goes; not a folder that holds the sources
    leave_out : a table of pairs that are to be skipped, see `read_leave_out`
    captions, state, workers, backend : see `read_shards`

    Returns
    -------
    the manifest
    """
    reasons = read_leave_out(leave_out) if leave_out else {}
    sources, folder = expand(sources), Path(folder)
    inside = [
        s for s in sources if not tars.is_url(s) and folder.resolve() in Path(s).resolve().parents
    ]
    if inside:
        raise ShardError(
            f"data.shards: {inside[0]} lies in {folder}, which this stage writes: move it elsewhere"
        )
    if not sources:
        raise ShardError("data.shards: no shard named")
    shards, skipped, info = read_shards(
        sources,
        folder,
        captions=captions,
        leave_out=reasons,
        state=state,
        workers=workers,
        backend=backend,
    )
    if not any(shard["samples"] for shard in shards):
        first = f"; {skipped[0]['file']}: {skipped[0]['reason']}" if skipped else ""
        raise ShardError(f"data.shards: no good pair in {len(sources)} shards{first}")
    manifest = manifest_of(shards, skipped, info)
    with whole_folder(folder) as scratch:
        write_json(scratch / MANIFEST, manifest)
    if state is not None:
        shutil.rmtree(state)
    return manifest


def read_shards(
    sources: Iterable[str],
    relative_to: str | Path = ".",
    *,
    captions: str = CAPTIONS,
    leave_out: Mapping[str, str] | None = None,
    state: str | Path | None = None,
    workers: int | None = None,
    backend: str = "processes",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Read every shard once and decode every image; nothing is written beside `state`.

    Skipped, each named with its reason: a corrupt image, an empty or missing caption, a missing
    image, an extension nobody reads, a duplicate key (the first good one is kept), samples whose
    files lie apart in the tar, what a truncated tar cuts off (what comes before is kept), a shard
    that is missing or can't be opened.

    Parameters
    ----------
    sources : shards, as `expand` returns them
    relative_to : the folder that relative paths in the result start from
    captions : extension of the file that has a sample's caption, or `json.KEY` for a key of the
        .json
    leave_out : keys of good pairs that are skipped all the same, and why
    state : folder for the results so far, which the caller deletes; a file that has changed
        meanwhile is read again. None: a temporary one
    workers : processes; None: one a core
    backend : of several workers, see mclip.system.workers

    Returns
    -------
    shards, skipped : as the manifest lists them, see mclip.data.shards
    info : further keys of the manifest
    """
    sources = list(sources)
    with tempfile.TemporaryDirectory() if state is None else nullcontext(state) as place:
        results = {
            source: Path(place) / f"{digest([source, _stamp(source), captions])}.json"
            for source in sources
        }
        todo = [(source, file, captions) for source, file in results.items() if not file.exists()]
        with bar(
            desc="check shards", unit="shard", total=len(sources), initial=len(sources) - len(todo)
        ) as progress:
            workers = min(workers or os.cpu_count() or 1, max(1, len(todo)))
            for _ in run_tasks(_check_shard, todo, workers=workers, backend=backend):
                progress.update()
        shards, skipped, turned = _gathered(results, Path(relative_to), leave_out or {})
    info: dict[str, Any] = {} if captions == CAPTIONS else {"captions": captions}
    return shards, skipped, info | ({"exif_turned": turned} if turned else {})


def read_leave_out(path: str | Path) -> dict[str, str]:
    """The keys of a table of pairs to leave out, and the reason for each.

    path : CSV with a column `key`, such as `mclip check --against SETS --list FILE` writes. Its
        columns `set` and `picture`, where there are any, name the evaluation picture that a pair
        shows.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as err:
        raise ShardError(f"data.leave_out: {path}: {err.strerror}") from None
    if rows and "key" not in rows[0]:
        raise ShardError(f"data.leave_out: {path}: no column key (has {', '.join(rows[0])})")
    reasons: dict[str, str] = {}
    for row in rows:
        shown = f"shows {row['picture']} of {row['set']}" if row.get("set") else str(path)
        reasons.setdefault(row["key"], f"left out: {shown}")
    return reasons


class _Found(NamedTuple):
    sha256: str | None  # None: the shard could not be opened
    good: list[tuple[int, str]]  # (index in the shard, key)
    skipped: list[dict[str, Any]]
    turned: int  # good ones whose EXIF orientation is not applied

    @classmethod
    def read(cls, result: Path) -> "_Found":
        return cls(**json.loads(result.read_text()))

    @property
    def keys(self) -> list[str]:
        return [key for _, key in self.good]


def _stamp(source: str) -> list[int] | None:
    """What changes when a file does; None for a URL or a missing file."""
    try:
        found = None if tars.is_url(source) else os.stat(source)
    except OSError:
        found = None
    return found and [found.st_size, found.st_mtime_ns]


def _gathered(
    results: dict[str, Path], folder: Path, leave_out: Mapping[str, str]
) -> tuple[list[dict], list[dict], int]:
    """The manifest's shards and what they skip, in order: a duplicate key is known by all that
    comes before it; and how many pictures want to be turned.
    """
    from mclip.data.stores import lookup  # here: the workers do without pandas

    twice = _twice(lookup.hashes(_Found.read(result).keys) for result in results.values())
    shards, skipped, seen, turned = [], [], set(), 0
    for source, result in results.items():
        found = _Found.read(result)
        turned += found.turned
        file = (
            source
            if tars.is_url(source) or Path(source).is_absolute()
            else os.path.relpath(source, folder)
        )
        bad = [{"file": file, **entry} for entry in found.skipped]
        suspects = np.flatnonzero(np.isin(lookup.hashes(found.keys), twice))
        again = 0
        for index, key in (found.good[i] for i in suspects):
            if key in seen:
                bad.append({"file": file, "index": index, "key": key, "reason": "duplicate key"})
                again += 1
            seen.add(key)
        already = {entry["index"] for entry in bad if "index" in entry}
        for index, key in found.good if leave_out else ():
            if key in leave_out and index not in already:
                bad.append({"file": file, "index": index, "key": key, "reason": leave_out[key]})
                again += 1
        if found.sha256 is not None:
            shards.append(
                {"file": file, "samples": len(found.good) - again, "sha256": found.sha256}
            )
        else:
            result.unlink()  # it may be there the next time
        skipped += sorted(bad, key=lambda entry: entry.get("index", 1 << 62))
    return shards, skipped, turned


def _twice(hashes: Iterable[np.ndarray]) -> np.ndarray:
    """Hashes that occur more than once. Only 8 bytes per key are held; text is read back for
    suspected duplicates only.
    """
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    every.sort()
    return np.unique(every[1:][every[1:] == every[:-1]])


def _check_shard(source: str, result: Path, captions: str) -> None:
    """Check one shard, a worker's task, and write the result as a file."""
    write_whole(result, json.dumps(_look_through(source, captions)._asdict()))


def _look_through(source: str, captions: str) -> _Found:
    good: list[tuple[int, str]] = []
    skipped: list[dict[str, Any]] = []
    turned = 0
    try:
        with tars.open_source(source) as file:
            stream = tars.Recorder(file)
            for index, (key, files, damage) in enumerate(tars.groups(stream)):
                if key is None:
                    skipped.append({"key": None, "reason": damage})
                    continue
                sample = as_sample(key, files, captions)
                # a cut between files that nobody needs leaves the last sample whole
                reason = (isinstance(sample, str) and damage) or _problem(key, sample)
                if reason or isinstance(sample, str):
                    skipped.append({"index": index, "key": _readable(key), "reason": reason})
                    continue
                good.append((index, key))
                turned += _wants_turning(sample)
            stream.drain()
            if not stream.length and tars.is_url(source):
                raise OSError("nothing came from it")
            return _Found(stream.sha256.hexdigest(), good, _apart(skipped), turned)
    except OSError as err:
        why = err.strerror or str(err)
        if os.path.isdir(source):
            why = f"a folder without {' or '.join(tars.TARS)} files"
        return _Found(None, [], [{"key": None, "reason": f"missing shard: {why}"}], 0)


def _problem(key: str, sample: Sample | str) -> str | None:
    """Why a sample can't be used; None if it can."""
    if key != _readable(key):
        return "key is not UTF-8"  # nor could a table hold it
    if isinstance(sample, str):
        return sample
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            image.draft(
                "RGB", (32, 32)
            )  # JPEG: every byte is still parsed, eight times fewer pixels are made
            image.load()
            if image.mode.startswith(("I", "F")):
                decode(sample)  # which refuses some of these
    except Exception as err:  # Pillow's decoders raise nearly anything on damaged bytes
        return f"corrupt image: {tars.short(err)}"
    return None


def _wants_turning(sample: Sample) -> bool:
    """Is there an EXIF orientation other than upright?"""
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            # without the first question, getexif would decode a PNG that has none
            orientation = image.getexif().get(ORIENTATION) if "exif" in image.info else 1
            return orientation in range(2, 9)
    except Exception:  # broken EXIF data are none
        return False


def _apart(skipped: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is skipped, where the picture and the caption of a key lie apart with that as the
    reason.
    """
    lacks: dict[str | None, set[str]] = {}
    for entry in skipped:
        lacks.setdefault(entry["key"], set()).add(entry["reason"].partition(":")[0])
    both = {"missing image", "missing caption"}
    return [
        entry | {"reason": APART}
        if entry["key"] is not None and both <= lacks[entry["key"]]
        else entry
        for entry in skipped
    ]


def _readable(key: str) -> str:
    """A key as text, whatever bytes a tar has for its name."""
    return key.encode("utf-8", "backslashreplace").decode()
