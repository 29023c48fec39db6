"""mclip.export: ONNX against torch, the folder, the card, one-line errors."""

import json
import shutil

import onnx
import open_clip
import pytest
import torch

from mclip import cli, export, models
from mclip.models import mct
from mclip.models import onnx as towers
from tests.models.test_mobileclip import TINY, trained

pytestmark = pytest.mark.slow  # exports a model as ONNX

# every kind of layer that is folded: FastViT's blocks and MCt's
SMALL = TINY | {
    "vision_cfg": {
        "timm_model_name": "fastvit_t8",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 64,
    }
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = trained(
        open_clip.CustomTextCLIP(**{k: v for k, v in SMALL.items() if k != "custom_text"})
    )
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.4] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    open_clip.model.set_model_preprocess_cfg(model, {**preprocess, "size": 64})
    return models.export(model, tmp_path_factory.mktemp("m") / "small", config=SMALL)


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "taken"
    assert cli.main(["export", str(folder), str(out)]) == 0
    return out


def test_both_towers_as_onnx(folder, exported):
    model, *_ = models.create(f"local-dir:{folder}")
    for kind in ("image", "text"):
        path, tower = exported / f"{kind}.onnx", towers.Tower(model, kind)
        onnx.checker.check_model(str(path))
        graph = onnx.load(path)
        assert graph.opset_import[0].version >= 18
        assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        for batch in (1, 2, 5):
            assert towers.agreement(path, tower, tower.example(batch, seed=batch)) > 0.9999
        ops = [node.op_type for node in graph.graph.node]
        assert "BatchNormalization" not in ops or kind == "image"
    weights = [i.name for i in onnx.load(exported / "text.onnx").graph.initializer]
    assert not [
        name
        for name in weights
        if "rbr_" in name or ("layer_scale" in name and "token_mixer" in name)
    ]


def test_the_folder_is_open_clips_and_has_its_branches(folder, exported):
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    mine, *_ = models.create(f"local-dir:{folder}")
    assert all(torch.equal(v, mine.state_dict()[k]) for k, v in model.state_dict().items())
    assert not [
        f for f in exported.iterdir() if f.suffix not in (".json", ".safetensors", ".onnx", ".md")
    ]
    assert (exported / "README.md").read_text().startswith("---\n")


def test_a_tower_that_differs_is_not_kept(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "agreement", lambda *_: 0.99)
    assert cli.main(["export", str(folder), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert (
        "image.onnx: cosine 0.990000 to torch's embeddings, expected 0.9999" in said
        and said.count("\n") == 1
    )
    assert not list((tmp_path / "out").glob("*.onnx")) and not list((tmp_path / "out").glob(".*"))


def test_agreement_sees_a_difference(exported, folder):
    model, *_ = models.create(f"local-dir:{folder}")
    model.text.ln_final.bias.data += 1
    tower = towers.Tower(model, "text")
    assert towers.agreement(exported / "text.onnx", tower, tower.example(3)) < 0.9999


def test_a_wrong_name_and_no_pictures(folder, tmp_path, capsys):
    assert cli.main(["export", "MobileCLIP-S9", str(tmp_path / "a")]) == 2
    assert "did you mean MobileCLIP-S" in capsys.readouterr().err
    assert cli.main(["export", str(folder), str(tmp_path / "a"), "--pictures", str(tmp_path)]) == 2
    assert "no picture in it" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_a_model_whose_pictures_are_no_squares(tmp_path):
    config = SMALL | {"vision_cfg": SMALL["vision_cfg"] | {"image_size": [64, 96]}}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
    size = {"size": [64, 96], "mean": [0.5] * 3, "std": [0.4] * 3}
    open_clip.model.set_model_preprocess_cfg(model, size)
    folder = models.export(trained(model), tmp_path / "wide", config=config)
    assert cli.main(["export", str(folder), str(tmp_path / "out")]) == 0
    shape = onnx.load(tmp_path / "out/image.onnx").graph.input[0].type.tensor_type.shape
    assert [side.dim_value for side in shape.dim[1:]] == [3, 64, 96]
    wide, *_ = models.create(f"local-dir:{folder}")
    assert towers.Tower(wide, "image").example(2).shape == (2, 3, 64, 96)


def test_pictures_of_a_folder(tmp_path):
    for i, photo in enumerate(export.photographs(5)):
        photo.save(tmp_path / f"{i}.png")
    assert (
        len(export.read_pictures(tmp_path)) == 5
        and len(export.read_pictures(tmp_path, limit=2)) == 2
    )


def test_the_card_of_a_student(folder, tmp_path, monkeypatch):
    from mclip import params

    shutil.copy("params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    student = tmp_path / "models/students/combined/seed0"
    shutil.copytree(folder, student)
    (student / "training.json").write_text(json.dumps({"pairs": 123, "image_parameters": 4}))
    (tmp_path / "reports/metrics").mkdir(parents=True)
    metrics = {
        "combined": {
            "cifar10": {"top1": {"mean": 0.41, "std": 0.01}},
            "mean": {"mean": 0.1, "sets": []},
        }
    }
    (tmp_path / "reports/metrics/combined.json").write_text(json.dumps(metrics))
    assert cli.main(["export", str(student), str(tmp_path / "out"), "--no-onnx"]) == 0
    text = (tmp_path / "out/README.md").read_text()
    p = params.load()
    assert f"samples seen: {p.distill.train.samples}" in text and "pairs: 123" in text
    assert "cifar10: top1 41.0 %" in text and "Twemoji (CC-BY 4.0)" in text
    assert str(tmp_path) not in text


def test_the_card_of_published_weights_names_their_licence(tmp_path):
    (tmp_path / "mobileclip_s0.pt").write_bytes(b"")
    details = export.card(f"MobileCLIP-S0/{tmp_path}/mobileclip_s0.pt")["details"]
    assert "research purposes only" in " ".join(details["Licences"])
    assert "weights: no training is known of" in export.card("MobileCLIP-S0")["details"]["Licences"]
    assert mct.KEY in models.create("MobileCLIP-S0", device="cpu")[0].mclip["config"]["text_cfg"]
