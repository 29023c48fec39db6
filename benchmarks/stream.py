"""What a worker that streams shards needs to open one, as the set grows: seconds, memory.

    python benchmarks/stream.py --pairs 100000 1000000 10000000

A set of so many pairs in shards of 10,000: what `balance` and `cluster` wrote of all of them, and
the embeddings (1,280 wide, fp16) of a few shards, as only those are opened. Each case in a process
of its own: `tables` makes the lookups of kept pairs and labels (once a set), `shard` opens shards
one after the other; the median counts. `whole` is what held sets do, tables and embeddings read in
full, where all shards' embeddings are there (--whole). Memory is the peak of the process beyond
what it had after its imports, without the pages of mapped files.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

SHARD, WIDTH, CENTRES, OPENED = 10_000, 1280, 1000, 12


def keys(start: int, stop: int) -> np.ndarray:
    return np.char.zfill(np.arange(start, stop).astype(str), 12)


def write(root: Path, n: int, shards: int) -> None:
    import pandas as pd

    from mclip.data.stores import balance as balance_store
    from mclip.data.stores import clusters as cluster_store
    from mclip.data.stores import embeddings as embedding_store

    rng = np.random.default_rng(0)
    names, keep = keys(0, n), rng.random(n) < 0.563
    balance_store.write(
        root / "balance",
        balance_store.Balance(np.arange(n), keep, np.zeros(n), names, 0.07, "sql2"),
    )
    centres = rng.standard_normal((CENTRES, WIDTH)).astype(np.float32)
    labels = rng.integers(0, CENTRES, int(keep.sum()))
    similarity = np.zeros(len(labels), np.float32)
    cluster_store.write(
        root / "clusters",
        cluster_store.Clusters(centres, labels, similarity, np.zeros(1), names[keep]),
    )
    folder = root / "embeddings" / "t"
    for part in embedding_store.PARTS:
        (folder / part).mkdir(parents=True)
    for i in range(shards):
        for part in ("img_emb", "text_emb"):
            rows = rng.standard_normal((SHARD, WIDTH)).astype(np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            np.save(embedding_store.part_file(folder, part, i), rows.astype(np.float16))
        table = pd.DataFrame({"key": names[i * SHARD : (i + 1) * SHARD], "caption": "c"})
        table.to_parquet(embedding_store.part_file(folder, "metadata", i))


def anonymous() -> int:
    """Bytes of memory that no file holds."""
    return next(
        int(line.split()[1]) * 1024
        for line in open("/proc/self/status")
        if line.startswith("RssAnon")
    )


class Peak:
    def __enter__(self):
        self.most, self.before, self.stop = 0, anonymous(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop.wait(0.01):
            self.most = max(self.most, anonymous() - self.before)

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def case(root: Path, what: str) -> dict:
    from mclip.data import shards
    from mclip.distill import targets
    from mclip.distill.pairs import TrainingSet, open_pairs

    folders = {name: str(root / name) for name in ("balance", "clusters", "embeddings", "cache")}
    spec = TrainingSet("kept", teacher="t", **folders)
    times = []
    with Peak() as peak:
        if what == "whole":
            from mclip.data.stores import balance as balance_store
            from mclip.data.stores import clusters as cluster_store
            from mclip.data.stores import embeddings as embedding_store

            start = time.perf_counter()
            embeddings = embedding_store.load(Path(spec.embeddings) / "t")
            held = balance_store.read(spec.balance), cluster_store.read(spec.clusters), embeddings
            times.append(time.perf_counter() - start)
            del held, embeddings
        else:
            start = time.perf_counter()
            pairs = open_pairs(spec)
            pairs.open_tables()
            if what == "tables":
                times.append(time.perf_counter() - start)
            else:
                for i in range(OPENED):
                    of = keys(i * SHARD, (i + 1) * SHARD).tolist()
                    samples = [shards.Sample(key, b"", "jpg", "c", {}) for key in of]
                    start = time.perf_counter()
                    side, _ = targets.shard_side(pairs, i, samples)
                    times.append(time.perf_counter() - start)
                    assert (
                        set(side.arrays) == {"label", "teacher_image", "teacher_text"}
                        and len(side) > SHARD / 2
                    )
    return {"s": statistics.median(times), "MB": peak.most / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[120_000, 1_000_000, 10_000_000])
    parser.add_argument(
        "--whole", type=int, default=120_000, help="up to so many pairs also read in full"
    )
    parser.add_argument("--one", nargs=2, metavar=("ROOT", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(case(Path(args.one[0]), args.one[1])))
    print(f"{'pairs':>12}  {'case':<8}{'s':>10}{'MB':>10}")
    for n in args.pairs:
        with tempfile.TemporaryDirectory() as root:
            whole = n <= args.whole
            write(Path(root), n, n // SHARD if whole else OPENED)
            for what in ("tables", "shard", *(["whole"] if whole else [])):
                command = [sys.executable, __file__, "--one", root, what]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                print(f"{n:>12,}  {what:<8}{found['s']:>10.3f}{found['MB']:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
