"""mclip.models: names, local-dir folders, folding, encoding."""

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mclip import models
from mclip.models.resnet import FewPositions

CONFIG = {
    "embed_dim": 16,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "resnet10t", "timm_proj": "linear", "image_size": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def tiny(seed=0):
    torch.manual_seed(seed)
    model = open_clip.CustomTextCLIP(**{k: v for k, v in CONFIG.items() if k != "custom_text"})
    for m in model.modules():  # statistics of a trained model, not those of a new one
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 2)
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.4] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    open_clip.model.set_model_preprocess_cfg(model, {**preprocess, "size": 32})
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.export(tiny(), tmp_path_factory.mktemp("m") / "tiny", config=CONFIG)


def test_export_round_trip(folder):
    model, _, preprocess, tokenizer = models.create(f"local-dir:{folder}")
    alone, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    x = torch.randn(2, 3, 32, 32)
    expected = tiny().encode_image(x)
    assert torch.equal(model.eval().encode_image(x), expected)
    assert torch.equal(alone.eval().encode_image(x), expected)
    assert tokenizer(["a cat"]).shape == (1, 8)
    assert model.visual.preprocess_cfg["mean"] == [0.5] * 3 and models.image_size(model) == 32
    assert preprocess(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


def test_export_keeps_other_files_and_bytes(folder, tmp_path):
    (tmp_path / "history.csv").write_text("kept")
    model, *_ = models.create(f"local-dir:{folder}")
    models.export(model, tmp_path)
    first = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    models.export(model, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == first
    assert set(first) == {"history.csv", "open_clip_config.json", "open_clip_model.safetensors"}
    assert models.weights_sha256(f"local-dir:{tmp_path}") == models.weights_sha256(
        f"local-dir:{folder}"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-33", "did you mean ViT-B-32"),
        ("ViT-B-32/nope", "no weights 'nope'"),
        (
            "local-dir:models/teachers/none",
            "none/open_clip_config.json is missing: run `dvc repro teachers` first",
        ),
        ("local-dir:models/students/clip/seed9", "run `dvc repro distill` first"),
    ],
)
def test_one_line_errors(name, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(models.ModelError) as err:
        models.create(name)
    assert message in str(err.value) and "\n" not in str(err.value)


def test_broken_config(tmp_path):
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"text_cfg": {}}))
    with pytest.raises(models.ModelError, match="not an open_clip configuration"):
        models.create(f"local-dir:{tmp_path}")


def norms(model):
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.visual.modules())


