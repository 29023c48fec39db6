"""Embedding rows from an array, a memmap, or many .npy files (or arrays of .npz files) as one.

Rows are read only when asked for, so sets larger than memory can be processed block by block.
"""

import resource
import warnings
from pathlib import Path

import numpy as np
import torch

from mclip.data.stores.embeddings import EmbeddingsError, check_rows, native, open_rows
from mclip.data.stores.lookup import as_keys

SPARE = 256  # descriptors for everything else


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
            named = [(str(path), open_rows(path)) for path in embeddings]
        else:
            named = [("embeddings", np.asanyarray(embeddings))]
        named = [(name, array) for name, array in named if array.ndim != 2 or len(array)]
        if not named:
            raise EmbeddingsError("embeddings: there are no rows")
        named = [(name, native(check_rows(array, name))) for name, array in named]
        for name, array in named:
            if array.shape[1] != named[0][1].shape[1]:
                raise EmbeddingsError(
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
            raise EmbeddingsError(f"{self.names[k]}: row {row - self.starts[k]} is {what}")
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
        raise EmbeddingsError(
            f"embeddings: {files:,} files, but this process may open {hard:,}: raise `ulimit -n`, "
            "or write larger files"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_keys(keys, rows: int) -> np.ndarray:
    """One different key a row, as an array; None: the rows' numbers."""
    keys = as_keys(np.arange(rows) if keys is None else keys)
    if keys.shape != (rows,):
        raise EmbeddingsError(f"keys: {len(keys)} for {rows} embeddings")
    values, count = np.unique(keys, return_counts=True)
    if len(values) < len(keys):
        twice = values[count > 1]
        raise EmbeddingsError(
            f"keys: {twice[0]!s} occurs {count[count > 1][0]} times, {len(twice)} keys are not "
            "unique; every sample needs its own"
        )
    return keys
