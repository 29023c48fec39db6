"""`python -m mclip.evaluate MODEL --sets NAME_OR_FOLDER ...`: see `mclip.evaluate`."""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from mclip.data.evalsets import ANSWER
from mclip.evaluate.suite import evaluate_many
from mclip.models import ModelError, create, for_inference
from mclip.params import EvalSet, registry
from mclip.system.files import write_whole


def named_sets(
    names: Sequence[str], root: str | Path = registry.ROOT, *, probe: bool = False
) -> dict[str, EvalSet]:
    """Sets by the name of a suite, of the registry (in `root`, under the copy's or the set's name),
    or by folder.

    Raises
    ------
    ValueError : none of them, with the nearest known name; a task that is not done here.
    """
    found = {}
    for name in chain.from_iterable(registry.SUITES.get(name, [name]) for name in names):
        path = Path(name)
        if path.is_dir():
            known = next(
                (key for key, entry in registry.SETS.items() if path.name in (key, entry.folder)),
                path.name,
            )
            file = path / "dataset_type.txt"
            task = file.read_text().strip().lower() if file.exists() else "classification"
            if task not in ANSWER:
                raise ValueError(f"{file}: {task!r} is none of {', '.join(ANSWER)}")
            values = {"path": name, "task": task}
        else:
            places = [Path(root) / name]
            if entry := registry.get(name):
                places.append(Path(entry.place(root)))
            if name in registry.SUITES["demo"]:  # a part of it, where there is no copy
                places.append(Path(registry.MADE) / name)
            known, values = (
                name,
                next(({"path": str(place)} for place in places if place.is_dir()), {}),
            )
        values = registry.filled(known, values, root)
        found[known] = EvalSet(**values | {"probe": probe and values.get("task") != "retrieval"})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mclip.evaluate", description="Zero-shot and retrieval of a model."
    )
    parser.add_argument(
        "model",
        help="any open_clip model string: ViT-B-32/laion2b_s34b_b79k, local-dir:FOLDER, ...",
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        required=True,
        metavar="NAME_OR_FOLDER",
        help=f"of the registry, a folder, or a suite: {', '.join(registry.SUITES)}",
    )
    parser.add_argument(
        "--root", default=registry.ROOT, help="where copies of the hub's sets lie (%(default)s)"
    )
    parser.add_argument("--out", metavar="FILE", help="every metric, as JSON")
    parser.add_argument(
        "--probe", action="store_true", help="linear probes too, where there is a train split"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", help="cpu | cuda; cuda where there is one")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "auto"])
    args = parser.parse_args(argv)
    try:
        if str(args.device).startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {args.device}: torch sees no GPU")
        sets = named_sets(args.sets, args.root, probe=args.probe)
        model, _, preprocess, tokenizer = create(args.model)
        result = evaluate_many(
            [for_inference(model)],
            preprocess,
            tokenizer,
            sets,
            batch_size=args.batch_size,
            device=args.device,
            precision=args.precision,
        )
    except (ModelError, ValueError) as err:  # an EvalError is one
        print(f"error: {str(err).splitlines()[0]}", file=sys.stderr)
        return 2
    for line in result.problems:
        print(line, file=sys.stderr)
    found = {name: metrics for name, metrics in result.metrics[0].items() if metrics}
    for name, metrics in found.items():
        others = ", ".join(
            f"{key} {100 * value:.1f}" for key, value in metrics.items() if key != sets[name].metric
        )
        print(
            f"{name:30} {sets[name].metric:16} {100 * metrics[sets[name].metric]:5.1f} %   ({others})"
        )
    if len(found) > 1:
        print(
            f"mean of the main metric over {len(found)} sets: "
            f"{100 * sum(metrics[sets[name].metric] for name, metrics in found.items()) / len(found):.1f} %"
        )
    if args.out:
        tree = {"model": args.model, "sets": found, "problems": result.problems}
        write_whole(args.out, json.dumps(tree, indent=1) + "\n")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
