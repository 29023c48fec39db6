"""Image semantic balance (CLIP-CID, arXiv 2408.09441; papers.md 1.1): drop images that repeat another.

Two images whose embeddings are at most a threshold apart are linked; linked images, also by chains, are one
set (single linkage); of each set the image nearest to the set's centroid is kept, ties by the lowest key.

    python -m mclip.balance EMBEDDINGS_DIR OUT_DIR --threshold 0.07 --metric sql2  # any clip-retrieval folder

    result = balance(embeddings, keys, threshold=0.07, metric="sql2")
    result.keep.sum(), result.removed_fraction

The paper doesn't say which distance its 0.07 is, so the metric is explicit, on unit-normalised rows:
"l2" = |x - y|, "sql2" = |x - y|^2 (faiss's convention), "cosine" = 1 - x.y. They order pairs alike and
convert exactly: sql2 = l2^2 = 2 cosine.

How: every block of rows against every other, as one float32 matrix product; pairs that float32 can't decide
are measured again in float64, so the graph is that of the float64 distances. Memory is a few blocks and a few
numbers a row, whatever the number of links. O(n^2 d): 20,000 x 256 takes seconds, millions want a GPU.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from mclip import progress
from mclip.files import whole
from mclip.rows import Rows, RowsError, as_keys, check_keys, read_folder

METRICS = ("l2", "sql2", "cosine")
CHUNK = 2048  # rows a block
LINKS = 2_000_000  # links collected before they are merged into what is known


class BalanceError(ValueError):
    """An option out of range, or a result that is missing; the message names the parameter or the file."""


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
        return (f"{n:,} images, {kept:,} kept, {n - kept:,} removed ({100 * self.removed_fraction:.1f} %); "
                f"{int((sizes > 1).sum()):,} sets of several images, the largest of {sizes.max():,}; "
                f"threshold {units}")


def balance(embeddings, keys: Sequence | np.ndarray | None = None, *, threshold: float, metric: str,
            chunk: int = CHUNK, device: str | None = None) -> Balance:
    """Sets of near-duplicates and the representative of each; see the module's docstring.

    Parameters
    ----------
    embeddings : (n, d) float array or memmap, or a list of .npy files; rows are normalised here
    keys : n different strings or integers; None: the row's number
    threshold : largest distance that links two images, in `metric`
    metric : "l2" | "sql2" | "cosine"
    chunk : rows a block; changes memory and speed, never the result
    device : of the matrix products; None: a GPU if there is one

    Notes
    -----
    Neither the sets, their numbers nor the representatives depend on the order of the rows.
    """
    limit = convert(threshold, metric)["sql2"]
    rows = Rows(embeddings)
    keys = check_keys(keys, len(rows))
    label = _components(rows, limit, chunk, device)
    order = np.argsort(keys, kind="stable")
    # sets are numbered by their lowest key: by first appearance in key order
    _, first, number = np.unique(label[order], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    set_id = np.empty(len(rows), np.int64)
    set_id[order] = rank[number]
    distance = _centroid_distance(rows, set_id, order, chunk)
    keep = _nearest(distance, set_id, order)
    return Balance(set_id, keep, distance, keys, float(threshold), metric)


def removed_curve(embeddings, thresholds: Sequence[float], *, metric: str, chunk: int = CHUNK,
                  device: str | None = None) -> np.ndarray:
    """Fraction of the images that `balance` removes at each threshold, (len(thresholds),): one pass for all.

    A minimum spanning forest of the links up to the largest threshold answers every smaller one: at t there
    are as many sets as rows minus the forest's edges of length <= t, and all but one of each set is removed.
    """
    if len(thresholds) == 0:
        return np.empty(0)
    limits = [convert(t, metric)["sql2"] for t in thresholds]
    _, _, square = spanning_forest(embeddings, max(thresholds), metric=metric, chunk=chunk, device=device)
    return np.searchsorted(np.sort(square), limits, side="right") / len(Rows(embeddings))


def spanning_forest(embeddings, threshold: float, *, metric: str, chunk: int = CHUNK,
                    device: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges (i, j, squared L2 distance) of a minimum spanning forest of all links up to `threshold`.

    Built block by block: an edge that is not in the forest of the edges seen so far is in no later one
    either, so at most n - 1 edges and one batch of new ones are held.
    """
    limit = convert(threshold, metric)["sql2"]
    rows = Rows(embeddings)
    n = len(rows)
    # An edge between rows that shorter edges connect already is in no minimum spanning forest. To drop most of
    # those at once, the rows' sets at a few thresholds on the way are kept beside the forest.
    steps = limit * np.arange(1, 16) / 16
    sets = np.tile(np.arange(n), (len(steps) + 1, 1))  # sets[0]: every row by itself
    batch, count = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))], 0
    for i, j, inner in _block_products(rows, chunk, device, torch.float64, "balance: curve"):
        near = np.flatnonzero(inner >= 1 - limit / 2)
        square = np.maximum(2 - 2 * inner.ravel()[near], 0)
        a, b = near // inner.shape[1] + i, near % inner.shape[1] + j
        level = np.searchsorted(steps, square, side="left")  # steps[level - 1] < square
        new = (a < b) & (sets[level, a] != sets[level, b])
        batch.append((a[new], b[new], square[new]))
        count += int(new.sum())
        if count > LINKS:
            forest = _forest(batch, n)
            batch, count = [forest], 0
            for k, step in enumerate(steps):
                short = forest[2] <= step
                sets[k + 1] = _merge(np.arange(n), forest[0][short], forest[1][short])
    return _forest(batch, n)


