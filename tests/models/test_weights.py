"""Weights as people have them: their preprocessing, where they lie, what lies beside them."""

import argparse
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file

from mclip import models
from mclip.models import weights

PIXELS = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
CLIPS = {"image_mean": OPENAI_DATASET_MEAN, "image_std": OPENAI_DATASET_STD}
APPLE, OPEN_CLIP = "image_encoder.model.x", "visual.trunk.x"
MISSING = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A folder of the default student."""
    torch.manual_seed(0)
    model, *_ = models.create("demo-student")
    return models.export(model, tmp_path_factory.mktemp("m") / "student")


def same(loaded, folder) -> bool:
    model, *_ = models.create(f"local-dir:{folder}")
    wanted = model.state_dict()
    return all(torch.equal(v, wanted[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("name", [APPLE, OPEN_CLIP])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("arch", "wanted"),
    [(f"MobileCLIP-{size}", PIXELS) for size in ("S0", "S1", "S2", "B")]
    + [(f"MobileCLIP2-{size}", PIXELS) for size in ("S0", "S2", "B")]
    + [(f"MobileCLIP2-{size}", CLIPS) for size in ("S3", "S4", "L-14")],
)
def test_preprocessing_follows_the_model(tmp_path, arch, wanted, suffix, name):
    """Not the suffix, nor the names of the parameters."""
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({name: torch.zeros(1)}, file)
    found, assumption = weights.preprocessing(arch, file)
    assert wanted.items() <= found.items() and found["image_resize_mode"] == "shortest"
    assert found["image_interpolation"] == ("bicubic" if arch.endswith("L-14") else "bilinear")
    assert (assumption is None) == (name == APPLE)  # Apple's own are what was published


def test_weights_whose_branches_are_merged(tmp_path):
    name = "image_encoder.model.patch_embed.0.reparam_conv.weight"
    torch.save({name: torch.zeros(1)}, tmp_path / "mobileclip_s1.pt")
    with pytest.raises(models.ModelError, match=rf"merged for inference \({name}\): take the che"):
        models.create(f"MobileCLIP-S1/{tmp_path}/mobileclip_s1.pt")


def test_other_weights_say_what_is_assumed(tmp_path):
    torch.save({OPEN_CLIP: torch.zeros(1)}, file := tmp_path / "epoch_3.pt")
    found, assumption = weights.preprocessing("ViT-B-16-SigLIP", file)
    assert found["image_mean"] == (0.5,) * 3 and found["image_resize_mode"] == "squash"
    assert "assumed to be that of ViT-B-16-SigLIP's published weights" in assumption
    for arch in ("demo-student", "ViT-L-14"):  # none are published, or with several ones
        found, assumption = weights.preprocessing(arch, file)
        assert found == {} and "assumed to be CLIP's; open_clip_config.json" in assumption
    stated = {"mean": [0.1] * 3, "std": [0.2] * 3, "size": 99}
    config = tmp_path / "open_clip_config.json"
    config.write_text(json.dumps({"preprocess_cfg": stated}))
    found, assumption = weights.preprocessing("MobileCLIP-S1", file)
    assert found == {"image_mean": [0.1] * 3, "image_std": [0.2] * 3} and assumption is None


def test_a_file_of_weights_warns_and_a_folder_does_not(tmp_path, student):
    shutil.copy(student / "open_clip_model.safetensors", file := tmp_path / "mine.safetensors")
    with pytest.warns(UserWarning, match=r"demo-student/.*mine.safetensors: its preprocessing is"):
        assert same(models.create(f"demo-student/{file}")[0], student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.create(f"local-dir:{student}")


@pytest.mark.parametrize(
    "name", ["open_clip_pytorch_model.bin", "model.safetensors", "open_clip_model.safetensors"]
)
def test_folders_as_open_clip_loads_them(tmp_path, student, name, monkeypatch):
    for file in student.iterdir():
        if file.name != "open_clip_model.safetensors":
            shutil.copy(file, tmp_path)
    state = models.create(f"local-dir:{student}")[0].state_dict()
    (torch.save if name.endswith(".bin") else save_file)(state, tmp_path / name)
    assert same(models.create(f"local-dir:{tmp_path}")[0], student)
    assert models.factory.weights_file(f"local-dir:{tmp_path}") == tmp_path / name
    assert len(models.weights_sha256(f"local-dir:{tmp_path}")) == 64
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert same(models.create(f"local-dir:~/{tmp_path.name}")[0], student)
    (tmp_path / name).write_text(MISSING)
    with pytest.raises(models.ModelError, match=rf"{name} is a Git LFS pointer.*git lfs pull`$"):
        models.create(f"local-dir:{tmp_path}")
    (tmp_path / name).unlink()
    with pytest.raises(models.ModelError, match=r"open_clip_model.safetensors is missing$"):
        models.create(f"local-dir:{tmp_path}")


@pytest.mark.filterwarnings("ignore:.*preprocessing is assumed")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_trainers_checkpoint(tmp_path, student, zipped):
    state = models.create(f"local-dir:{student}")[0].state_dict()
    beside = {
        "epoch": 3,
        "loss": np.float64(0.5),
        "step": np.int64(9),
        "done": np.bool_(True),
        "curve": np.arange(3.0),
    }
    file = tmp_path / "epoch_3.pt"
    torch.save(beside | {"state_dict": state}, file, _use_new_zipfile_serialization=zipped)
    assert same(models.create(f"demo-student/{file}")[0], student)


def test_a_checkpoint_with_more_than_numbers(tmp_path):
    file = tmp_path / "epoch_3.pt"
    torch.save({"args": argparse.Namespace(a=1), "loss": np.float64(1)}, file)
    with pytest.raises(models.ModelError) as err:
        models.create(f"demo-student/{file}")
    assert "it holds argparse.Namespace, too: where you trust it, torch.load it" in str(err.value)
    torch.save({"a": argparse.Namespace()}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(models.ModelError, match="is no file of weights alone") as err:
        models.create(f"demo-student/{file}")
    assert "\x1b" not in str(err.value) and "\n" not in str(err.value)
    for name in ("mine.pt", "mine.safetensors"):
        (tmp_path / name).write_text(MISSING)
        with pytest.raises(models.ModelError, match=rf"{name} is a Git LFS pointer"):
            models.create(f"demo-student/{tmp_path / name}")
    (tmp_path / "short.safetensors").write_bytes(b"\0")
    with pytest.raises(models.ModelError, match="short.safetensors is no file of weights alone"):
        models.create(f"demo-student/{tmp_path}/short.safetensors")
