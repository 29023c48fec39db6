"""How long a model takes: both towers, several runtimes, interleaved so that a machine's drift
cancels.

    frame = latency.measure(["MobileCLIP-S0", "ViT-B-16"], ["eager", "onnxruntime"], rounds=9)
    latency.totals(frame)                       # image + text by model, runtime and batch, ms

Runtimes: all of them on the folded model (`mclip.models.for_inference`) but "unfolded".

    unfolded            torch, the model as it is trained
    eager, eager-bf16   torch; weights and activations bf16 (autocast would convert every weight at
                        every call)
    compile, compile-bf16    torch.compile with frozen weights: laid out anew for oneDNN, fused with
                        what follows them (a C++ compiler on the CPU; a minute or more for each
                        tower and batch size, the first time)
    onnxruntime         fp32 (CPU only)
    onnxruntime-int8    weights of matrix products int8, activations quantised as they come (CPU
                        only); convolutions stay fp32: onnxruntime's integer ones are slower here

The weights are random: time does not depend on them. Every round calls every case twice, in turn,
and times the second call: a model that serves has its weights in the caches and no other runtime's
threads beside it. A case's time is the median over rounds. A runtime that a machine has not got is
left out with a reason, in `frame.attrs["left_out"]`.

What a runtime can gain is bounded by the arithmetic, `frame.attrs["gmac"]`: MobileCLIP-S2 has 1.9
times fewer multiply-adds than ViT-B/16, both towers, and where both run near the rate of a matrix
product it is so much faster.
"""

import copy
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from mclip import models
from mclip.models.factory import quiet
from mclip.models.onnx import Tower, session, to_onnx
from mclip.system.progress import bar
from mclip.system.timing import RUNTIMES, interleaved

MODELS = ["MobileCLIP-S0", "MobileCLIP-S1", "MobileCLIP-S2", "MobileCLIP-B", "ViT-B-16", "ViT-B-32"]
REFERENCE = "ViT-B-16"
COLUMNS = ["model", "tower", "runtime", "batch", "ms"]


def measure(
    names: Sequence[str],
    runtimes: Sequence[str],
    *,
    batches: Sequence[int] = (1,),
    rounds: int = 9,
    towers: Sequence[str] = ("image", "text"),
    warmup: int = 2,
    device: str = "cpu",
    busy: bool = False,
) -> pd.DataFrame:
    """Times of every case: columns COLUMNS, a row a case, `ms` the median over rounds of one call.

    busy : for a CPU that has other work, too: `ms` is the least CPU time over rounds instead. Of
        one thread (`torch.set_num_threads(1)` before) that is what a call would take alone.

    Its attrs: left_out, {runtime: reason}; gmac, {model: 10^9 multiply-adds of one input of all
    towers, folded}.

    Raises ValueError for a runtime that is none of RUNTIMES, ModelError for an unknown model.
    """
    if unknown := sorted(set(runtimes) - set(RUNTIMES)):
        raise ValueError(f"runtime {unknown[0]!r} is none of {', '.join(RUNTIMES)}")
    left_out: dict[str, str] = {}
    gmac = dict.fromkeys(names, 0.0)
    times: dict[tuple, list[float]] = {}
    progress = bar(
        desc="latency", unit="case", total=len(names) * len(runtimes) * len(towers) * len(batches)
    )
    # one tower and batch size at a time: what is compared takes turns; all at once is more than a
    # machine holds
    for kind in towers:
        with tempfile.TemporaryDirectory() as scratch:
            pairs = {name: _towers(name, kind, device) for name in names}
            for name, (_, folded) in pairs.items():
                gmac[name] += multiply_adds(folded, folded.example(1).to(device)) / 1e9
            for batch in batches:
                cases: dict[tuple, Callable[[], object]] = {}
                for name, (plain, folded) in pairs.items():
                    for runtime, call in _calls(
                        name, plain, folded, runtimes, batch, Path(scratch), device, left_out
                    ):
                        progress.update(1)
                        if call is not None:
                            cases[name, kind, runtime, batch] = call
                with torch.no_grad():
                    times |= interleaved(
                        cases,
                        rounds,
                        warmup,
                        before=1,
                        clock=time.process_time if busy else time.perf_counter,
                        wait=torch.cuda.synchronize if device != "cpu" else lambda: None,
                    )
                del cases
                torch.compiler.reset()  # lets go of what was compiled
    progress.close()
    middle = min if busy else statistics.median
    frame = pd.DataFrame([(*key, 1000 * middle(times[key])) for key in times], columns=COLUMNS)
    frame.attrs |= {"left_out": left_out, "gmac": gmac}
    return frame


def totals(frame: pd.DataFrame) -> pd.DataFrame:
    """Image + text: ms by model, runtime and batch; cases that have both towers."""
    both = frame.pivot_table(
        index=["model", "runtime", "batch"], columns="tower", values="ms", sort=False
    ).dropna()
    return both.assign(ms=both["image"] + both["text"]).reset_index()


