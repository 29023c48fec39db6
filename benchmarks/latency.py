"""Latency of image and text towers: models x runtimes x batch sizes, interleaved medians, ratios to
ViT-B-16.

    python benchmarks/latency.py                                # S0, S2, ViT-B-16, fp32 runtimes, batch 1
    python benchmarks/latency.py --models all --runtimes all --batches 1 32   # everything
    python benchmarks/latency.py --busy                         # on a machine with other work: CPU time of one thread
    python benchmarks/latency.py --device cuda --runtimes eager eager-bf16 compile compile-bf16 --batches 1 32
"""

import argparse

import torch

from mclip.models import latency

MODELS = ["MobileCLIP-S0", "MobileCLIP-S1", "MobileCLIP-S2", "MobileCLIP-B", "ViT-B-16", "ViT-B-32"]
REFERENCE = "ViT-B-16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", default=["MobileCLIP-S0", "MobileCLIP-S2", REFERENCE]
    )
    parser.add_argument(
        "--runtimes",
        nargs="+",
        default=["eager", "onnxruntime"],
        choices=[*latency.RUNTIMES, "all"],
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--busy",
        action="store_true",
        help="a machine with other work: one thread, its least CPU time",
    )
    args = parser.parse_args()
    if args.busy:
        torch.set_num_threads(1)
    frame = latency.measure(
        MODELS if args.models == ["all"] else args.models,
        latency.RUNTIMES if "all" in args.runtimes else args.runtimes,
        batches=args.batches,
        rounds=args.rounds,
        device=args.device,
        busy=args.busy,
    )
    table = latency.totals(frame)
    best, gmac = latency.best(frame).set_index(["model", "batch"]), frame.attrs["gmac"]
    print(
        f"{'model':<16} {'batch':>5}  {'runtime':<18} {'image ms':>9} {'text ms':>8} {'both ms':>8}  {REFERENCE}/it"
    )
    for row in table.itertuples():
        same = table[
            (table.model == REFERENCE) & (table.batch == row.batch) & (table.runtime == row.runtime)
        ]["ms"]
        ratio = f"{same.iloc[0] / row.ms:.2f}" if len(same) else "-"
        print(
            f"{row.model:<16} {row.batch:>5}  {row.runtime:<18} {row.image:>9.1f} {row.text:>8.1f} {row.ms:>8.1f}  "
            f"{ratio}"
        )
    for (name, batch), row in best.iterrows():
        if (REFERENCE, batch) in best.index and name != REFERENCE:
            other = best.loc[(REFERENCE, batch)]
            print(
                f"{name}, batch {batch}: {other.ms / row.ms:.2f} x as fast as {REFERENCE} (image tower alone "
                f"{other.image / row.image:.2f} x), each in its best fp32 runtime ({row.runtime}, {other.runtime}); "
                f"{gmac[REFERENCE] / gmac[name]:.2f} x fewer multiply-adds ({gmac[name]:.1f} G)"
            )
    for runtime, reason in frame.attrs["left_out"].items():
        print(f"left out: {runtime}: {reason}")


if __name__ == "__main__":
    main()
