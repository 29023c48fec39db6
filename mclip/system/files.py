"""Files: written whole or not at all (under another name, then renamed), and their paths."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """The draft of a file that appears, or is replaced, when the block ends well; else nothing
    changes.

    with whole(path) as draft:
        save(draft)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file whole; text as UTF-8."""
    with whole(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON whole: readable, keys sorted, so the same bytes for the same data."""
    write_whole(path, json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A scratch folder beside `folder` that takes its place when the block ends well, else
    vanishes.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def digest(content: Any) -> str:
    """16 hex digits of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def made_once(
    folder: str | Path, name: str, suffix: str, made_of: Any, build: Callable[[Path], None]
) -> Path:
    """The file FOLDER/NAME-<digest of made_of>SUFFIX; build(draft) makes it if it is missing.

    made_of : JSON of all that the content depends on. Of several processes that want the file one
        makes it.
    """
    path = Path(folder) / f"{name}-{digest(made_of)}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            with whole(path) as draft:
                build(draft)
    return path


def plain_path(text: str) -> str:
    """A path as the file system takes it: without `file:`, and with `~` expanded.

    >>> plain_path("file:///data/a%20b.tar"), plain_path("file:a.tar"), plain_path("s3://b/a.tar")
    ('/data/a b.tar', 'a.tar', 's3://b/a.tar')
    """
    if text.startswith("file:"):
        return url2pathname(urlsplit(text).path)
    return os.path.expanduser(text)


def is_lfs_pointer(start: bytes) -> bool:
    """Is this the start of a Git LFS pointer, which stands where a file was not downloaded?"""
    return start.startswith(b"version https://git-lfs")


LFS_POINTER = "a Git LFS pointer, the file itself was not downloaded: run `git lfs pull`"
