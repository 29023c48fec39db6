"""Write and read the result of `mclip.balance`.

Kept separate from the algorithm, so that readers of the result do not rerun when it changes.
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
    """An option is out of range or a result is missing; the message names it."""


@dataclass(frozen=True)
class Balance:
    """Sets of near-duplicates, and the image that each keeps.

    Row i of every array belongs to the sample `keys[i]`.

    Parameters
    ----------
    set_id : ndarray of int64, shape (n,)
        Each row's set; sets are numbered from 0 by their lowest key.
    keep : ndarray of bool, shape (n,)
        True for exactly one row of each set.
    centroid_distance : ndarray of float64, shape (n,)
        Euclidean distance of the unit-norm row to the mean row of its set.
    keys : ndarray of str or int, shape (n,)
        Names of the samples.
    threshold : float
        Largest distance that linked two images, in the unit of `metric`.
    metric : {"l2", "sql2", "cosine"}
        Distance of unit-norm rows.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance import balance
    >>> rows = np.array([[1.0, 0.0], [0.99, 0.14], [0.0, 1.0], [0.0, 1.0]])
    >>> result = balance(rows, threshold=0.07, metric="sql2")
    >>> result.removed_fraction, result.set_sizes.tolist()
    (0.5, [2, 2])
    """

    set_id: np.ndarray
    keep: np.ndarray
    centroid_distance: np.ndarray
    keys: np.ndarray
    threshold: float
    metric: str

    @property
    def removed_fraction(self) -> float:
        """Fraction of the images that are not kept, 0 to 1."""
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
    """Convert a threshold to all three metrics; exact for unit-norm rows.

    Parameters
    ----------
    threshold : float
        In the unit of `metric`: above 0, at most 2, or 4 for "sql2".
    metric : {"l2", "sql2", "cosine"}
        Distance of unit-norm rows: Euclidean, its square, or 1 minus the cosine.

    Returns
    -------
    dict of str to float
        The threshold in "l2", "sql2" and "cosine".

    Raises
    ------
    BalanceError
        If the metric is unknown or the threshold is out of its range.

    Examples
    --------
    >>> from mclip.balance import convert
    >>> convert(0.5, "cosine")
    {'l2': 1.0, 'sql2': 1.0, 'cosine': 0.5}
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
    """Write what `balance` found.

    FOLDER/balance.parquet has the columns key, set_id, keep and centroid_distance. Where all keys
    are DataComp uids (32 hex digits), FOLDER/kept_uids.npy has the kept ones, too: sorted `u8,u8`,
    as DataComp's resharder reads them.

    Parameters
    ----------
    folder : path
        Made if it is missing.
    result : Balance
        What `balance` returned.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from mclip.balance import balance, read, write
    >>> result = balance(np.eye(3), ["a", "b", "c"], threshold=0.07, metric="sql2")
    >>> folder = tempfile.mkdtemp()
    >>> write(folder, result)
    >>> read(folder).keys.tolist()
    ['a', 'b', 'c']
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
    """Read what `write` wrote.

    Parameters
    ----------
    folder : path
        Folder with balance.parquet.

    Returns
    -------
    Balance
        The same sets, keys and threshold.

    Raises
    ------
    BalanceError
        If the file is missing or is not one that `write` wrote.

    Examples
    --------
    >>> from mclip.balance import read
    >>> read("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    mclip.data.stores.balance.BalanceError: no/such/folder/balance.parquet is missing: ...
    """
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
    """Yield the keys of the kept images piece by piece, so that any number of rows fits."""
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
    """Count the kept images."""
    return sum(len(keys) for keys in kept(folder))


def table(folder: str | Path) -> Path:
    """Path of the file that `write` writes; BalanceError if it is missing."""
    path = Path(folder) / "balance.parquet"
    if not path.is_file():
        raise BalanceError(f"{path} is missing: run `dvc repro balance` first")
    return path


def _other(path: Path, err: Exception) -> BalanceError:
    return BalanceError(f"{path} is no file of mclip.balance: run `dvc repro -f balance` ({err})")
