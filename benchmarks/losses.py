"""Time and peak extra memory of the losses beside their plain form and other packages', in one run.

"auto" is the public name as anybody calls it, which takes tiles from 1,024 samples on; "plain" and
"tiled" say the backend.

    python benchmarks/losses.py                      # b = 1024 .. 8192, d = 512
    python benchmarks/losses.py --sizes 32768 --repeats 1 --rounds 1 \\
        --peers "tiled clip" "tiled affinity"
    python benchmarks/losses.py --sizes 4096 --centres 100000 \\
        --peers "plain cluster" "tiled cluster"

Each case runs in a process of its own; time is the median over repeats of forward and backward, the
peers by turns. Memory on the CPU (Linux) is the growth of the peak resident size over its inputs,
without W's gradient, which any training holds; on CUDA it is the allocator's peak. What cannot run
here says so. Inf-CLIP (inf-cl) and Cut-Cross-Entropy are no dependencies: `uv pip install --no-deps
inf-cl cut-cross-entropy` puts them beside the others. Without CUDA Cut-Cross-Entropy is its
`torch_compile` variant, which makes whole matrices of logits.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

OTHERS = ["open_clip ClipLoss", "Inf-CLIP", "Cut-Cross-Entropy"]  # contrastive losses
PEERS = OTHERS + [
    f"{backend} {loss}"
    for loss in ("clip", "affinity", "instance", "cluster")
    for backend in ("plain", "tiled", "auto")
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class CannotRun(Exception):
    """Why a peer has no figures here."""


def contrastive(peer: str) -> Callable:
    """(image, text, scale) -> loss, by another package."""
    if peer == "open_clip ClipLoss":
        from open_clip.loss import ClipLoss

        return ClipLoss()
    try:
        theirs = importlib.import_module(
            {"Inf-CLIP": "inf_cl", "Cut-Cross-Entropy": "cut_cross_entropy"}[peer]
        )
    except ImportError as err:
        raise CannotRun(f"not installed ({err})") from None
    fast = DEVICE.type == "cuda"
    if peer == "Inf-CLIP" and not fast:
        raise CannotRun("needs CUDA")
    kind, impl = (torch.bfloat16, "cce") if fast else (torch.float32, "torch_compile")

    def one_way(x, y, scale):
        if peer == "Inf-CLIP":
            return theirs.cal_flash_loss(x, y, scale=scale)
        own = torch.arange(len(x), device=x.device)
        return theirs.linear_cross_entropy((scale * x).to(kind), y.to(kind), own, impl=impl)

    return lambda image, text, scale: (
        (one_way(image, text, scale) + one_way(text, image, scale)) / 2
    )


def make(peer: str, b: int, d: int, centres: int) -> tuple[Callable, torch.Tensor | None]:
    """One forward and backward pass, and W."""
    from mclip import losses

    def rows(n: int, width: int) -> torch.Tensor:
        x = torch.randn(n, width, device=DEVICE)
        return x.div_(
            x.norm(dim=1, keepdim=True)
        )  # in place: no memory freed that a step could use unseen

    image, text = rows(b, d).requires_grad_(), rows(b, d).requires_grad_()
    scale = torch.tensor(50.0, requires_grad=True, device=DEVICE)
    if peer in OTHERS:
        loss = contrastive(peer)
        return lambda: loss(image, text, scale).backward(), None
    backend, name = peer.split()
    how = {"backend": backend}
    if name == "cluster":
        loss = losses.ClusterLoss(rows(centres, d), 0.1, **how)
        teacher, labels = rows(b, d), torch.randint(centres, (b,), device=DEVICE)
        return lambda: loss(image, teacher, labels).backward(), loss.weight
    if name == "affinity":
        teachers = [(rows(b, 768), rows(b, 768), 100.0) for _ in range(2)]
        return lambda: losses.affinity_loss(image, text, teachers, scale, **how).backward(), None
    if name == "instance":
        taught = rows(b, d), rows(b, d)
        return lambda: losses.instance_loss(image, text, *taught, scale, **how).backward(), None
    return lambda: losses.clip_loss(image, text, scale, **how).backward(), None


def memory(what: str) -> float:
    """MB, now ("VmRSS") or at most since `forget` ("VmHWM")."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return (
            torch.cuda.max_memory_allocated() if what == "VmHWM" else torch.cuda.memory_allocated()
        ) / 2**20
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)
    )
    return int(line.split()[1]) / 1024


def forget() -> None:
    """Start the peak anew."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure(peer: str, b: int, d: int, centres: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    make(peer, 64, d, 100)[0]()  # imports and warm-up
    step, w = make(peer, b, d, centres)
    forget()
    before, seconds = memory("VmRSS"), []
    for n in range(repeats):
        if w is not None:
            w.grad = None
        start = time.perf_counter()
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if n == 0:
            mb = memory("VmHWM") - before
            if (
                w is not None
            ):  # rows of the gradient that nothing was written to are not resident yet
                held = w.grad.numel() * 4 / 2**20
                now = memory("VmRSS")
                w.grad.add_(0)
                mb -= held - (memory("VmRSS") - now)
    return {"seconds": statistics.median(seconds), "mb": mb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument(
        "--centres",
        type=int,
        default=10_000,
        help="of the cluster loss, a tenth of which is sampled",
    )
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--rounds", type=int, default=2, help="processes a case; the best median counts"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        try:
            print(
                json.dumps(
                    measure(args.one[0], int(args.one[1]), args.width, args.centres, args.repeats)
                )
            )
        except CannotRun as err:
            print(json.dumps({"why": str(err)}))
        return
    print(
        "| b | loss | s | extra MB | time / plain | memory / plain |\n"
        "|---:|---|---:|---:|---:|---:|",
        flush=True,
    )
    for b in args.sizes:
        found: dict[str, dict] = {}
        for _ in range(args.rounds):
            for peer in args.peers:
                if "why" in found.get(peer, {}):
                    continue
                command = [
                    sys.executable,
                    __file__,
                    "--one",
                    peer,
                    str(b),
                    "--width",
                    str(args.width),
                    "--repeats",
                    str(args.repeats),
                    "--centres",
                    str(args.centres),
                ]
                one = json.loads(
                    subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                )
                found[peer] = {key: min(found.get(peer, one)[key], one[key]) for key in one}
        for peer, one in found.items():
            plain = found.get("plain " + ("clip" if peer in OTHERS else peer.split()[-1]))
            figures = one.get("why", "") + " | | | "
            if "mb" in one:
                ratios = (
                    (
                        f"{one['seconds'] / plain['seconds']:.2f}",
                        f"{one['mb'] / max(plain['mb'], 1):.3f}",
                    )
                    if plain
                    else ("", "")
                )
                figures = f"{one['seconds']:.3f} | {one['mb']:,.0f} | {ratios[0]} | {ratios[1]}"
            print(f"| {b:,} | {peer} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
