"""Numbers of many keys in a memory-mapped file, for readers that stream a set shard by shard.

    # made once, then mapped
    kept = lookup.make("data/cache", "kept", "data/balance/balance.parquet", pieces)
    kept.find(["000000012", "000000013"])  # array([1, -1]): the second isn't there

A key takes 16 bytes on disk, shared by all processes through the page cache, and about 40 in memory
while the file is made.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from mclip.system.files import made_once

Pieces = Iterable[tuple[np.ndarray, np.ndarray]]


class KeysError(ValueError):
    """A key occurs twice; the message names the file."""


class Lookup:
    """Find keys in a file that `make` wrote."""

    def __init__(self, path: str | Path):
        self.hashes, self.values = np.load(path, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self.hashes)

    def find(self, keys: Iterable[str]) -> np.ndarray:
        """(n,) int64: each key's number, -1 where it has none."""
        asked = hashes(keys)
        place = np.searchsorted(self.hashes, asked)
        there = place < len(self.hashes)
        there[there] = self.hashes[place[there]] == asked[there]
        out = np.full(len(asked), -1, np.int64)
        out[there] = self.values[place[there]].astype(np.int64)
        return out


def make(cache: str | Path, name: str, source: str | Path, pieces: Callable[[], Pieces]) -> Lookup:
    """The lookup of a table, made where it isn't there or the table was written again.

    Parameters
    ----------
    source : the table's file, which tells by its size and time whether it is the same.
    pieces : gives (keys, numbers of 0 and more) piece by piece.

    Raises
    ------
    KeysError where a key is there twice (or, once in 10^19 pairs of keys, two have one
    64-bit hash).
    """
    source = Path(source)
    state = source.stat()

    def build(draft: Path) -> None:
        found = [(hashes(keys), np.asarray(values, np.uint64)) for keys, values in pieces()]
        ids, values = (
            np.concatenate([part[i] for part in found] or [np.empty(0, np.uint64)]) for i in (0, 1)
        )
        order = np.argsort(ids)
        ids, values = ids[order], values[order]
        if (ids[1:] == ids[:-1]).any():
            raise KeysError(f"{source}: a key is there twice")
        with open(draft, "wb") as file:  # numpy would add a suffix to a path
            np.save(file, np.stack([ids, values]), allow_pickle=False)

    made_of = [str(source.resolve()), state.st_size, state.st_mtime_ns]
    return Lookup(made_once(cache, f"lookup-{name}", ".npy", made_of, build))


def hashes(keys: Iterable[str]) -> np.ndarray:
    """(n,) uint64: 64 bits of each key, the same in every process."""
    return pd.util.hash_array(np.array([str(key) for key in keys], object), categorize=False)


def as_keys(keys) -> np.ndarray:
    """Keys as an array of integers or strings."""
    keys = np.asarray(keys)
    return keys if keys.dtype.kind in "iu" else keys.astype(str)