def best(frame: pd.DataFrame, *, exact: bool = True) -> pd.DataFrame:
    """The fastest runtime of each model and batch; exact: among those that keep fp32's values."""
    table = totals(frame)
    if exact:
        table = table[~table["runtime"].str.contains("int8|bf16")]
    return table.loc[table.groupby(["model", "batch"], sort=False)["ms"].idxmin()].reset_index(
        drop=True
    )


def report(frame: pd.DataFrame) -> list[str]:
    """Lines to print of what `measure` returned: times, ratios to REFERENCE, what was left out."""
    table = totals(frame)
    fastest, gmac = best(frame).set_index(["model", "batch"]), frame.attrs["gmac"]
    lines = [
        f"{'model':<16} {'batch':>5}  {'runtime':<18} {'image ms':>9} {'text ms':>8} {'both ms':>8}"
        f"  {REFERENCE}/it"
    ]
    for row in table.itertuples():
        same = table[
            (table.model == REFERENCE) & (table.batch == row.batch) & (table.runtime == row.runtime)
        ]["ms"]
        ratio = f"{same.iloc[0] / row.ms:.2f}" if len(same) else "-"
        lines.append(
            f"{row.model:<16} {row.batch:>5}  {row.runtime:<18} {row.image:>9.1f} {row.text:>8.1f}"
            f" {row.ms:>8.1f}  {ratio}"
        )
    for (name, batch), row in fastest.iterrows():
        if (REFERENCE, batch) in fastest.index and name != REFERENCE:
            other = fastest.loc[(REFERENCE, batch)]
            lines.append(
                f"{name}, batch {batch}: {other.ms / row.ms:.2f} x as fast as {REFERENCE} (image "
                f"tower alone {other.image / row.image:.2f} x), each in its best fp32 runtime "
                f"({row.runtime}, {other.runtime}); {gmac[REFERENCE] / gmac[name]:.2f} x fewer "
                f"multiply-adds ({gmac[name]:.1f} G)"
            )
    return lines + [f"left out: {name}: {why}" for name, why in frame.attrs["left_out"].items()]


def multiply_adds(module: torch.nn.Module, x: torch.Tensor) -> int:
    """Of matrix products and convolutions in one call."""
    counter, fused = FlopCounterMode(display=False), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(
        False
    )  # an operation of its own, which the counter doesn't know
    try:
        with torch.no_grad(), counter:
            module(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2


def _towers(name: str, kind: str, device: str) -> tuple[Tower, Tower]:
    """A model's tower as it is trained, and folded; without its other tower."""
    model, *_ = models.create(name, device=device)
    out = []
    for whole in (model, models.for_inference(model)):
        for child in [n for n, _ in whole.named_children() if (n == "visual") != (kind == "image")]:
            delattr(whole, child)
        out.append(Tower(whole, kind).eval())
    return out[0], out[1]


def _calls(
    name: str,
    plain: Tower,
    folded: Tower,
    runtimes: Sequence[str],
    batch: int,
    scratch: Path,
    device: str,
    left_out: dict[str, str],
) -> Iterable[tuple[str, Callable | None]]:
    """Each runtime's call, which ran once; None for one that this machine has not got."""
    x = folded.example(batch).to(device)
    if folded.kind == "image" and device != "cpu":
        x = x.to(memory_format=torch.channels_last)
    for runtime in runtimes:
        try:
            run = _runtime(
                runtime,
                plain,
                folded,
                scratch / f"{name.replace('/', '-')}-{folded.kind}.onnx",
                device,
            )
            with torch.no_grad():
                run(x)
            yield runtime, lambda run=run: run(x)
        except (RuntimeError, ImportError, NotImplementedError) as err:
            left_out[runtime] = (
                f"{name}, {folded.kind}: {(str(err).splitlines() or [type(err).__name__])[0]}"
            )
            yield runtime, None


def _runtime(runtime: str, plain: Tower, folded: Tower, file: Path, device: str) -> Callable:
    kind, _, precision = runtime.partition("-")
    if kind == "onnxruntime":
        if device != "cpu":
            raise NotImplementedError("onnxruntime is measured on the CPU only")
        if not file.exists():
            to_onnx(folded, file)
        return session(_quantised(file) if precision == "int8" else file)
    call = plain if kind == "unfolded" else folded
    if precision == "bf16":
        call = copy.deepcopy(folded).to(torch.bfloat16)
    if kind == "compile":
        if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            raise NotImplementedError(
                "torch.compile needs a C++ compiler on the CPU (g++, clang++)"
            )
        # all towers share one `forward`: not isolated, the ninth would quietly run uncompiled
        # (torch's recompile limit)
        call = torch.compile(  # type: ignore[call-overload]
            call, dynamic=False, fullgraph=True, isolate_recompiles=True, options={"freezing": True}
        )
    if precision != "bf16":
        return call
    return lambda x: call(x.to(torch.bfloat16) if x.is_floating_point() else x)


def _quantised(file: Path) -> Path:
    """The ONNX file with int8 weights of its matrix products, beside it."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = file.with_suffix(".int8.onnx")
    if not out.exists():
        model = onnx.load(file)
        del model.graph.value_info[
            :
        ]  # shapes that the exporter's folding left behind, which the quantiser trips over
        with quiet():
            quantize_dynamic(
                model, out, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
            )
    return out
