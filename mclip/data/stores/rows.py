"""Embedding rows wherever they lie: an array, a memmap, many .npy files as one; clip-retrieval
folders.

Nothing is read before it is asked for, so sets larger than memory can be worked on block by block.
"""

import re
import resource
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from mclip.data.stores.balance import as_keys

SPARE = 256  # descriptors for everything else


class RowsError(ValueError):
    """Embeddings or keys that can't be used; the message names the file, the row or the key."""


class Rows:
    """(n, d) floats: an array or memmap, or a list of .npy files, one after the other.

    names : of the parts, for messages; where they are `in_files`, the files' paths.
    """

    def __init__(self, embeddings):
        if isinstance(embeddings, str | Path):
            embeddings = [embeddings]
        self.in_files = isinstance(embeddings, list | tuple) and all(
            isinstance(x, str | Path) for x in embeddings
        )
        if self.in_files:
            _allow_open(len(embeddings))
            named = [(str(path), open_npy(path)) for path in embeddings]
        else:
            named = [("embeddings", np.asanyarray(embeddings))]
        named = [(name, array) for name, array in named if array.ndim != 2 or len(array)]
        if not named:
            raise RowsError("embeddings: there are no rows")
        for name, array in named:
            if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] == 0:
                raise RowsError(
                    f"{name}: expected floats of shape (n, d), found {array.dtype} {array.shape}"
                )
            if array.shape[1] != named[0][1].shape[1]:
                raise RowsError(
                    f"{name}: rows are {array.shape[1]} wide, "
                    f"those of {named[0][0]} {named[0][1].shape[1]}"
                )
        self.names, self.arrays = zip(*named, strict=True)
        with warnings.catch_warnings():  # a memmap is read-only: so are its tensors
            warnings.simplefilter("ignore", UserWarning)
            self.tensors = [torch.from_numpy(array) for array in self.arrays]
        self.starts = np.cumsum([0, *(len(array) for array in self.arrays)])
        self.width = self.arrays[0].shape[1]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def unit(self, index: np.ndarray) -> np.ndarray:
        """Rows `index` (m,) as (m, d) float64 of unit norm; an error names a row that has no
        direction.
        """
        place = torch.from_numpy(index)
        if len(self.tensors) == 1:
            out = self.tensors[0][place].double()
        else:
            source = np.searchsorted(self.starts, index, side="right") - 1
            out = torch.empty(len(index), self.width, dtype=torch.float64)
            for k in np.unique(source):
                here = torch.from_numpy(np.flatnonzero(source == k))
                out[here] = self.tensors[k][place[here] - int(self.starts[k])].double()
        return out.div_(self._norms(out, index)[:, None]).numpy()

    def squares(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Squared L2 distances of unit rows a[k] and b[k], (m,) float64."""
        difference = self.unit(a) - self.unit(b)
        return (difference * difference).sum(axis=1)

    def block(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows start..stop as they are, (m, d) float64, and their norms (m,); an error as in
        `unit`.
        """
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = max(first + 1, int(np.searchsorted(self.starts, stop)))
        parts = [
            self.tensors[k][
                max(0, start - int(self.starts[k])) : max(0, stop - int(self.starts[k]))
            ].double()
            for k in range(first, min(last, len(self.tensors)))
        ]
        block = torch.cat(parts) if len(parts) != 1 else parts[0]
        return block, self._norms(block, np.arange(start, stop))

    def _norms(self, rows: torch.Tensor, index: np.ndarray) -> torch.Tensor:
        norm = torch.linalg.vector_norm(rows, dim=1)
        bad = (~(norm > 0) | ~norm.isfinite()).nonzero()[:, 0]
        if len(bad):
            what = "all zeros" if norm[bad[0]] == 0 else "not finite (NaN or infinity)"
            row = int(index[bad[0]])
            k = int(np.searchsorted(self.starts, row, side="right")) - 1
            raise RowsError(f"{self.names[k]}: row {row - self.starts[k]} is {what}")
        return norm

    def unit32(self, index: np.ndarray, inverse: np.ndarray) -> torch.Tensor:
        """Rows `index` (m,) times `inverse` (m,), one over their norms: (m, d) float32 of unit
        norm.
        """
        out = None
        source = np.searchsorted(self.starts, index, side="right") - 1
        for k in np.unique(source):
            here = np.flatnonzero(source == k) if len(self.tensors) > 1 else slice(None)
            part = self.tensors[k][torch.from_numpy(index[here] - self.starts[k])]
            scale = torch.from_numpy(inverse[here])[:, None]
            part = (
                (part * scale).float()
                if part.dtype == torch.float64
                else part.float().mul_(scale.float())
            )
            if len(part) == len(index):
                return part
            out = torch.empty(len(index), self.width) if out is None else out
            out[torch.from_numpy(here)] = part
        return torch.empty(0, self.width) if out is None else out


def _allow_open(files: int) -> None:
    """A mapped file keeps a descriptor, and many systems begin with 1,024: as many as are needed,
    where allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + SPARE
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise RowsError(
            f"embeddings: {files:,} files, but this process may open {hard:,}: raise `ulimit -n`, "
            "or write larger files"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_npy(path: str | Path) -> np.ndarray:
    """A .npy file as a memmap; RowsError in one line where it is missing, cut short or pickled."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise RowsError(f"{path}: no such file") from None
    except (ValueError, EOFError, OSError) as err:
        raise RowsError(f"{path}: not a whole .npy file of numbers ({err})") from None


def check_keys(keys, rows: int) -> np.ndarray:
    """One different key a row, as an array; None: the rows' numbers."""
    keys = as_keys(np.arange(rows) if keys is None else keys)
    if keys.shape != (rows,):
        raise RowsError(f"keys: {len(keys)} for {rows} embeddings")
    values, count = np.unique(keys, return_counts=True)
    if len(values) < len(keys):
        twice = values[count > 1]
        raise RowsError(
            f"keys: {twice[0]!s} occurs {count[count > 1][0]} times, {len(twice)} keys are not "
            "unique; every sample needs its own"
        )
    return keys


def read_folder(folder: str | Path, key: str | None = None) -> tuple[list[Path], np.ndarray | None]:
    """A clip-retrieval folder: its img_emb/*.npy in numeric order, and the keys of
    metadata/*.parquet.

    key : the column that names a sample; None: the first there is of uid, key, image_path.
    The keys are None where there is no metadata at all.
    """
    folder = Path(folder)
    files = _numbered(folder / "img_emb", ".npy")
    if not files:
        raise RowsError(
            f"{folder}/img_emb: no img_emb_*.npy files (clip-retrieval's layout is expected)"
        )
    tables = _numbered(folder / "metadata", ".parquet")
    if not tables:
        return list(files.values()), None
    if missing := sorted(set(files) - set(tables)):
        raise RowsError(f"{folder}/metadata: there is no parquet file for {files[missing[0]].name}")
    keys = []
    for number, file in files.items():
        columns = pq.read_schema(tables[number]).names
        column = key or next((c for c in ("uid", "key", "image_path") if c in columns), None)
        if column not in columns:
            raise RowsError(
                f"{tables[number]}: no column {key or 'uid, key or image_path'} to name samples "
                f"(there are {', '.join(columns)})"
            )
        keys.append(as_keys(pq.read_table(tables[number], columns=[column])[column].to_numpy()))
        if len(keys[-1]) != (rows := len(open_npy(file))):
            raise RowsError(f"{tables[number]} has {len(keys[-1])} rows, {file.name} has {rows}")
    return list(files.values()), np.concatenate(keys)


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """A folder's files by the number that their names end in, ascending."""
    found = {
        int(m[1]): file
        for file in folder.glob(f"*{suffix}")
        if not file.name.startswith(".") and (m := re.search(r"(\d+)$", file.stem))
    }
    return dict(sorted(found.items()))
