"""What `mclip.balance` found, in and out of files.

Apart from how it is found, so that who only reads it is not made anew when that changes.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mclip.data.stores import lookup
from mclip.data.stores.lookup import as_keys
from mclip.system.files import whole

METRICS = ("l2", "sql2", "cosine")
ABOUT = b"mclip.balance"  # of the table's metadata
PIECE = 1 << 18  # rows read at once


class BalanceError(ValueError):
    """An option out of range, or a result that is missing; the message names the parameter or the
    file.
    """


@dataclass(frozen=True)
class Balance:
    """Row i of every array belongs to sample `keys[i]`.

    set_id : (n,) int64, sets numbered from 0 by their lowest key
    keep : (n,) bool, exactly one True a set
    centroid_distance : (n,) float64, Euclidean distance of the unit-norm row to its set's mean row
    keys : (n,) str or int
    """

    set_id: np.ndarray
    keep: np.ndarray
    centroid_distance: np.ndarray
    keys: np.ndarray
    threshold: float
    metric: str

    @property
    def removed_fraction(self) -> float:
        return float(1 - self.keep.mean())

    @property
    def set_sizes(self) -> np.ndarray:
        """(number of sets,) int64: images in each set."""
        return np.bincount(self.set_id)

    @property
    def thresholds(self) -> dict[str, float]:
        """The threshold in all three metrics."""
        return convert(self.threshold, self.metric)

    def summary(self) -> str:
        """One line: images, kept, removed, sets, threshold in all units."""
        n, kept, sizes = len(self.keep), int(self.keep.sum()), self.set_sizes
        units = ", ".join(f"{name} {value:.4g}" for name, value in self.thresholds.items())
        return (
            f"{n:,} images, {kept:,} kept, {n - kept:,} removed "
            f"({100 * self.removed_fraction:.1f} %); "
            f"{int((sizes > 1).sum()):,} sets of several images, the largest of {sizes.max():,}; "
            f"threshold {units}"
        )


def convert(threshold: float, metric: str) -> dict[str, float]:
    """A threshold in all three metrics, {"l2": .., "sql2": .., "cosine": ..}; exact on unit-norm
    rows.
    """
    if metric not in METRICS:
        raise BalanceError(f"metric: expected one of {', '.join(METRICS)}, found {metric!r}")
    largest = 4.0 if metric == "sql2" else 2.0
    if not 0 < threshold <= largest:
        raise BalanceError(
            f"threshold: with metric {metric} it lies above 0 and is at most {largest:g} "
            f"(unit vectors are never farther apart), found {threshold}"
        )
    square = {"l2": threshold * threshold, "sql2": threshold, "cosine": 2 * threshold}[metric]
    units = {"l2": square**0.5, "sql2": square, "cosine": square / 2}
    return {name: float(value) for name, value in (units | {metric: threshold}).items()}


def write(folder: str | Path, result: Balance) -> None:
    """FOLDER/balance.parquet: key, set_id, keep, centroid_distance. Where all keys are DataComp
    uids (32 hex digits) also the kept ones as FOLDER/kept_uids.npy, sorted `u8,u8`: what DataComp's
    resharder reads.
    """
    content = pa.table(
        {
            "key": result.keys,
            "set_id": result.set_id,
            "keep": result.keep,
            "centroid_distance": result.centroid_distance,
        }
    )
    about = {"threshold": result.threshold, "metric": result.metric}
    with whole(Path(folder) / "balance.parquet") as part:
        pq.write_table(content.replace_schema_metadata({ABOUT: json.dumps(about)}), part)
    uids = Path(folder) / "kept_uids.npy"
    if result.keys.dtype.kind == "U" and all(
        re.fullmatch("[0-9a-f]{32}", key) for key in result.keys
    ):
        kept = [(int(key[:16], 16), int(key[16:], 16)) for key in result.keys[result.keep]]
        with whole(uids) as part, open(part, "wb") as file:
            np.save(file, np.sort(np.array(kept, dtype="u8,u8")), allow_pickle=False)
    else:
        uids.unlink(missing_ok=True)


def read(folder: str | Path) -> Balance:
    """What `write` wrote; BalanceError in one line where it is missing or something else."""
    path = table(folder)
    try:
        found = pq.read_table(path)
        about = json.loads((found.schema.metadata or {})[ABOUT])
        set_id, keep, distance, keys = (
            found[name].to_numpy() for name in ("set_id", "keep", "centroid_distance", "key")
        )
    except (pa.ArrowException, KeyError, ValueError) as err:
        raise _other(path, err) from None
    return Balance(set_id, keep, distance, as_keys(keys), **about)


def kept(folder: str | Path) -> Iterator[np.ndarray]:
    """The keys of the kept images, piece by piece: nothing of what has hundreds of millions of rows
    is held.
    """
    path = table(folder)
    try:
        for piece in pq.ParquetFile(path).iter_batches(PIECE, columns=["key", "keep"]):
            yield as_keys(piece.filter(piece["keep"])["key"].to_numpy(zero_copy_only=False))
    except (pa.ArrowException, KeyError, ValueError) as err:
        raise _other(path, err) from None


def lookup_kept(folder: str | Path, cache: str | Path) -> lookup.Lookup:
    """Finds the keys of the kept images (a number of 0 or more) in a file under `cache`, made where
    it isn't there.
    """
    return lookup.make(
        cache, "kept", table(folder), lambda: ((keys, np.ones(len(keys))) for keys in kept(folder))
    )


def count_kept(folder: str | Path) -> int:
    """How many images are kept."""
    return sum(len(keys) for keys in kept(folder))


def table(folder: str | Path) -> Path:
    """The file that `write` writes; BalanceError where it is missing."""
    path = Path(folder) / "balance.parquet"
    if not path.is_file():
        raise BalanceError(f"{path} is missing: run `dvc repro balance` first")
    return path


def _other(path: Path, err: Exception) -> BalanceError:
    return BalanceError(f"{path} is no file of mclip.balance: run `dvc repro -f balance` ({err})")