def test_folding_is_exact_and_leaves_the_model_alone():
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = models.for_inference(model)
    assert norms(model) > 0 and norms(fast) == 0 and not fast.training
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(
            F.normalize(fast.encode_image(x), dim=-1),
            F.normalize(model.encode_image(x), dim=-1),
            atol=1e-4,
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Net(nn.Module):
    """conv -> bn, but the convolution's own output is read a second time."""

    image_size = 8

    def __init__(self, shared):
        super().__init__()
        self.shared, self.conv, self.bn = shared, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.bn.running_mean.fill_(1.0)
        self.bn.running_var.fill_(3.0)

    def forward(self, x):
        y = self.conv(x)
        return (self.bn(y) + (y if self.shared else 0)).mean((2, 3))


@pytest.mark.parametrize("shared", [False, True])
def test_folding_only_where_it_is_right(shared):
    model = nn.Module()
    model.visual = Net(shared).eval()
    fast = models.for_inference(model)
    assert norms(fast) == (1 if shared else 0)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(fast.visual(x), model.visual(x), atol=1e-4)


class Scaled(nn.Module):
    """conv -> LayerScale, but the convolution's own output may be read a second time."""

    image_size = 8

    def __init__(self, scale, bias, shared):
        super().__init__()
        self.shared, self.conv, self.drop, self.scale = (
            shared,
            nn.Conv2d(3, 4, 3, bias=bias),
            nn.Dropout(0.5),
            scale(4),
        )
        self.scale.gamma.data = torch.tensor([0.5, -2.0, 0.0, 3.0]).reshape(self.scale.gamma.shape)
        self.bn = nn.BatchNorm2d(4)  # of nothing that was made by a convolution: stays

    def forward(self, x):
        y = self.drop(self.conv(x))
        return (
            self.bn(x.mean(1, keepdim=True).expand(-1, 4, -1, -1))[..., 1:-1, 1:-1]
            + self.scale(y)
            + (y if self.shared else 0)
        )


@pytest.mark.parametrize("scale", [timm.layers.LayerScale2d, timm.models.fastvit.LayerScale2d])
@pytest.mark.parametrize(("bias", "shared"), [(True, False), (False, False), (True, True)])
def test_layer_scales_fold_only_where_it_is_right(scale, bias, shared):
    torch.manual_seed(0)
    model = nn.Module()
    model.visual = Scaled(scale, bias, shared).eval()
    weight = model.visual.conv.weight.clone()
    fast = models.for_inference(model)
    assert isinstance(fast.visual.scale, scale) == shared and norms(fast) == 1
    assert torch.equal(model.visual.conv.weight, weight)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(fast.visual(x), model.visual(x), atol=1e-5)
        assert torch.equal(models.for_inference(fast).visual(x), fast.visual(x))


def test_default_student(tmp_path):
    """Its tower ends at stride 16, so that no convolution sees padding alone; folding and export
    keep its outputs.
    """
    torch.manual_seed(0)
    student, *_ = models.create("demo-student")
    trunk, size = student.visual.trunk, models.image_size(student)
    assert trunk.forward_features(torch.zeros(1, 3, size, size)).shape == (1, 256, 2, 2)
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = student.encode_image(x)
        assert torch.allclose(models.for_inference(student).encode_image(x), expected, atol=1e-4)
        again, *_ = models.create(f"local-dir:{models.export(student, tmp_path / 'student')}")
        assert torch.equal(again.encode_image(x), expected)
    with pytest.raises(ValueError, match="no pretrained weights"):
        timm.create_model("mclip_resnet_s16", pretrained=True)


@pytest.mark.parametrize(
    "size, stride, kernel",
    [
        (1, 1, 3),
        (2, 1, 3),
        ((1, 2), 1, 3),
        (3, 2, 3),
        (4, 2, 3),
        (5, 4, 5),
        (2, 1, 1),
        (4, 1, 3),
        (7, 2, 3),
    ],
)
def test_a_convolution_of_few_positions_is_a_convolution(size, stride, kernel):
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 3, kernel, stride, kernel // 2, bias=False).double()
    few = FewPositions.of(plain)
    assert few.weight is plain.weight
    x = torch.randn(
        4,
        5,
        *(size if isinstance(size, tuple) else (size, size)),
        dtype=torch.double,
        requires_grad=True,
    )
    expected, found = (
        conv(x.contiguous(memory_format=torch.channels_last)) for conv in (plain, few)
    )
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        *(torch.autograd.grad(y, (x, plain.weight), upstream) for y in (expected, found)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    small = few.float()(x.float())
    torch.testing.assert_close(small.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_students_last_stage_is_the_same_function_of_its_weights():
    torch.manual_seed(0)
    tower = timm.create_model("mclip_resnet_s16", num_classes=7).eval()
    convs = [m for m in tower.modules() if isinstance(m, FewPositions)]
    x = torch.randn(3, 3, 32, 32)
    found = tower(x)
    for conv in convs:
        conv.__class__ = nn.Conv2d
    assert len(convs) == 2
    torch.testing.assert_close(found, tower(x), rtol=1e-4, atol=1e-5)


def test_encode_texts_dedupes_and_keeps_order(folder):
    model, _, _, tokenizer = models.create(f"local-dir:{folder}")
    texts = ["dog", "a cat", "dog", "a bird"]
    out = models.encode_texts(model.eval(), tokenizer, texts, batch_size=2, precision="fp32")
    with torch.no_grad():
        expected = F.normalize(model.encode_text(tokenizer(texts)), dim=-1)
    assert torch.allclose(out, expected, atol=1e-5) and torch.equal(out[0], out[2])
    assert models.encode_texts(model, tokenizer, []).shape == (0, 0)


def test_encode_images_unit_norm_with_an_uneven_last_batch(folder):
    model, *_ = models.create(f"local-dir:{folder}")
    x = torch.randn(5, 3, 32, 32)
    out = models.encode_images(model.eval(), x.split(2), precision="fp32")
    assert out.shape == (5, 16) and np.allclose(out.norm(dim=1), 1, atol=1e-5)
    assert (
        not out.is_inference() and not out.requires_grad
    )  # inference mode: bf16 attention many times slower


def test_precision():
    assert (
        models.resolve_precision("fp32") == torch.float32
        and models.resolve_precision("bf16") == torch.bfloat16
    )
    assert models.resolve_precision("auto", "cpu") in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="precision"):
        models.resolve_precision("fp8")
