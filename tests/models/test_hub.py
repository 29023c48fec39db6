"""Hub models with random weights in the hub's cache: the code that a GPU run takes. Of one layer a
tower in `make test`, of their real depth in `make test-long`.
"""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mclip.data import shards


@pytest.mark.parametrize(
    ("layers", "image_params", "text_params"),
    [
        pytest.param(1, 9.9, 28.8, marks=pytest.mark.slow),
        pytest.param(12, 87.8, 63.4, marks=pytest.mark.long),
    ],
)
def test_a_hub_teacher_and_a_hub_captioner_go_through_the_stages(
    layers, image_params, text_params, tmp_path
):
    rng, samples = np.random.default_rng(0), []
    for i in range(3):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (60 + 40 * i, 90, 3), dtype=np.uint8)).save(
            buffer, "PNG"
        )
        samples.append(
            shards.Sample(f"k{i}", buffer.getvalue(), "png", f"a picture of noise {i}", {})
        )
    shards.write_shards(samples, tmp_path / "pairs", shard_size=10)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.hub_run", str(tmp_path), str(layers)],
        cwd=root,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(tmp_path / "hub", ignore_errors=True)  # 1.6 GB
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    entry = said["entry"]
    assert entry["model"] == "ViT-B-32/laion2b_s34b_b79k" and len(entry["weights_sha256"]) == 64
    assert (entry["width"], entry["image_size"], entry["context"]) == (512, 224, 77)
    assert round(entry["image_params"] / 1e6, 1) == image_params
    assert round(entry["text_params"] / 1e6, 1) == text_params
    assert said["same"] and said["keys"] == ["k0", "k1", "k2"] and said["shape"] == [3, 512]
    assert said["cosine"] > 0.999
    assert said["captions"] == [1, 1, 1] and said["samples"] == 3 and said["widths"] == [512, 512]
