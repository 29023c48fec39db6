"""Asks of CONTRIBUTING.md that no other test shows: another data source, a teacher of another family."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mclip import embed, models, params
from mclip.data import overview, shards
from mclip.data.stores import embeddings
from mclip.params import ParamsError
from tests.models.test_models import CONFIG, tiny

torch.set_num_threads(1)


def squares(folder):
    """A source: pictures and captions of its own, as shards of pairs."""

    def samples():
        for i, colour in enumerate(["red", "green", "blue", "white", "black"]):
            Image.new("RGB", (32, 32), colour).save(file := io.BytesIO(), "PNG")
            caption = f"a {colour} square"
            yield shards.Sample(f"{i:04d}", file.getvalue(), "png", caption, {"style": "squares"})

    return shards.write_shards(samples(), folder, shard_size=2, info={"sources": []})


def test_a_source_is_what_writes_shards_of_pairs(tmp_path):
    """All that the later stages ask of a source is its folder of pairs."""
    manifest = squares(tmp_path / "pairs")
    assert (manifest["samples"], len(manifest["shards"])) == (5, 3)
    shown = overview.table(tmp_path / "pairs")  # what the notebook of the stage looks at
    assert set(shown["part"]) == {"squares"} and shown["caption"][2] == "a blue square"
    name = f"local-dir:{models.export(tiny(), tmp_path / 'teacher', config=CONFIG)}"
    options = {"pairs": tmp_path / "pairs", "out": tmp_path / "embeddings", "decoders": 0}
    embed.run({"teacher": name}, precision="fp32", **options)
    found = embeddings.load(tmp_path / "embeddings/teacher")
    assert found.keys == ["0000", "0001", "0002", "0003", "0004"]
    assert found.captions == shown["caption"].tolist()


def test_a_source_is_a_word_of_the_schema():
    tree = params.read_yaml("params.yaml")
    tree["data"]["source"] = "squares"
    with pytest.raises(ParamsError, match=r"data\.source: Input should be 'demo' or 'webdataset'"):
        params.check(tree)


def test_a_teacher_with_siglips_bias_needs_no_code(tmp_path):
    """SigLIP trains a bias beside the logit scale: a model string is all that a teacher is."""
    plain = tiny()
    plain.logit_bias = torch.nn.Parameter(torch.full([], -10.0))
    config = CONFIG | {"init_logit_bias": -10.0}
    name = f"local-dir:{models.export(plain, tmp_path / 'siglip', config=config)}"
    assert models.create(name)[0].logit_bias == -10
    squares(tmp_path / "pairs")
    options = {"pairs": tmp_path / "pairs", "out": tmp_path / "embeddings", "decoders": 0}
    embed.run({"siglip": name}, precision="fp32", **options)
    found = embeddings.load(tmp_path / "embeddings/siglip")
    assert found.logit_scale == pytest.approx(models.logit_scale(plain), rel=1e-4)
    norms = np.linalg.norm(found.text.astype(np.float32), axis=1)
    assert np.allclose(norms, 1, atol=2e-3)
