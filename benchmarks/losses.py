"""Time and peak extra memory of the tiled losses beside the plain ones and open_clip's ClipLoss, in one run.

    python benchmarks/losses.py                      # b = 1024 .. 8192, d = 512
    python benchmarks/losses.py --sizes 16384 32768 --repeats 3

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

PEERS = ["open_clip ClipLoss", "plain clip", "tiled clip", "plain affinity", "tiled affinity"]


def make(peer: str, b: int, d: int):
    from mclip import losses
    from mclip.kernels import tiled

    def rows(width: int) -> torch.Tensor:
        return F.normalize(torch.randn(b, width), dim=-1)

    image, text = rows(d).requires_grad_(), rows(d).requires_grad_()
    scale = torch.tensor(50.0, requires_grad=True)
    teachers = [(rows(768), rows(768), 100.0) for _ in range(2)] if "affinity" in peer else []
    if peer == "open_clip ClipLoss":
        from open_clip.loss import ClipLoss

        loss = ClipLoss()
        return lambda: loss(image, text, scale).backward()
    module = tiled if peer.startswith("tiled") else losses
    if teachers:
        return lambda: module.affinity_loss(image, text, teachers, scale).backward()
    return lambda: module.clip_loss(image, text, scale).backward()


def measure(peer: str, b: int, d: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    make(peer, 64, d)()  # imports and warm-up
    step = make(peer, b, d)
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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="processes a case; the best median counts")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.width, args.repeats)))
        return
    print(f"{'b':>6}  {'loss':<20} {'s':>7} {'extra MB':>9}   ratio to plain: time, memory")
    for b in args.sizes:
        found: dict[str, dict[str, float]] = {}
        for _ in range(args.rounds):
            for peer in PEERS:
                command = [sys.executable, __file__, "--one", peer, str(b), "--width", str(args.width),
                           "--repeats", str(args.repeats)]
                one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                best = found.setdefault(peer, one)
                found[peer] = {key: min(best[key], one[key]) for key in one}
        for peer, one in found.items():
            plain = found["plain " + peer.split()[-1]] if "ClipLoss" not in peer else found["plain clip"]
            print(f"{b:>6}  {peer:<20} {one['seconds']:>7.3f} {one['mb']:>9.0f}   "
                  f"{one['seconds'] / plain['seconds']:.2f}, {one['mb'] / max(plain['mb'], 1):.3f}")


if __name__ == "__main__":
    main()
