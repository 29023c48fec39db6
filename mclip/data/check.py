"""Check shards from elsewhere: read once, decode every image, list what can't be used by name.

    shards = ["/data/cc3m/{00000..00331}.tar"]
    manifest = check_shards(shards, "data/pairs", state="data/cache/checked")

Shards are independent, so they are distributed over as many processes as there are cores, or over a
Ray cluster (mclip.system.workers). The result for each stays in the `state` folder until all are
done, so that a killed check continues.
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mclip.data import tars
from mclip.data.shards import MANIFEST, ShardError, as_sample, manifest_of
from mclip.system.files import digest, whole_folder, write_json, write_whole
from mclip.system.progress import bar
from mclip.system.workers import run_tasks


def expand(patterns: Iterable[str]) -> list[str]:
    """Shards that patterns name, in order, each once: `{000..099}` and globs expand, URLs stay as
    they are.

    A glob that matches nothing stays too, so that it is reported as missing instead of silently
    dropped.
    """
    from webdataset.shardlists import expand_urls

    found: list[str] = []
    for pattern in patterns:
        for url in expand_urls(pattern):
            matches = (
                sorted(glob(url, recursive=True)) if has_magic(url) and not tars.is_url(url) else []
            )
            found.extend(matches or [url])
    return list(dict.fromkeys(found))


def check_shards(
    sources: Iterable[str],
    folder: str | Path,
    *,
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
    state, workers, backend : see `read_shards`

    Returns
    -------
    the manifest
    """
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
    shards, skipped = read_shards(sources, folder, state=state, workers=workers, backend=backend)
    if not any(shard["samples"] for shard in shards):
        first = f"; {skipped[0]['file']}: {skipped[0]['reason']}" if skipped else ""
        raise ShardError(f"data.shards: no good pair in {len(sources)} shards{first}")
    manifest = manifest_of(shards, skipped)
    with whole_folder(folder) as scratch:
        write_json(scratch / MANIFEST, manifest)
    if state is not None:
        shutil.rmtree(state)
    return manifest


def read_shards(
    sources: Iterable[str],
    relative_to: str | Path = ".",
    *,
    state: str | Path | None = None,
    workers: int | None = None,
    backend: str = "processes",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read every shard once and decode every image; nothing is written beside `state`.

    Skipped, each named with its reason: a corrupt image, an empty or missing caption, a missing
    image, an extension nobody reads, a duplicate key (the first good one is kept), what a truncated
    tar cuts off (what comes before is kept), a missing shard.

    Parameters
    ----------
    sources : shards, as `expand` returns them
    relative_to : the folder that relative paths in the result start from
    state : folder for the results so far, which the caller deletes; a file that has changed
        meanwhile is read again. None: a temporary one
    workers : processes; None: one a core
    backend : of several workers, see mclip.system.workers

    Returns
    -------
    shards, skipped : as the manifest lists them, see mclip.data.shards
    """
    sources = list(sources)
    with tempfile.TemporaryDirectory() if state is None else nullcontext(state) as place:
        results = {
            source: Path(place) / f"{digest([source, _stamp(source)])}.json" for source in sources
        }
        todo = [(source, file) for source, file in results.items() if not file.exists()]
        with bar(
            desc="check shards", unit="shard", total=len(sources), initial=len(sources) - len(todo)
        ) as progress:
            workers = min(workers or os.cpu_count() or 1, max(1, len(todo)))
            for _ in run_tasks(_check_shard, todo, workers=workers, backend=backend):
                progress.update()
        return _gathered(results, Path(relative_to))


class _Found(NamedTuple):
    sha256: str | None  # None: the shard could not be opened
    good: list[tuple[int, str]]  # (index in the shard, key)
    skipped: list[dict[str, Any]]

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


def _gathered(results: dict[str, Path], folder: Path) -> tuple[list[dict], list[dict]]:
    """The manifest's shards and what they skip, in order: a duplicate key is known by all that
    comes before it.
    """
    from mclip.data.stores import lookup  # here: the workers do without pandas

    twice = _twice(lookup.hashes(_Found.read(result).keys) for result in results.values())
    shards, skipped, seen = [], [], set()
    for source, result in results.items():
        found = _Found.read(result)
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
        if found.sha256 is not None:
            shards.append(
                {"file": file, "samples": len(found.good) - again, "sha256": found.sha256}
            )
        else:
            result.unlink()  # it may be there the next time
        skipped += sorted(bad, key=lambda entry: entry.get("index", 1 << 62))
    return shards, skipped


def _twice(hashes: Iterable[np.ndarray]) -> np.ndarray:
    """Hashes that occur more than once. Only 8 bytes per key are held; text is read back for
    suspected duplicates only.
    """
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    every.sort()
    return np.unique(every[1:][every[1:] == every[:-1]])


def _check_shard(source: str, result: Path) -> None:
    """Check one shard, a worker's task, and write the result as a file."""
    write_whole(result, json.dumps(_look_through(source)._asdict()))


def _look_through(source: str) -> _Found:
    good: list[tuple[int, str]] = []
    skipped: list[dict[str, Any]] = []
    try:
        with tars.open_source(source) as file:
            stream = tars.Recorder(file)
            for index, (key, files, damage) in enumerate(tars.groups(stream)):
                if key is None:
                    skipped.append({"key": None, "reason": damage})
                # a cut between files that nobody needs leaves the last sample whole
                elif reason := (isinstance(as_sample(key, files), str) and damage) or _problem(
                    key, files
                ):
                    skipped.append({"index": index, "key": _readable(key), "reason": reason})
                else:
                    good.append((index, key))
            stream.drain()
            if not stream.length and tars.is_url(source):
                raise OSError("nothing came from it")
            return _Found(stream.sha256.hexdigest(), good, skipped)
    except OSError as err:
        return _Found(
            None, [], [{"key": None, "reason": f"missing shard: {err.strerror or tars.short(err)}"}]
        )


def _problem(key: str, files: dict[str, bytes]) -> str | None:
    """Why a sample can't be used; None if it can."""
    if key != _readable(key):
        return "key is not UTF-8"  # nor could a table hold it
    sample = as_sample(key, files)
    if isinstance(sample, str):
        return sample
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            image.draft(
                "RGB", (32, 32)
            )  # JPEG: every byte is still parsed, eight times fewer pixels are made
            image.load()
    except Exception as err:  # Pillow's decoders raise nearly anything on damaged bytes
        return f"corrupt image: {tars.short(err)}"
    return None


def _readable(key: str) -> str:
    """A key as text, whatever bytes a tar has for its name."""
    return key.encode("utf-8", "backslashreplace").decode()
