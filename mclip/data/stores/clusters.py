"""Write and read the result of `mclip.cluster`.

Kept separate from the algorithm, so that readers of the result do not rerun when it changes.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mclip.data.stores.lookup import as_keys
from mclip.system.files import whole

ABOUT = b"mclip.cluster"  # of the table's metadata
PIECE = 1 << 18  # rows read at once


class ClusterError(ValueError):
    """A number of clusters is impossible or a result is missing; the message names it."""


@dataclass(frozen=True)
class Clusters:
    """Centres of the images, and which of them each image is nearest to.

    Row i of `labels` and `similarity` belongs to the sample `keys[i]`.

    Parameters
    ----------
    centres : ndarray of float32, shape (k, d)
        Unit-norm rows.
    labels : ndarray of int64, shape (n,)
        Number of each row's centre.
    similarity : ndarray of float32, shape (n,)
        Cosine of each row to its centre.
    objective : ndarray of float64, shape (iterations,)
        Mean similarity before each update of the centres.
    keys : ndarray of str or int, shape (n,)
        Names of the samples.
    warning : str, default ""
        One line about the choice of k, where it is doubtful.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.cluster import cluster
    >>> cluster(np.eye(3), 3, iterations=1, seed=0).sizes.tolist()
    [1, 1, 1]
    """

    centres: np.ndarray
    labels: np.ndarray
    similarity: np.ndarray
    objective: np.ndarray
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, str))
    warning: str = ""

    @property
    def sizes(self) -> np.ndarray:
        """(k,) int64: images in each cluster."""
        return np.bincount(self.labels, minlength=len(self.centres))


def write(folder: str | Path, result: Clusters) -> None:
    """Write what `cluster` found.

    FOLDER/centres.npy has the centres; FOLDER/labels.parquet the columns key, label and similarity,
    and the objective in its metadata.

    Parameters
    ----------
    folder : path
        Made if it is missing.
    result : Clusters
        What `cluster` returned.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from mclip.cluster import cluster, read, write
    >>> folder = tempfile.mkdtemp()
    >>> write(folder, cluster(np.eye(2), 2, iterations=1, seed=0, keys=["a", "b"]))
    >>> read(folder).keys.tolist()
    ['a', 'b']
    """
    content = pa.table(
        {"key": result.keys, "label": result.labels, "similarity": result.similarity}
    )
    about = {"objective": [float(x) for x in result.objective], "warning": result.warning}
    buffer = io.BytesIO()
    np.save(buffer, result.centres, allow_pickle=False)
    with whole(Path(folder) / "centres.npy") as part:
        part.write_bytes(buffer.getvalue())
    with whole(Path(folder) / "labels.parquet") as part:
        pq.write_table(content.replace_schema_metadata({ABOUT: json.dumps(about)}), part)


def read(folder: str | Path) -> Clusters:
    """Read what `write` wrote.

    Parameters
    ----------
    folder : path
        Folder with centres.npy and labels.parquet.

    Returns
    -------
    Clusters
        The same centres, labels and keys.

    Raises
    ------
    ClusterError
        If a file is missing or is not one that `write` wrote.

    Examples
    --------
    >>> from mclip.cluster import read
    >>> read("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    mclip.data.stores.clusters.ClusterError: no/such/folder/centres.npy is missing: ...
    """
    centres, labels = read_centres(folder), table(folder)
    try:
        found = pq.read_table(labels)
        about = json.loads((found.schema.metadata or {})[ABOUT])
        key, label, similarity = (found[name].to_numpy() for name in ("key", "label", "similarity"))
    except (pa.ArrowException, KeyError, ValueError) as err:
        raise _other(folder, err) from None
    _check(labels, label, len(centres))
    return Clusters(
        centres, label, similarity, np.array(about["objective"]), as_keys(key), about["warning"]
    )


def read_centres(folder: str | Path) -> np.ndarray:
    """Read the centres alone, (k, d) float32; ClusterError as in `read`."""
    path = _there(Path(folder) / "centres.npy")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as err:
        raise _other(folder, err) from None


def labels(folder: str | Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (keys, labels) piece by piece, so that any number of rows fits in memory."""
    path, count = table(folder), len(read_centres(folder))
    try:
        for piece in pq.ParquetFile(path).iter_batches(PIECE, columns=["key", "label"]):
            label = piece["label"].to_numpy()
            _check(path, label, count)
            yield as_keys(piece["key"].to_numpy(zero_copy_only=False)), label
    except (pa.ArrowException, KeyError) as err:
        raise _other(folder, err) from None


def table(folder: str | Path) -> Path:
    """Path of the file of keys and labels that `write` writes; ClusterError if it is missing."""
    return _there(Path(folder) / "labels.parquet")


def _there(path: Path) -> Path:
    if not path.is_file():
        raise ClusterError(f"{path} is missing: run `dvc repro cluster` first")
    return path


def _check(path: Path, label: np.ndarray, centres: int) -> None:
    outside = label[(label < 0) | (label >= centres)]
    if len(outside):
        raise ClusterError(
            f"{path}: label {outside[0]}, but there are {centres} centres: run "
            "`dvc repro -f cluster`"
        )


def _other(folder: str | Path, err: Exception) -> ClusterError:
    return ClusterError(
        f"{folder} holds no files of mclip.cluster: run `dvc repro -f cluster` ({err})"
    )
