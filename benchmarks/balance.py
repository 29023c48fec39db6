"""Time and peak extra memory of finding the sets of near-duplicates, ours beside what else is used,
in one run.

    python benchmarks/balance.py                                  # 25k and 50k x 1280, spectrum 1/i
    python benchmarks/balance.py --rows 200000 --peers links products semdedup --exponent 0.5
    python benchmarks/balance.py --data sphere --threshold 1.2    # the adversary: rules out nothing
    python benchmarks/balance.py --data data/embeddings/large --threshold 0.15
    # a tenth of the queries
    python benchmarks/balance.py --rows 200000 --peers links range_search --share 0.1

Peers: `links` is mclip.balance. `products` multiplies blocks of all rows in float32 and joins what
is near enough: the arithmetic that CLIP-CID describes. `range_search` is faiss's flat index.
`semdedup` is SemDeDup's rule (k-means with sqrt(n) clusters, all pairs within a cluster; not
exact). All but semdedup are exact; recall counts removals.

Rows are made up: semantic centres with variances falling as 1/i^exponent, and 45 % near-duplicates
of originals whose popularity is Pareto-distributed. Each case runs in a process of its own; memory
is the growth of its anonymous pages (RssAnon, asked for every 20 ms, so Linux only): the
memory-mapped fp16 input is not among them. CPU time is that of all threads; with OMP_NUM_THREADS=1
none waits by spinning, and it compares peers on a machine that does other work, too.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

PEERS = ("links", "products", "range_search", "semdedup")


def rows(kind: str, n: int, d: int, exponent: float, seed: int = 0) -> np.ndarray:
    """(n, d) fp16, unit norm."""
    if Path(kind).is_dir():
        from mclip import embed

        return np.ascontiguousarray(embed.load(kind).image[:n])
    rng = np.random.default_rng(seed)
    if kind == "sphere":
        x = rng.standard_normal((n, d), dtype=np.float32)
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    scale = np.arange(1, d + 1, dtype=np.float32) ** np.float32(-exponent / 2)
    scale /= np.linalg.norm(scale)
    centres = rng.standard_normal((max(1, n // 200), d), dtype=np.float32) * scale
    originals = int(0.55 * n)
    out = np.empty((n, d), np.float16)
    for start in range(0, originals, 10_000):
        m = min(10_000, originals - start)
        x = (
            0.8 * centres[rng.integers(len(centres), size=m)]
            + 0.6 * rng.standard_normal((m, d), np.float32) * scale
        )
        out[start : start + m] = x / np.linalg.norm(x, axis=1, keepdims=True)
    popularity = rng.pareto(1.5, originals) + 0.01
    source = rng.choice(originals, size=n - originals, p=popularity / popularity.sum())
    for start in range(0, n - originals, 10_000):
        of = source[start : start + 10_000]
        noise = rng.standard_normal((len(of), d), np.float32)
        noise *= rng.uniform(0.02, 0.24, (len(of), 1)).astype(np.float32) / np.linalg.norm(
            noise, axis=1, keepdims=True
        )
        x = out[of].astype(np.float32) + noise
        out[originals + start : originals + start + len(of)] = x / np.linalg.norm(
            x, axis=1, keepdims=True
        )
    return out[rng.permutation(n)]


def products(x: np.ndarray, limit: float, block: int = 4096) -> np.ndarray:
    from mclip.balance.unionfind import Sets

    unit = torch.from_numpy(x).float()
    unit /= unit.norm(dim=1, keepdim=True)
    sets = Sets(len(x))
    for i in range(0, len(x), block):
        for j in range(i, len(x), block):
            a, b = (unit[i : i + block] @ unit[j : j + block].T >= 1 - limit / 2).nonzero(
                as_tuple=True
            )
            sets.join(a.numpy() + i, b.numpy() + j)
    return sets.roots()


LEFT_OUT = {
    "seconds": 0.0,
    "cpu": 0.0,
}  # by `--share`: what the queries that are not asked would have taken


def range_search(x: np.ndarray, limit: float, block: int = 4096, share: float = 1.0) -> np.ndarray:
    """share : of the blocks of queries that are asked, spread over the rows, each of all rows; the
    others count as long.
    """
    import faiss

    from mclip.balance.unionfind import Sets

    unit = x.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    index, sets = faiss.IndexFlatL2(x.shape[1]), Sets(len(x))
    index.add(unit)
    blocks = np.arange(0, len(x), block)
    asked = blocks[:: max(1, round(1 / share))]
    start, busy = time.perf_counter(), time.process_time()
    for i in asked:
        limits, _, found = index.range_search(unit[i : i + block], limit)
        sets.join(
            np.repeat(np.arange(i, i + len(limits) - 1), np.diff(limits.astype(np.int64))), found
        )
    more = len(x) / np.minimum(block, len(x) - asked).sum() - 1
    LEFT_OUT.update(
        seconds=more * (time.perf_counter() - start), cpu=more * (time.process_time() - busy)
    )
    return sets.roots()


def semdedup(x: np.ndarray, limit: float) -> np.ndarray:
    """A row is removed when a row before it in its cluster, farther from the centroid, is near; as
    labels: its own set for a kept row, set 0 for a removed one (only the count of removals means
    anything).
    """
    import faiss

    unit = x.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    kmeans = faiss.Kmeans(
        x.shape[1],
        round(len(x) ** 0.5),
        niter=10,
        spherical=True,
        seed=0,
        max_points_per_centroid=128,
    )
    kmeans.train(unit)
    near, cluster = kmeans.index.search(unit, 1)
    removed = np.zeros(len(x), bool)
    for c in np.unique(cluster):
        members = np.flatnonzero(cluster[:, 0] == c)
        members = members[np.argsort(near[members, 0], kind="stable")]
        part = torch.from_numpy(unit[members])
        hit = (part @ part.T >= 1 - limit / 2).triu_(1)
        removed[members[hit.any(0).numpy()]] = True
    return np.where(removed, 0, np.arange(1, len(x) + 1))


def ours(x: np.ndarray, limit: float) -> np.ndarray:
    from mclip.balance import balance

    return balance(x, threshold=limit, metric="sql2").set_id


def measure(peer: str, file: str, limit: float, share: float) -> dict[str, float]:
    run = {
        "links": ours,
        "products": products,
        "semdedup": semdedup,
        "range_search": functools.partial(range_search, share=share),
    }[peer]
    small = np.load(file, mmap_mode="r")[:512].copy()
    run(small, limit)  # imports and warm-up
    x = np.load(file, mmap_mode="r")
    x.max()  # read from disk before the clock starts
    before, peak, over = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, busy = time.perf_counter(), time.process_time()
    labels = run(x, limit)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    over.set()
    watcher.join()
    removed = int((labels == 0).sum()) if peer == "semdedup" else len(x) - len(np.unique(labels))
    if peer == "range_search":
        seconds, busy = seconds + LEFT_OUT["seconds"], busy + LEFT_OUT["cpu"]
    return {"seconds": seconds, "cpu": busy, "mb": max(0.0, peak[0] - before), "removed": removed}


def anonymous() -> float:
    """MB of this process's memory that is no file's."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[25_000, 50_000])
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument(
        "--data", default="clumps", help="clumps, sphere, or a folder of embeddings"
    )
    parser.add_argument("--threshold", type=float, default=0.07, help="squared L2")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument(
        "--repeats", type=int, default=1, help="processes a case, by turns; the median counts"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="of range_search's queries asked; its time is counted up, its removals are too few",
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.threshold, args.share)))
        return
    print(
        f"{'rows':>9}  {'peer':<13} {'s':>8} {'CPU s':>8} {'extra MB':>9} {'removed':>9}   "
        "time and CPU time against links, recall"
    )
    for n in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/rows.npy"
            np.save(file, rows(args.data, n, args.width, args.exponent))
            found: dict[str, list[dict]] = {peer: [] for peer in args.peers}
            for _ in range(args.repeats):
                for peer in args.peers:
                    command = [
                        sys.executable,
                        __file__,
                        "--one",
                        peer,
                        file,
                        "--threshold",
                        str(args.threshold),
                        "--share",
                        str(args.share),
                    ]
                    done = subprocess.run(
                        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                    )
                    found[peer].append(json.loads(done.stdout))
        median = {
            peer: {k: float(np.median([one[k] for one in of])) for k in of[0]}
            for peer, of in found.items()
        }
        for peer, one in median.items():
            against = median.get("links", one)
            print(
                f"{n:>9}  {peer:<13} {one['seconds']:>8.2f} {one['cpu']:>8.2f} {one['mb']:>9.0f} "
                f"{one['removed']:>9.0f}   {one['seconds'] / against['seconds']:.2f}, "
                f"{one['cpu'] / against['cpu']:.2f}, "
                f"{one['removed'] / max(1, against['removed']):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