def convert(threshold: float, metric: str) -> dict[str, float]:
    """A threshold in all three metrics, {"l2": .., "sql2": .., "cosine": ..}; exact on unit-norm rows."""
    if metric not in METRICS:
        raise BalanceError(f"metric: expected one of {', '.join(METRICS)}, found {metric!r}")
    largest = 4.0 if metric == "sql2" else 2.0
    if not 0 < threshold <= largest:
        raise BalanceError(f"threshold: with metric {metric} it lies above 0 and is at most {largest:g} "
                           f"(unit vectors are never farther apart), found {threshold}")
    square = {"l2": threshold * threshold, "sql2": threshold, "cosine": 2 * threshold}[metric]
    units = {"l2": square**0.5, "sql2": square, "cosine": square / 2}
    return {name: float(value) for name, value in (units | {metric: threshold}).items()}


def write(folder: str | Path, result: Balance) -> None:
    """FOLDER/balance.parquet: key, set_id, keep, centroid_distance. Where all keys are DataComp uids (32 hex
    digits) also the kept ones as FOLDER/kept_uids.npy, sorted `u8,u8`: what DataComp's resharder reads."""
    table = pa.table({"key": result.keys, "set_id": result.set_id, "keep": result.keep,
                      "centroid_distance": result.centroid_distance})
    about = {"threshold": result.threshold, "metric": result.metric}
    with whole(Path(folder) / "balance.parquet") as part:
        pq.write_table(table.replace_schema_metadata({"mclip.balance": json.dumps(about)}), part)
    uids = Path(folder) / "kept_uids.npy"
    if result.keys.dtype.kind == "U" and all(re.fullmatch("[0-9a-f]{32}", key) for key in result.keys):
        kept = [(int(key[:16], 16), int(key[16:], 16)) for key in result.keys[result.keep]]
        with whole(uids) as part, open(part, "wb") as file:
            np.save(file, np.sort(np.array(kept, dtype="u8,u8")), allow_pickle=False)
    else:
        uids.unlink(missing_ok=True)


def read(folder: str | Path) -> Balance:
    """What `write` wrote; BalanceError in one line where it is missing or something else."""
    path = Path(folder) / "balance.parquet"
    if not path.is_file():
        raise BalanceError(f"{path} is missing: run `dvc repro balance` first")
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[b"mclip.balance"])
        columns = [table[name].to_numpy() for name in ("set_id", "keep", "centroid_distance", "key")]
    except (pa.ArrowException, KeyError, ValueError) as err:
        raise BalanceError(f"{path} is no file of mclip.balance: run `dvc repro -f balance` ({err})") from None
    return Balance(*columns[:3], as_keys(columns[3]), **about)


