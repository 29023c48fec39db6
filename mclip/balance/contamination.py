"""Find training pictures that show a picture of an evaluation set, by a teacher's embeddings.

    mclip check SHARDS --against cifar10 --teacher ViT-B-32/openai --threshold 0.05 --list found.csv

A training picture is contaminated when its embedding is at most a threshold from that of a test
picture. The search is the exact one of `mclip.balance`, over both sides at once: pairs of one side
are never measured.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from mclip.balance import links
from mclip.balance.prepared import prepare
from mclip.data.evalsets import Split, batches, read_split
from mclip.data.stores.balance import convert
from mclip.data.stores.embeddings import EmbeddingsError
from mclip.data.stores.rows import Rows

COLUMNS = ["key", "set", "picture", "distance"]


class Nearest(NamedTuple):
    """The rows that have another near them.

    Parameters
    ----------
    row : ndarray of int64, shape (m,)
        Numbers of rows, ascending.
    other : ndarray of int64, shape (m,)
        The nearest of the others to each, of equally near ones the first.
    square : ndarray of float64, shape (m,)
        Their squared L2 distance, of unit rows.
    """

    row: np.ndarray
    other: np.ndarray
    square: np.ndarray


def nearest(
    embeddings, others: Sequence, *, threshold: float, metric: str, device: str | None = None
) -> list[Nearest]:
    """Find the rows that have a row of another set within a threshold, and the nearest of each set.

    Parameters
    ----------
    embeddings : array_like or list of path
        Floats of shape (n, d), as `mclip.balance.balance` takes them.
    others : sequence of array_like
        The other sets: floats of shape (m, d), one or more rows each.
    threshold : float
        Largest distance, in the unit of `metric`.
    metric : {"l2", "sql2", "cosine"}
        Distance of unit-norm rows.
    device : str, optional
        Where the matrix products are computed; by default on a GPU if there is one.

    Returns
    -------
    list of Nearest
        One for each of the other sets.

    Raises
    ------
    BalanceError, EmbeddingsError
        As `mclip.balance.balance` raises.

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance.contamination import nearest
    >>> rows, others = np.eye(3), np.array([[0.0, 1.0, 0.1], [0.0, 1.0, 0.0]])
    >>> (found,) = nearest(rows, [others], threshold=0.07, metric="sql2")
    >>> found.row.tolist(), found.other.tolist(), found.square.tolist()
    ([1], [1], [0.0])
    """
    limit = convert(threshold, metric)["sql2"]
    sizes = [len(rows) for rows in others]
    group = np.repeat(np.arange(len(others)), sizes)  # the set of each other row
    with tempfile.TemporaryDirectory() as folder:
        files = _files(embeddings, Path(folder, "embeddings.npy"))
        n = len(Rows(files))
        for i, rows in enumerate(others):
            files += _files(np.asarray(rows), Path(folder, f"{i}.npy"))
        # all sets as one: a link from one of the first n rows to a later one is what is wanted
        prepared = prepare(Rows(files), device=device)
        least = np.full(len(others) * n, np.inf)  # for each set and row
        closest = np.full(len(least), np.iinfo(np.int64).max)

        def wanted(a: np.ndarray, b: np.ndarray, lower: np.ndarray) -> np.ndarray:
            row, other = np.minimum(a, b), np.maximum(a, b) - n
            across = (row < n) & (other >= 0)
            place = group[other[across]] * n + row[across]
            across[across] = lower[across] <= least[place]
            return across

        def found(a: np.ndarray, b: np.ndarray, square: np.ndarray) -> None:
            row, other = np.minimum(a, b), np.maximum(a, b) - n
            place = group[other] * n + row
            order = np.lexsort((other, square, place))
            first = order[np.unique(place[order], return_index=True)[1]]  # the nearest of each
            place, other, square = place[first], other[first], square[first]
            better = (square < least[place]) | ((square == least[place]) & (other < closest[place]))
            least[place[better]], closest[place[better]] = square[better], other[better]

        links.search(
            prepared,
            limit,
            wanted,
            found,  # type: ignore[arg-type]
            squares=True,
            desc="contamination",
        )
    out, starts = [], np.cumsum([0, *sizes])
    for i, start in enumerate(starts[:-1]):
        own = slice(i * n, (i + 1) * n)
        row = np.flatnonzero(np.isfinite(least[own]))
        out.append(Nearest(row, closest[own][row] - start, least[own][row]))
    return out


def contaminated(
    embeddings,
    keys,
    sets: Mapping[str, tuple[list[str], np.ndarray]],
    *,
    threshold: float,
    metric: str,
) -> pd.DataFrame:
    """List the training pictures that have a picture of an evaluation set near them.

    Parameters
    ----------
    embeddings, keys : of the training pictures
        As `mclip.balance.balance` takes them.
    sets : mapping of str to (list of str, ndarray of float)
        Of each evaluation set its pictures' keys and embeddings, as `embed_set` returns them.
    threshold : float
        Largest distance, in the unit of `metric`.
    metric : {"l2", "sql2", "cosine"}
        Distance of unit-norm rows.

    Returns
    -------
    DataFrame
        A row for each such picture and set, by set and in the order of the keys given: key, set,
        picture (the key of the nearest one in the set), distance (in the unit of `metric`).

    Examples
    --------
    >>> import numpy as np
    >>> from mclip.balance.contamination import contaminated
    >>> sets = {"mine": (["test/0"], np.array([[0.0, 1.0, 0.0]]))}
    >>> found = contaminated(np.eye(3), ["a", "b", "c"], sets, threshold=0.07, metric="sql2")
    >>> found.to_dict("records")
    [{'key': 'b', 'set': 'mine', 'picture': 'test/0', 'distance': 0.0}]
    """
    keys = np.asarray(keys).astype(str)
    sets = {name: (names, rows) for name, (names, rows) in sets.items() if len(rows)}
    if not sets:
        return pd.DataFrame(columns=COLUMNS)
    rows = [rows for _, rows in sets.values()]
    tables = []
    for (name, (names, _)), near in zip(
        sets.items(), nearest(embeddings, rows, threshold=threshold, metric=metric), strict=True
    ):
        square = near.square
        distance = {"l2": np.sqrt(square), "sql2": square, "cosine": square / 2}[metric]
        columns = keys[near.row], name, np.asarray(names)[near.other], distance
        tables.append(pd.DataFrame(dict(zip(COLUMNS, columns, strict=True))))
    return pd.concat(tables, ignore_index=True)


def embed_set(
    model: str,
    folder: str | Path,
    *,
    batch_size: int = 64,
    precision: str = "auto",
    workers: int = 0,
) -> tuple[list[str], np.ndarray]:
    """Embed the test pictures of an evaluation set, as `mclip.embed` embeds pairs.

    Parameters
    ----------
    model : str
        open_clip model string.
    folder : path
        Of a set in CLIP_benchmark's layout. Only its test split is read.
    batch_size : int, default 64
        Pictures at a time.
    precision : {"auto", "fp32", "bf16"}, default "auto"
        Of the image encoder.
    workers : int, default 0
        Processes that decode; 0 is this one.

    Returns
    -------
    keys : list of str
        Names of the m pictures that can be read.
    rows : ndarray of float16, shape (m, d)
        Unit-norm embeddings.

    Raises
    ------
    EvalError
        If the folder is no such set.
    """
    import torch  # here, with mclip.models: who only searches does without

    from mclip import models

    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, _, preprocess, _ = models.create(model, device=device)
    split: Split = read_split(folder, answer=None)
    kept: list[int] = []

    def pictures():
        for indices, readable, _ in batches(split, preprocess, batch_size, workers):
            kept.extend(indices)
            if readable is not None:
                yield readable

    rows = models.encode_images(models.for_inference(teacher), pictures(), precision=precision)
    return [split.keys[i] for i in kept], rows.numpy().astype(np.float16)


def _files(embeddings, path: Path) -> list:
    """Embeddings as a list of files; an array is written to `path`."""
    if isinstance(embeddings, str | Path):
        return [embeddings]
    if isinstance(embeddings, list | tuple) and all(isinstance(x, str | Path) for x in embeddings):
        return list(embeddings)
    array = np.asanyarray(embeddings)
    if not len(array):
        raise EmbeddingsError("embeddings: there are no rows")
    np.save(path, array)
    return [path]
