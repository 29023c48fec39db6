"""mclip.evaluate against CLIP_benchmark's own code on the same model and set: 0.1 point (here: the
same number).
"""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mclip import evaluate, models
from mclip.losses.contrastive import clip_loss
from mclip.params import EvalSet

from .sets import png, write_classification, write_retrieval

pytest.importorskip("clip_benchmark", reason="`make setup` installs it: tests/peers.txt")

from clip_benchmark.datasets.builder import build_dataset, image_captions_collate_fn
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

NAMES = [
    "crimson",
    "olive tree",
    "navy",
    "teal",
    "purple",
    "orange",
    "grey",
    "white",
    "black sheep",
    "pink",
    "gold",
]
POINT = 1e-3  # a tenth of a point


def colour(rng, label):
    return np.random.default_rng(label).integers(30, 226, 3) + rng.integers(-25, 26, 3)


@pytest.fixture(scope="module")
def model():
    """The default student, trained for a few steps: right often enough to differ from chance."""
    torch.manual_seed(0)
    model, _, preprocess, tokenizer = models.create("demo-student")
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(6):
        labels = rng.permutation(len(NAMES))
        pictures = torch.stack(
            [preprocess(png(colour(rng, label), label, image=True)) for label in labels]
        )
        texts = tokenizer([f"a {NAMES[label]} thing" for label in labels])
        image, text = (
            model.encode_image(pictures, normalize=True),
            model.encode_text(texts, normalize=True),
        )
        clip_loss(image, text, 10.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), preprocess, tokenizer


def theirs(folder, task, preprocess):
    """CLIP_benchmark's loader as its command line builds it."""
    dataset = build_dataset(
        "wds/x", root=str(folder), transform=preprocess, split="test", task=task
    )
    collate = image_captions_collate_fn if task == "zeroshot_retrieval" else None
    return dataset, DataLoader(
        dataset.batched(7, **({"collation_fn": collate} if collate else {})), batch_size=None
    )


def test_zero_shot_classification_is_clip_benchmarks(model, tmp_path, monkeypatch):
    # their `accuracy` calls float() on an array of one number, which numpy no longer takes
    monkeypatch.setattr(
        zeroshot_classification, "float", lambda x: float(np.asarray(x).item()), raising=False
    )
    model, preprocess, tokenizer = model
    rng = np.random.default_rng(1)
    labels = rng.permutation(
        np.repeat(np.arange(len(NAMES)), rng.integers(1, 12, len(NAMES)))
    )  # uneven classes
    templates = ["a {c} thing", "{c}", "a photo of the {c}."]
    folder = write_classification(
        tmp_path / "x",
        [(png(colour(rng, y), i), y) for i, y in enumerate(labels)],
        NAMES,
        templates,
    )
    dataset, loader = theirs(folder, "zeroshot_classification", preprocess)
    expected = zeroshot_classification.evaluate(
        model, loader, tokenizer, dataset.classes, dataset.templates, device="cpu", amp=False
    )
    got = evaluate.evaluate(model, preprocess, tokenizer, {"x": EvalSet(path=str(folder))})["x"]
    assert 0.15 < expected["acc1"] < 0.95 and expected["acc1"] != pytest.approx(
        expected["mean_per_class_recall"], abs=POINT
    )
    assert got["top1"] == pytest.approx(expected["acc1"], abs=POINT)
    assert got["top5"] == pytest.approx(expected["acc5"], abs=POINT)
    assert got["mean_per_class"] == pytest.approx(expected["mean_per_class_recall"], abs=POINT)


@pytest.mark.parametrize("shared", [False, True])
def test_retrieval_is_clip_benchmarks(model, tmp_path, shared):
    model, preprocess, tokenizer = model
    rng = np.random.default_rng(2)
    samples = []
    for i in range(61):
        label = int(rng.integers(len(NAMES)))
        last = f"one {NAMES[label]}" if shared else f"one {NAMES[label]}: {i}"
        texts = [f"a {NAMES[label]} thing number {i}", f"{NAMES[label]} {i}", last][: 1 + i % 3]
        samples.append((png(colour(rng, label), i), texts))
    folder = write_retrieval(tmp_path / "y", samples)
    _, loader = theirs(folder, "zeroshot_retrieval", preprocess)
    expected = zeroshot_retrieval.evaluate(
        model, loader, tokenizer, device="cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    spec = EvalSet(path=str(folder), task="retrieval")
    got = evaluate.evaluate(model, preprocess, tokenizer, {"y": spec})["y"]
    assert expected["image_retrieval_recall@1"] < expected["image_retrieval_recall@10"] < 1
    for k in (1, 5, 10):
        assert got[f"t2i_r{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"], abs=POINT)
        if not shared:  # which of two equal captions comes first in torch.topk is anybody's guess
            assert got[f"i2t_r{k}"] == pytest.approx(
                expected[f"text_retrieval_recall@{k}"], abs=POINT
            )
    distinct = evaluate.evaluate(
        model, preprocess, tokenizer, {"y": spec.model_copy(update={"captions": "distinct"})}
    )["y"]
    if shared:
        assert (
            distinct["t2i_r1"] > got["t2i_r1"] + POINT
        )  # any picture of a shared caption is right
    else:
        assert distinct == got
