"""What `mclip.cluster` found, in and out of files.

Apart from how it is found, so that who only reads it is not made anew when that changes.
"""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import whole
from .balanced import as_keys

ABOUT = b"mclip.cluster"  # of the table's metadata


class ClusterError(ValueError):
    """A number of clusters that can't be, or a result that is missing; the message names it."""


@dataclass(frozen=True)
class Clusters:
    """centres (k, d) float32, unit norm; row i of `labels` (n,) int64 and `similarity` (n,) float32, the cosine
    to its own centre, belongs to `keys[i]`; objective (iterations,): mean similarity before each update of the
    centres; warning: "" or one line about the choice of k."""

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
    """FOLDER/centres.npy and FOLDER/labels.parquet: key, label, similarity (the objective in its metadata)."""
    table = pa.table({"key": result.keys, "label": result.labels, "similarity": result.similarity})
    about = {"objective": [float(x) for x in result.objective], "warning": result.warning}
    buffer = io.BytesIO()
    np.save(buffer, result.centres, allow_pickle=False)
    with whole(Path(folder) / "centres.npy") as part:
        part.write_bytes(buffer.getvalue())
    with whole(Path(folder) / "labels.parquet") as part:
        pq.write_table(table.replace_schema_metadata({ABOUT: json.dumps(about)}), part)


def read(folder: str | Path) -> Clusters:
    """What `write` wrote; ClusterError in one line where it is missing or something else."""
    centres, labels = Path(folder) / "centres.npy", Path(folder) / "labels.parquet"
    for path in (centres, labels):
        if not path.is_file():
            raise ClusterError(f"{path} is missing: run `dvc repro cluster` first")
    try:
        array = np.load(centres, allow_pickle=False)
        table = pq.read_table(labels)
        about = json.loads((table.schema.metadata or {})[ABOUT])
        key, label, similarity = (table[name].to_numpy() for name in ("key", "label", "similarity"))
    except (pa.ArrowException, KeyError, ValueError, EOFError) as err:
        raise ClusterError(f"{folder} holds no files of mclip.cluster: run `dvc repro -f cluster` ({err})") from None
    if len(label) and label.max() >= len(array):
        raise ClusterError(f"{labels}: label {label.max()}, but {centres} has {len(array)} centres: "
                           "run `dvc repro -f cluster`")
    return Clusters(array, label, similarity, np.array(about["objective"]), as_keys(key), about["warning"])