def _block_products(rows: Rows, chunk: int, device: str | None, dtype: torch.dtype,
                    desc: str) -> Iterator[tuple[int, int, np.ndarray]]:
    """(first row i, first row j, inner products of the blocks' unit rows) for all pairs of blocks i <= j."""
    if chunk < 1:
        raise BalanceError(f"chunk: expected at least 1 row, found {chunk}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    starts = range(0, len(rows), chunk)

    def block(start: int) -> torch.Tensor:
        unit = rows.unit(np.arange(start, min(start + chunk, len(rows))))
        return torch.from_numpy(unit).to(device, dtype)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32: `_components` counts on float32
    bar = progress.bar(desc=desc, unit="block", total=len(starts) * (len(starts) + 1) // 2)
    try:
        for i in starts:
            left = block(i)
            for j in starts[i // chunk:]:
                yield i, j, (left @ (left if i == j else block(j)).T).cpu().numpy()
                bar.update()
    finally:
        bar.close()
        torch.set_float32_matmul_precision(before)


def _components(rows: Rows, limit: float, chunk: int, device: str | None) -> np.ndarray:
    """(n,) label of each row's connected component in the graph of squared distances <= limit."""
    label = np.arange(len(rows))
    cosine = 1 - limit / 2
    # what float32 can be off by: rounding of the rows, and of a sum of d products that is at most 1 in all
    margin = (rows.width + 8) * 2.0**-24
    batch, count = [], 0
    for i, j, inner in _block_products(rows, chunk, device, torch.float32, "balance"):
        near = np.flatnonzero(inner >= np.float32(cosine - margin))
        a, b = near // inner.shape[1] + i, near % inner.shape[1] + j
        sure = inner.ravel()[near] >= cosine + margin
        new = (a < b) & (label[a] != label[b])  # a pair once, and none that is connected already
        sure, unsure = new & sure, new & ~sure
        batch.append((a[sure], b[sure]))
        label, verified = _verify(rows, label, a[unsure], b[unsure], limit)
        batch.append(verified)
        count += len(batch[-1][0]) + len(batch[-2][0])
        if count > LINKS:
            label = _merge(label, *map(np.concatenate, zip(*batch, strict=True)))
            batch, count = [], 0
    return _merge(label, *map(np.concatenate, zip(*batch, strict=True))) if batch else label


def _verify(rows: Rows, label: np.ndarray, a: np.ndarray, b: np.ndarray, limit: float,
            size: int = 8192) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Labels, and links (a, b) still to be merged, of the pairs whose float64 squared distance is <= limit.

    Of many undecided pairs (exact duplicates under a tiny threshold) the first decide most others: after each
    batch what is connected is dropped.
    """
    while True:
        difference = rows.unit(a[:size]) - rows.unit(b[:size])
        good = (difference * difference).sum(axis=1) <= limit
        links = a[:size][good], b[:size][good]
        if len(a) <= size:
            return label, links
        label = _merge(label, *links)
        a, b = a[size:], b[size:]
        new = label[a] != label[b]
        a, b = a[new], b[new]


def _merge(label: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Union-find in one go: labels (n,) in 0..n-1 after linking rows a[k] and b[k]."""
    graph = coo_array((np.ones(len(a), np.int8), (label[a], label[b])), shape=(len(label), len(label)))
    return connected_components(graph, directed=False)[1][label]


def _forest(edges: list[tuple[np.ndarray, ...]], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimum spanning forest of lists of edges (i < j, length), no edge twice."""
    a, b, length = map(np.concatenate, zip(*edges, strict=True))
    order = np.argsort(length, kind="stable")
    a, b, length = a[order], b[order], length[order]
    # ranks for lengths: scipy takes an edge of length 0, an exact duplicate, for no edge
    tree = minimum_spanning_tree(coo_array((np.arange(1, len(a) + 1), (a, b)), shape=(n, n)).tocsr())
    chosen = np.sort(tree.data).astype(np.int64) - 1
    return a[chosen], b[chosen], length[chosen]


def _centroid_distance(rows: Rows, set_id: np.ndarray, order: np.ndarray, chunk: int) -> np.ndarray:
    """(n,) distance of each unit row to the mean of its set; sums run in key order, not the rows'."""
    distance = np.zeros(len(rows))
    size = np.bincount(set_id)
    members = order[np.argsort(set_id[order], kind="stable")]  # by set, then by key
    members = members[size[set_id[members]] > 1]
    _, start = np.unique(set_id[members], return_index=True)
    end = np.append(start[1:], len(members))
    s = 0
    while s < len(start):
        # as many whole sets as fit a block, or one that is larger than a block
        e = max(s + 1, int(np.searchsorted(end, start[s] + chunk, side="right")))
        index = members[start[s]:end[e - 1]]
        if len(index) <= chunk:
            unit, sizes = rows.unit(index), end[s:e] - start[s:e]
            mean = np.add.reduceat(unit, start[s:e] - start[s], axis=0) / sizes[:, None]
            distance[index] = np.linalg.norm(unit - np.repeat(mean, sizes, axis=0), axis=1)
        else:
            parts = [index[k:k + chunk] for k in range(0, len(index), chunk)]
            mean = sum(rows.unit(part).sum(axis=0) for part in parts) / len(index)
            for part in parts:
                distance[part] = np.linalg.norm(rows.unit(part) - mean, axis=1)
        s = e
    return distance


def _nearest(distance: np.ndarray, set_id: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(n,) bool: of each set the row nearest to the centroid, of equally near ones the lowest key.

    Equally near: within 1e-9, far above float64's rounding and far below what an embedding can tell. Two
    members of a set of two are always equally near.
    """
    nearest = np.full(set_id.max() + 1, np.inf)
    np.minimum.at(nearest, set_id, distance)
    ties = order[distance[order] <= nearest[set_id[order]] + 1e-9]
    keep = np.zeros(len(set_id), bool)
    keep[ties[np.unique(set_id[ties], return_index=True)[1]]] = True
    return keep


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mclip.balance", description=__doc__.split("\n")[0])
    parser.add_argument("embeddings", help="folder in clip-retrieval's layout: img_emb/, metadata/")
    parser.add_argument("out", help="folder for balance.parquet (and kept_uids.npy for DataComp uids)")
    parser.add_argument("--threshold", type=float, required=True, help="largest distance that links images")
    parser.add_argument("--metric", choices=METRICS, required=True, help="what the threshold is measured in")
    parser.add_argument("--key", help="metadata column that names a sample (default: uid, key or image_path)")
    args = parser.parse_args(argv)
    try:
        convert(args.threshold, args.metric)
        files, keys = read_folder(args.embeddings, args.key)
        if keys is None:
            print(f"{args.embeddings}/metadata: none; samples are named by row number", file=sys.stderr)
        result = balance(files, keys, threshold=args.threshold, metric=args.metric)
        write(args.out, result)
    except (BalanceError, RowsError) as err:
        print(err, file=sys.stderr)
        return 2
    print(result.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
