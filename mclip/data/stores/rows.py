"""Embedding rows from an array, a memmap, or many .npy files (or arrays of .npz files) as one.

Rows are read only when asked for, so sets larger than memory can be processed block by block.
"""

import resource
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mclip.data.stores.embeddings import EmbeddingsError, check_rows, native, open_rows
from mclip.data.stores.lookup import as_keys
from mclip.system import progress
from mclip.system.threads import side_by_side

SPARE = 256  # descriptors for everything else
BLOCK = 512  # rows read at once where all are gone through


class Rows:
    """(n, d) floats: an array or memmap, or a list of .npy files, one after the other.

    names : of the parts, for messages; where they are `in_files`, the files' paths.
    skip : numbers of rows that are left out, ascending; the others are numbered without them.
    """

    def __init__(self, embeddings, skip: np.ndarray | None = None):
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
        self.skip = np.empty(0, np.int64) if skip is None else np.asarray(skip, np.int64)
        # the place of each row that is not left out; None: all are there
        self._places = None
        if len(self.skip):
            self._places = np.setdiff1d(np.arange(self.starts[-1]), self.skip)
            if not len(self._places):
                raise EmbeddingsError("embeddings: there are no rows but those that are left out")

    def __len__(self) -> int:
        return int(self.starts[-1]) if self._places is None else len(self._places)

    def unit(self, index: np.ndarray) -> np.ndarray:
        """Rows `index` (m,) as (m, d) float64 of unit norm; an error names a row that has no
        direction.
        """
        out = self._gathered(self._place(index))
        return out.div_(self._norms(out, index)[:, None]).numpy()

    def squares(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Squared L2 distances of unit rows a[k] and b[k], (m,) float64."""
        difference = self.unit(a) - self.unit(b)
        return (difference * difference).sum(axis=1)

    def block(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows start..stop as they are, (m, d) float64, and their norms (m,); an error as in
        `unit`.
        """
        block = self._block(start, stop)
        return block, self._norms(block, np.arange(start, stop))

    def without_direction(self) -> list[tuple[int, str]]:
        """(row, why) of the rows that are all zeros or not finite, ascending; reads every row."""
        found: list[tuple[int, str]] = []

        def look(start: int) -> list[tuple[int, str]]:
            norm = torch.linalg.vector_norm(self._block(start, start + BLOCK), dim=1)
            return [(start + i, why) for i, why in _no_direction(norm)]

        starts = range(0, len(self), BLOCK)
        with progress.bar(desc="embeddings: check", unit="row", total=len(self)) as bar:
            for bad in side_by_side(look, starts, ahead=None):
                found += bad
                bar.update(min(BLOCK, len(self) - bar.n))
        return found

    def name(self, row: int) -> tuple[str, int]:
        """The part that holds a row, and its number there."""
        place = int(self._place(np.array([row]))[0])
        k = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.names[k], place - int(self.starts[k])

    def _place(self, index: np.ndarray) -> np.ndarray:
        return index if self._places is None else self._places[index]

    def _gathered(self, place: np.ndarray) -> torch.Tensor:
        """The rows at places (m,) as they are, (m, d) float64."""
        if len(self.tensors) == 1:
            return self.tensors[0][torch.from_numpy(place)].double()
        source = np.searchsorted(self.starts, place, side="right") - 1
        out = torch.empty(len(place), self.width, dtype=torch.float64)
        for k in np.unique(source):
            here = np.flatnonzero(source == k)
            inside = torch.from_numpy(place[here] - self.starts[k])
            out[torch.from_numpy(here)] = self.tensors[k][inside].double()
        return out

    def _block(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop, at most to the last one, as they are: (m, d) float64."""
        if self._places is not None:
            return self._gathered(self._places[start:stop])
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = max(first + 1, int(np.searchsorted(self.starts, stop)))
        parts = [
            self.tensors[k][
                max(0, start - int(self.starts[k])) : max(0, stop - int(self.starts[k]))
            ].double()
            for k in range(first, min(last, len(self.tensors)))
        ]
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _norms(self, rows: torch.Tensor, index: np.ndarray) -> torch.Tensor:
        norm = torch.linalg.vector_norm(rows, dim=1)
        for i, why in _no_direction(norm):
            part, row = self.name(int(index[i]))
            raise EmbeddingsError(f"{part}: row {row} is {why}")
        return norm

    def unit32(self, index: np.ndarray, inverse: np.ndarray) -> torch.Tensor:
        """Rows `index` (m,) times `inverse` (m,), one over their norms: (m, d) float32 of unit
        norm.
        """
        out, index = None, self._place(index)
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


def as_rows(embeddings) -> Rows:
    """Rows as they are, anything else as `Rows` takes it."""
    return embeddings if isinstance(embeddings, Rows) else Rows(embeddings)


def _no_direction(norm: torch.Tensor) -> Iterator[tuple[int, str]]:
    """(which, why) of the norms (m,) of rows that are all zeros or not finite."""
    for i in (~(norm > 0) | ~norm.isfinite()).nonzero()[:, 0].tolist():
        yield i, "all zeros" if norm[i] == 0 else "not finite (NaN or infinity)"


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
