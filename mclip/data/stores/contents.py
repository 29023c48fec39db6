"""Fingerprint a stage's folder: equal fingerprints, equal contents."""

import functools
import hashlib
from pathlib import Path

from mclip.system.files import digest

# these name the data of their folder by checksums, or all that it was made of
DESCRIBED_BY = ("manifest.json", "meta.json")
STAGES = {"clusters": "cluster", "reinforced": "reinforce", "pairs": "data"}


def fingerprint(folder: str | Path) -> str:
    """Digest of what a folder of a stage holds, wherever it lies.

    Parameters
    ----------
    folder : its manifest.json or meta.json stands for it where it has one, else all its files do.
        A file is read once a process, for as long as it stays the same.

    Raises
    ------
    FileNotFoundError
        The folder has no file; the message names the stage to run.
    """
    folder = Path(folder)
    described = [folder / name for name in DESCRIBED_BY if (folder / name).is_file()][:1]
    files = described or sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        stage = STAGES.get(folder.name, folder.name)
        stage = "embed" if folder.parent.name == "embeddings" else stage
        raise FileNotFoundError(f"{folder} is missing: run `dvc repro {stage}` first")
    return digest([(path.relative_to(folder).as_posix(), checksum(path)) for path in files])


def checksum(path: str | Path) -> str:
    """sha256 of a file, read once a process for as long as its size, time and inode stay."""
    state = Path(path).stat()
    return _checksum(Path(path), state.st_size, state.st_mtime_ns, state.st_ino)


@functools.cache
def _checksum(path: Path, *state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
