"""The trainer: one student, one recipe, one seed; one process, or several under torchrun.

    python -m mclip.distill.trainer RUN.json       # written by mclip.distill.plan; see runs.Run

Every recipe of both papers goes through this one loop; a recipe is a set of loss weights and data
choices (`Objective`). A killed run continues at its last checkpoint with the same batches; the
model folder appears at the end.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mclip import models
from mclip.data.stores import clusters as cluster_store
from mclip.distill import checkpoint, loaders, sharding, targets, terms
from mclip.distill.muon import Muon
from mclip.distill.objective import Objective
from mclip.distill.pairs import AllPairs, Side, open_pairs
from mclip.distill.pixels import pixel_cache
from mclip.distill.runs import Run
from mclip.distill.step import Together, averaged_over_ranks, backward
from mclip.losses.backends import is_plain
from mclip.params import Train
from mclip.system.files import whole, write_whole
from mclip.system.progress import bar
from mclip.system.schedule import learning_rate

HISTORY_EVERY = 10  # steps a row of history.csv is the mean of


def parameter_groups(together: Together, train: Train) -> list[dict]:
    """The optimiser's groups, for `Muon`: weight decay on matrices only; apart what a term of the
    loss gives a learning rate of its own.

    Muon trains the student's hidden matrices but embeddings. Kernels of convolutions it could train
    as well, for a twelfth of the step and the same accuracy (25,600 samples, one seed).
    """
    peaks = together.objective.learning_rates(train)
    muon = train.optimizer == "muon"
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    apart: dict[float, list[nn.Parameter]] = {}
    for name, p in together.named_parameters():
        if (peak := peaks.get(name.removeprefix("objective."))) is not None:
            apart.setdefault(peak, []).append(p)
        elif p.ndim < 2:
            plain.append(p)
        elif muon and p.ndim == 2 and name.startswith("student.") and "embed" not in name:
            hidden.append(p)
        else:
            decayed.append(p)
    peak = train.lr_adamw if muon else train.lr
    groups = [
        {"params": hidden, "weight_decay": train.weight_decay, "peak": train.lr, "momentum": 0.95},
        {"params": decayed, "weight_decay": train.weight_decay, "peak": peak},
        {"params": plain, "weight_decay": 0.0, "peak": peak},
        *({"params": own, "weight_decay": 0.0, "peak": peak} for peak, own in apart.items()),
    ]
    return [g for g in groups if g["params"]]


def train(run: Run) -> None:
    """Train to the end and write `run.out` (open_clip local-dir layout and history.csv)."""
    for _ in steps(run):
        pass


def steps(run: Run) -> Generator[int, None, None]:
    """`train`, a step at a time: yields the number of steps done. Left early, it writes nothing."""
    rank, world = _join()
    t = run.train
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if t.threads and device.type == "cpu":
        torch.set_num_threads(t.threads)
    torch.manual_seed(run.seed)
    student, _, _, tokenizer = models.create(run.student, device=device)
    if run.data.image_px is None:
        run = replace(run, data=replace(run.data, image_px=models.image_size(student)))
    student.train().to(memory_format=torch.channels_last)
    if t.grad_checkpoint:
        student.set_grad_checkpointing()
    if t.logit_scale_init is not None:
        with torch.no_grad():
            student.logit_scale.fill_(math.log(t.logit_scale_init))
    precision = models.resolve_precision(t.precision, device)
    pairs = open_pairs(run.data)
    side = _side(run, pairs, tokenizer) if t.cache_pixels else None
    objective = _objective(run, student, pairs.teachers)
    together = Together(student, objective).to(device)
    wrapped = averaged_over_ranks(together) if world > 1 else together
    optimizer = Muon(parameter_groups(together, t), lr=t.lr, betas=t.betas, fused=True)
    averaged = (
        AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(t.ema), use_buffers=True)
        if t.ema
        else None
    )
    total = max(1, t.samples // t.batch_size)
    scratch = Path(run.scratch)
    start, history = checkpoint.resume(scratch, run.identity, together, optimizer, averaged)
    loader = _loader(run, pairs, tokenizer, side, start=start, rank=rank, world=world)
    mean, std = (tuple(student.visual.preprocess_cfg[k]) for k in ("mean", "std"))
    sums: dict[str, float] = {}
    progress = (
        bar(desc=f"{run.name} seed {run.seed}", unit="sample", total=total * t.batch_size)
        if rank == 0
        else None
    )
    if progress is not None:
        progress.update(start * t.batch_size)
    following = loader.batch(start) if start < total else {}
    for step in range(start, total):
        batch = {k: v.to(device, non_blocking=True) for k, v in following.items()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, total, group["peak"], minimum=t.lr_min, warmup=t.warmup_steps
            )
        found = backward(
            wrapped, together, batch, mean, std, precision, t.accumulate, t.grad_checkpoint
        )
        if t.grad_clip:
            sharding.clip_gradients(together, t.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            student.logit_scale.clamp_(0, math.log(t.logit_scale_max))
        if averaged is not None:
            averaged.update_parameters(student)
        if step + 1 < total:
            following = loader.batch(
                step + 1
            )  # a GPU is still at work: only the next line waits for it
        values = {k: float(v) for k, v in found.items()}
        loss = sum(values.values())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{run.name} seed {run.seed}: the loss is {loss} at step {step}; "
                "a smaller distill.train.lr or precision: fp32 may help"
            )
        for k, v in {"loss": loss, **values}.items():
            sums[k] = sums.get(k, 0.0) + v
        if (step + 1) % HISTORY_EVERY == 0 or step + 1 == total:
            n = (step % HISTORY_EVERY) + 1
            history.append(
                {
                    "step": step + 1,
                    "samples": (step + 1) * t.batch_size,
                    "lr": optimizer.param_groups[0]["lr"],
                    "logit_scale": float(student.logit_scale.detach().exp()),
                    **{k: v / n for k, v in sums.items()},
                }
            )
            sums = {}
        if (step + 1) % t.checkpoint_every == 0 and step + 1 < total and not sums:
            checkpoint.save(scratch, run.identity, step + 1, together, optimizer, averaged, history)
        if progress is not None:
            progress.update(t.batch_size)
        yield step + 1
    if rank == 0:
        progress.close()
        final = averaged.module if averaged is not None else student
        final.mclip = student.mclip
        _finish(run, pairs, final.eval(), history, precision)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _objective(run: Run, student: nn.Module, ensemble: list[dict]) -> Objective:
    kernel, centres = run.train.loss_kernel, None
    if "teacher" in terms.needs(run.recipe.weight):
        centres = torch.from_numpy(cluster_store.read_centres(run.data.clusters))
    return Objective(
        run.recipe,
        student.mclip["config"]["embed_dim"],
        ensemble=ensemble,
        centres=centres,
        seed=run.seed,
        backend="plain" if is_plain(kernel, run.train.batch_size) else kernel,
    )


def _side(run: Run, pairs: AllPairs, tokenizer) -> Side:
    """What the set has beside pixels, its tokens those of the student."""
    side = targets.load_side(pairs)
    targets.add_tokens(side, tokenizer, synthetic=run.recipe.synthetic, cache=run.data.cache)
    return side


def _loader(
    run: Run,
    pairs: AllPairs,
    tokenizer,
    side: Side | None,
    *,
    start: int,
    rank: int,
    world: int,
):
    """The batches from step `start` on; side: None to stream the shards."""
    # where the cluster teacher is one of the ensemble: its slice, for its embedding of the
    # augmented picture
    its_slice = next((t["slice"] for t in pairs.teachers if t["name"] == run.data.teacher), None)
    common = {"seed": run.seed, "rank": rank, "world": world, "teacher_slice": its_slice}
    if side is None:
        return loaders.StreamedLoader(
            pairs,
            tokenizer,
            run.train.batch_size,
            start=start,
            workers=run.train.workers,
            **common,
        )
    pixels = pixel_cache(pairs, workers=run.train.workers)
    return loaders.CachedLoader(side, pixels, run.train.batch_size, **common)


@contextlib.contextmanager
def started(runs: Iterable[Run]) -> Iterator[list[Generator[int, None, None]]]:
    """`steps` of each run, to be timed: in a scratch folder that goes, nothing is trained to the
    end.
    """
    with tempfile.TemporaryDirectory() as folder:
        each = [
            steps(replace(run, out=f"{folder}/out{i}", scratch=f"{folder}/{i}"))
            for i, run in enumerate(runs)
        ]
        try:
            yield each
        finally:
            for one in each:
                one.close()


def _join() -> tuple[int, int]:
    """Rank and number of processes; joins torchrun's group when there is one."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return dist.get_rank(), world
    return 0, 1


def _finish(
    run: Run,
    pairs: AllPairs,
    student: nn.Module,
    history: list[dict],
    precision: torch.dtype,
) -> None:
    out = Path(run.out)
    (out / "history.csv").unlink(missing_ok=True)  # of another identity: nothing is finished yet
    models.export(student, out)
    image = sum(p.numel() for p in student.get_submodule("visual").parameters())
    facts = {
        "identity": run.identity,
        "pairs": pairs.count(),
        "image_params": image,
        "text_params": sum(p.numel() for p in student.parameters()) - image,
        "precision": str(precision).removeprefix("torch."),  # what `auto` came to
    }
    write_whole(out / "training.json", json.dumps(facts, indent=1) + "\n")
    with whole(out / "history.csv") as draft, open(draft, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            for row in history
        )
    (Path(run.scratch) / checkpoint.FILE).unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mclip.distill.trainer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("run", type=Path, help="RUN.json, written by mclip.distill")
    train(Run.load(parser.parse_args(argv).run))


if __name__ == "__main__":
    main()
