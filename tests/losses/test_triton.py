import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton on this platform")
def test_cases():
    """triton_cases.py, in a process where Triton interprets unless there is CUDA to compile for."""
    env = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("triton_cases.py")),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no compiler"
)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton on this platform")
@pytest.mark.parametrize("difference", [False, True])
def test_kernels_compile_for_a_gpu_that_is_not_here(difference):
    """To machine code of compute capability 9.0, which needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from mclip.losses.tiled import triton_tiles

    fixed = {
        "_add": {"scale": 1.5, "difference": difference, "N": 32, "M": 128},
        "_softmax": {
            "weight": -1 / 3,
            "scale": 1.0,
            "has_row": True,
            "has_column": difference,
            "onto": True,
            "N": 32,
            "M": 128,
        },
    }
    for name, constants in fixed.items():
        kernel = getattr(triton_tiles, name)
        pointers = {"t", "s", "state", "out", "x", "row", "column"}
        signature = {
            k: "constexpr" if k in constants else "*fp32" if k in pointers else "i32"
            for k in kernel.arg_names
        }
        source = triton.compiler.ASTSource(kernel, signature, constants)
        assert len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 1000
