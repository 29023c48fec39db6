"""Samples a second of this trainer beside open_clip's own, on the same model and the same shards,
in one run.

    python benchmarks/training.py       # the default student, data/pairs or made-up pictures
    python benchmarks/training.py --model ViT-B-32 --batch-size 16 --steps 4 --pictures 400
    python benchmarks/training.py --pairs data/pairs --workers 2

Peers: open_clip_train.main as it comes (webdataset, decoding and tokenising as it goes), and
mclip.distill.trainer with the same loss, batch, optimizer and precision, both data paths: pixels
streamed from the shards as they are read, and pixels decoded once into a cache (which is made
before the clock starts; what that took is shown). Every case is a process of its own with all
cores; its figure is the rate from the end of step --warm to the end of the last, so that reading,
decoding and the optimizer count. The peers take turns --rounds times; the medians are shown.
"""

import argparse
import functools
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEERS = ["open_clip", "mclip, streamed", "mclip, cached"]


def open_clip_rate(args) -> dict[str, float]:
    from open_clip_train import data, train
    from open_clip_train import main as trainer

    from mclip import models
    from mclip.data import shards

    models.create(args.model)  # makes our own configurations known to open_clip
    ends, backward = [], train.backward

    def timed(*arguments) -> None:
        backward(*arguments)
        ends.append(time.perf_counter())

    train.backward = timed
    # webdataset 1.0 marks the end of each shard, which this release of open_clip stumbles over
    data.tar_file_expander = functools.partial(data.tar_file_expander, eof_value=None)
    files = [Path(args.pairs) / s["file"] for s in shards.read_manifest(args.pairs)["shards"]]
    with tempfile.TemporaryDirectory() as logs:
        trainer.main(
            [
                "--model",
                args.model,
                "--dataset-type",
                "webdataset",
                "--train-data",
                "::".join(map(str, files)),
                "--train-num-samples",
                str(args.steps * args.batch_size),
                "--batch-size",
                str(args.batch_size),
                "--workers",
                str(args.workers),
                "--precision",
                precision(),
                "--epochs",
                "1",
                "--warmup",
                "20",
                "--lr",
                "0.002",
                "--wd",
                "0.2",
                "--grad-clip-norm",
                "1.0",
                "--logs",
                logs,
                "--name",
                "run",
                "--save-frequency",
                "0",
            ]
        )
    return {"rate": rate(ends, args), "setup": 0.0}


def mclip_rate(args, cached: bool) -> dict[str, float]:
    from mclip import params
    from mclip.distill import pixels
    from mclip.distill import trainer as train
    from mclip.distill.pairs import TrainingSet
    from mclip.distill.runs import Run

    settings = params.load().distill.train.model_copy(
        update={
            "samples": args.steps * args.batch_size,
            "batch_size": args.batch_size,
            "accumulate": 1,
            "ema": None,
            "grad_checkpoint": False,
            "cache_pixels": cached,
            "workers": args.workers,
            "threads": 0,
            "checkpoint_every": args.steps + 1,
        }
    )
    recipe = params.Recipe(title="CLIP", pairs="all", weight={"clip": 1.0})
    spent = 0.0
    if cached:
        build = pixels._build_cache

        def timed(*arguments) -> None:
            nonlocal spent
            start = time.perf_counter()
            build(*arguments)
            spent = time.perf_counter() - start

        pixels._build_cache = timed
    with tempfile.TemporaryDirectory() as scratch:
        data = TrainingSet(
            "all",
            pairs=args.pairs,
            cache=args.cache,
            light_views=settings.light_views,
            light_scale_min=settings.light_scale_min,
        )
        run = Run(
            "bench",
            0,
            args.model,
            settings,
            recipe,
            data,
            out=f"{scratch}/out",
            scratch=f"{scratch}/run",
        )
        ends = [time.perf_counter() for _ in train.steps(run)]
    return {"rate": rate(ends, args), "setup": spent}


def precision() -> str:
    import torch

    from mclip import models

    return {torch.float32: "fp32", torch.bfloat16: "amp_bf16"}[models.resolve_precision("auto")]


def rate(ends: list[float], args) -> float:
    """Samples a second from the end of step `warm` to the end of the last."""
    return (len(ends) - args.warm) * args.batch_size / (ends[-1] - ends[args.warm - 1])


def pictures(folder: Path, count: int, side_px: int = 256) -> None:
    """Shards of noise, smoothed so that they take a JPEG's usual 15 kB, each with a caption of its
    own.
    """
    import numpy as np
    from PIL import Image

    from mclip.data import shards

    rng = np.random.default_rng(0)

    def jpeg() -> bytes:
        noise = Image.fromarray(
            rng.integers(0, 256, (side_px // 4, side_px // 4, 3), dtype=np.uint8)
        )
        buffer = io.BytesIO()
        noise.resize((side_px, side_px), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=85)
        return buffer.getvalue()

    shards.write_shards(
        [
            shards.Sample(f"{i:06d}", jpeg(), "jpg", f"a picture of thing {i}", {})
            for i in range(count)
        ],
        folder,
        shard_size=min(250, count // 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo-student")
    parser.add_argument(
        "--pairs", help="a folder of the data stage; default: data/pairs, or 2,000 made-up pictures"
    )
    parser.add_argument(
        "--pictures", type=int, help="that many made-up JPEG pictures of 256 px instead of --pairs"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--warm", type=int, help="steps before the clock starts; default: a quarter"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.warm = args.warm or max(1, args.steps // 4)
    if args.one:
        found = (
            open_clip_rate(args)
            if args.one == PEERS[0]
            else mclip_rate(args, cached=args.one == PEERS[2])
        )
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as made:
        there = not args.pictures and Path("data/pairs/manifest.json").exists()
        pairs = args.pairs or ("data/pairs" if there else f"{made}/pairs")
        if pairs == f"{made}/pairs":
            pictures(Path(pairs), args.pictures or 2000)
        found: dict[str, list[dict[str, float]]] = {peer: [] for peer in args.peers}
        for _ in range(args.rounds):
            for peer in args.peers:
                command = [
                    sys.executable,
                    __file__,
                    "--one",
                    peer,
                    "--pairs",
                    pairs,
                    "--cache",
                    f"{made}/cache",
                    "--model",
                    args.model,
                ]
                for name in ("batch_size", "steps", "warm", "workers"):
                    command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{peer} failed:\n{done.stderr[-2000:]}")
                found[peer].append(json.loads(done.stdout.splitlines()[-1]))
    print(
        f"{args.model}, batch {args.batch_size}, {args.workers} decoding process(es), median "
        f"of {args.rounds} rounds"
    )
    base = statistics.median(one["rate"] for one in found[args.peers[0]])
    for peer, rounds in found.items():
        rates = [one["rate"] for one in rounds]
        setup = max(one["setup"] for one in rounds)  # later rounds find it
        made = f"; cache made in {setup:.1f} s" if setup else ""
        print(
            f"{peer:<16} {statistics.median(rates):>8.1f} samples/s "
            f"({min(rates):.1f} to {max(rates):.1f})   "
            f"{statistics.median(rates) / base:.2f} x {args.peers[0]}{made}"
        )


if __name__ == "__main__":
    main()
