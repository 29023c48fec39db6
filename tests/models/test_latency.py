"""mclip.models.latency: every case is timed in turn, runtimes say what they compute, what is
missing is said.
"""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from mclip import models
from mclip.models import latency, onnx
from mclip.studies import latency as study


def test_on_a_busy_machine_the_least_cpu_time_counts(monkeypatch):
    ticks = iter(
        [0, 10, 14, 20, 23, 30, 35]
    )  # the start of the warm-up; starts and ends of three rounds
    monkeypatch.setattr(latency.time, "process_time", lambda: next(ticks))
    frame = latency.measure(
        ["demo-student"], ["eager"], rounds=3, warmup=1, towers=["image"], busy=True
    )
    assert frame["ms"].tolist() == [3000.0]


def test_measure_and_totals():
    frame = latency.measure(["demo-student"], ["unfolded", "eager"], batches=[1, 3], rounds=2)
    assert list(frame.columns) == latency.COLUMNS and len(frame) == 8 and (frame["ms"] > 0).all()
    assert frame.attrs["gmac"]["demo-student"] > 0.01 and not frame.attrs["left_out"]
    table = latency.totals(frame)
    assert len(table) == 4 and (table["ms"] == table["image"] + table["text"]).all()
    with pytest.raises(ValueError, match="'tpu' is none of"):
        latency.measure(["demo-student"], ["tpu"])


def test_multiply_adds_are_counted_in_every_layer():
    conv = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2, bias=False), torch.nn.Flatten())
    assert latency.multiply_adds(conv, torch.zeros(2, 4, 5, 6)) == 2 * 8 * 3 * 4 * (2 * 9)
    layer = torch.nn.TransformerEncoderLayer(
        16, 2, 32, batch_first=True
    ).eval()  # whose fast path hides its products
    tokens, width = 5, 16
    expected = tokens * width * (4 * width + 2 * 32) + 2 * tokens * tokens * width
    assert latency.multiply_adds(layer, torch.zeros(1, tokens, width)) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_best_is_the_fastest_of_those_that_are_exact():
    rows = [
        ("a", tower, runtime, 1, ms)
        for tower in ("image", "text")
        for runtime, ms in (("eager", 3.0), ("onnxruntime", 2.0), ("onnxruntime-int8", 1.0))
    ]
    frame = pd.DataFrame(rows, columns=latency.COLUMNS)
    assert latency.best(frame)["runtime"].tolist() == ["onnxruntime"]
    assert latency.best(frame, exact=False)["ms"].tolist() == [2.0]


@pytest.mark.slow
def test_every_runtime_computes_the_same(tmp_path):
    model, *_ = models.create("demo-student")
    fast = models.for_inference(model)
    for kind in ("image", "text"):
        plain, folded = onnx.Tower(model, kind).eval(), onnx.Tower(fast, kind).eval()
        x = folded.example(2)
        with torch.no_grad():
            for runtime in ("unfolded", "eager", "eager-bf16", "onnxruntime", "onnxruntime-int8"):
                out = latency._runtime(runtime, plain, folded, tmp_path / f"{kind}.onnx", "cpu")(x)
                cosine = F.cosine_similarity(torch.as_tensor(out).float(), plain(x)).min()
                assert cosine > (0.99 if "-" in runtime else 0.9999), runtime


@pytest.mark.slow
def test_a_runtime_that_is_not_there_is_left_out_with_a_reason(monkeypatch):
    monkeypatch.setattr(latency.shutil, "which", lambda name: None)
    frame = latency.measure(["demo-student"], ["eager", "compile"], rounds=1, towers=["text"])
    assert (
        set(frame["runtime"]) == {"eager"} and "C++ compiler" in frame.attrs["left_out"]["compile"]
    )


def test_the_answer_compares_with_the_last_model():
    settings = study.Settings(
        device="cpu", models=["a", "b"], runtimes=["eager"], batches=[1], rounds=1
    )
    first = pd.DataFrame(
        [("a", "eager", 1, 1.0, 1.0, 2.0), ("b", "eager", 1, 4.0, 2.0, 6.0)],
        columns=["model", "runtime", "batch", "image", "text", "ms"],
    )
    assert study.verdict(settings, first, {"a": 1.0, "b": 5.0}) == (
        "Image + text at batch 1 on cpu: a 2.0 ms (eager), 3.0 times as fast as b (its image tower "
        "alone 4.0 times) with 5.0 times fewer multiply-adds; b 6.0 ms (eager); "
        "each in its fastest runtime."
    )
