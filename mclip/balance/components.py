"""Connected components of the links up to a distance, by threads or by several workers.

A killed search continues from its state file.
"""

import hashlib
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mclip.balance import links
from mclip.balance.prepared import PARTS, Prepared, load, prepare, save
from mclip.balance.unionfind import Sets
from mclip.data.stores.rows import Rows
from mclip.system import progress
from mclip.system.files import whole
from mclip.system.workers import is_alone, run_tasks, worker_device

SAVE_EVERY = 30  # seconds


class StateError(ValueError):
    """The file of an earlier run can't be read; the message names it."""


class How(NamedTuple):
    """What changes time and memory of a search and never its result: arguments of
    `mclip.balance.balance`.
    """

    tile: int | None = None
    device: str | None = None
    workers: int = 1
    backend: str = "processes"
    scratch: str | Path | None = None

    @property
    def alone(self) -> bool:
        """Does this process search by itself?"""
        return is_alone(self.workers, self.backend)

    def prepare(self, rows: Rows) -> Prepared:
        """The rows, in tiles enough for all workers to share."""
        return prepare(rows, tile=self.tile, parts=PARTS * max(1, self.workers), device=self.device)


def components(
    rows: Rows, limit: float, how: How, *, state: str | Path | None = None
) -> np.ndarray:
    """(n,) label of each row's component in the graph of squared distances <= limit: its lowest
    row. state : see `mclip.balance.balance`.
    """
    prepared = how.prepare(rows)
    sets = Sets(len(rows))
    known = _State(state, prepared, limit, sets)
    if how.alone:
        _search(prepared, limit, sets, tiles=known.todo, done=known.done)
    else:
        for lot, roots in spread(_search_lot, prepared, limit, known.todo, how, desc="balance"):
            moved = np.flatnonzero(roots != np.arange(len(roots)))
            sets.join(moved, roots[moved])
            for number in lot:
                known.done(number)
    known.forget()
    return sets.roots()


def _search(prepared: Prepared, limit: float, sets: Sets, **options) -> None:
    links.search(
        prepared,
        limit,
        lambda a, b, _: ~sets.joined(a, b),
        lambda a, b, _: sets.join(a, b),
        labels=sets.find,
        **options,
    )


def _search_lot(
    files: list[str], folder: str, limit: float, lot: list[int]
) -> tuple[list[int], np.ndarray]:
    """Each row's root after joining this worker's links: the same information as the links."""
    prepared = given(files, folder)
    sets = Sets(len(prepared.order))
    _search(prepared, limit, sets, tiles=lot, desc=None)
    return lot, sets.roots()


# --- many workers ---------------------------------------------------------------------------------


def spread(
    search_lot: Callable,
    prepared: Prepared,
    limit: float,
    tiles: Sequence[int],
    how: How,
    *,
    desc: str,
) -> Iterator[tuple[list[int], Any]]:
    """Run search_lot(files, folder, limit, lot) by workers, `tiles` split into lots; yields as
    done.

    search_lot : a module's function, of what `given` makes of its first two arguments; it returns
        the lot and more.
    """
    if how.scratch is not None:
        Path(how.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".balance-", dir=how.scratch) as folder:
        save(prepared, folder)
        files = list(prepared.rows.names)
        if not prepared.rows.in_files:
            files = [f"{folder}/rows.npy"]
            np.save(files[0], prepared.rows.arrays[0])
        np.save(f"{folder}/skip.npy", prepared.rows.skip)
        # a tile is compared with all later ones: dealt out like this, lots cost about the same
        parts = 8 * how.workers
        tasks = [
            (files, folder, limit, lot) for k in range(parts) if (lot := list(tiles[k::parts]))
        ]
        with progress.bar(desc=desc, unit="tile", total=len(tiles)) as bar:
            for found in run_tasks(search_lot, tasks, workers=how.workers, backend=how.backend):
                yield found
                bar.update(len(found[0]))


def given(files: list[str], folder: str) -> Prepared:
    """The arguments that `spread` hands to a worker."""
    worker_device()
    return load(folder, Rows(files, np.load(f"{folder}/skip.npy", allow_pickle=False)))


class _State:
    """Finished tiles and the sets found so far, saved about twice a minute."""

    def __init__(self, path: str | Path | None, prepared: Prepared, limit: float, sets: Sets):
        self.path, self.sets, self.saved = path and Path(path), sets, time.monotonic()
        self.finished = np.zeros(prepared.count, bool)
        about = hashlib.sha256(np.array([limit, prepared.count, prepared.rows.width]).tobytes())
        about.update(
            prepared.order.tobytes()
        )  # other rows are in another order, and have other norms
        about.update(prepared.inverse.tobytes())
        self.about = np.frombuffer(about.digest(), np.uint8)
        if self.path and self.path.exists():
            try:
                with np.load(self.path, allow_pickle=False) as kept:
                    if np.array_equal(kept["about"], self.about):
                        self.finished, sets.parent = kept["finished"], kept["parent"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as err:
                raise StateError(
                    f"{self.path}: not the state of a balancing run; delete it ({err})"
                ) from None

    @property
    def todo(self) -> list[int]:
        return np.flatnonzero(~self.finished).tolist()

    def done(self, tile: int) -> None:
        self.finished[tile] = True
        if self.path and time.monotonic() - self.saved > SAVE_EVERY:
            with whole(self.path) as part, open(part, "wb") as file:
                np.savez(file, about=self.about, finished=self.finished, parent=self.sets.parent)
            self.saved = time.monotonic()

    def forget(self) -> None:
        if self.path:
            self.path.unlink(missing_ok=True)
