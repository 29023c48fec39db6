"""Time and peak extra memory of the tiled losses beside the plain ones and open_clip's ClipLoss, in one run.

    python benchmarks/losses.py                      # b = 1024 .. 8192, d = 512
    python benchmarks/losses.py --sizes 16384 32768 --repeats 3
    python benchmarks/losses.py --sizes 4096 --centres 100000 --peers "plain cluster" "tiled cluster"

Each case runs in a process of its own; time is the median over repeats of forward and backward, interleaved between
the peers by turns; memory is the growth of the process's peak resident size over what its inputs take.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

PEERS = ["open_clip ClipLoss", "plain clip", "tiled clip", "plain affinity", "tiled affinity", "plain cluster",
         "tiled cluster"]


def make(peer: str, b: int, d: int, centres: int):
    from mclip import losses
    from mclip.kernels import tiled

    def rows_of(n: int, width: int) -> torch.Tensor:
        return F.normalize(torch.randn(n, width), dim=-1)

    def rows(width: int) -> torch.Tensor:
        return rows_of(b, width)

    image, text = rows(d).requires_grad_(), rows(d).requires_grad_()
    scale = torch.tensor(50.0, requires_grad=True)
    teachers = [(rows(768), rows(768), 100.0) for _ in range(2)] if "affinity" in peer else []
    if peer == "open_clip ClipLoss":
        from open_clip.loss import ClipLoss

        loss = ClipLoss()
        return lambda: loss(image, text, scale).backward()
    if "cluster" in peer:
        from mclip.kernels import clusters

        loss = losses.ClusterLoss(rows_of(centres, d), 0.1)
        loss.weight.grad = torch.zeros_like(loss.weight)  # any training has it
        teacher, labels = rows(d), torch.randint(centres, (b,))
        if peer == "plain cluster":
            return lambda: loss(image, teacher, labels).backward()
        return lambda: clusters.cluster_loss(loss, image, teacher, labels).backward()
    module = tiled if peer.startswith("tiled") else losses
    if teachers:
        return lambda: module.affinity_loss(image, text, teachers, scale).backward()
    return lambda: module.clip_loss(image, text, scale).backward()


def measure(peer: str, b: int, d: int, centres: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    make(peer, 64, d, 100)()  # imports and warm-up
    step = make(peer, b, d, centres)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds),
            "mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--centres", type=int, default=10_000, help="of the cluster loss, a tenth of which is sampled")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="processes a case; the best median counts")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.width, args.centres, args.repeats)))
        return
    print(f"{'b':>6}  {'loss':<20} {'s':>7} {'extra MB':>9}   ratio to plain: time, memory")
    for b in args.sizes:
        found: dict[str, dict[str, float]] = {}
        for _ in range(args.rounds):
            for peer in args.peers:
                command = [sys.executable, __file__, "--one", peer, str(b), "--width", str(args.width),
                           "--repeats", str(args.repeats), "--centres", str(args.centres)]
                one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                best = found.setdefault(peer, one)
                found[peer] = {key: min(best[key], one[key]) for key in one}
        for peer, one in found.items():
            plain = found.get("plain " + ("clip" if "ClipLoss" in peer else peer.split()[-1]), one)
            print(f"{b:>6}  {peer:<20} {one['seconds']:>7.3f} {one['mb']:>9.0f}   "
                  f"{one['seconds'] / plain['seconds']:.2f}, {one['mb'] / max(plain['mb'], 1):.3f}")


if __name__ == "__main__":
    main()
