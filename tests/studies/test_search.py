"""mclip.studies.search: what is found for a text, against every cosine by itself."""

import numpy as np
import pytest
import torch
from PIL import Image

from mclip import models
from mclip.data.evalsets import Split, read_image
from mclip.evaluate.tasks import classification, retrieval
from mclip.studies import search


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(folder / f"{i}.png")
    places = [(str(f), 0, f.stat().st_size) for f in sorted(folder.iterdir())]
    captions = [["cat"], ["dog", "hound"], ["cat"], ["cow"], ["hound"], ["owl"], ["cat"]]
    return Split([str(i) for i in range(7)], places, captions, [], [], [], [])


@pytest.fixture(scope="module")
def classes(split):
    return split._replace(
        answers=[0, 1, 0, 3, 1, 0, 3],
        classes=["cat", "dog", "fox", "cow"],
        templates=["a {c}", "the {c}."],
    )


def test_questions_know_their_right_pictures(split, classes):
    asked = search.questions(split, retrieval)
    assert asked.texts == ["cat", "dog", "hound", "cow", "owl"]
    assert [np.flatnonzero(row).tolist() for row in asked.right] == [
        [0, 2, 6],
        [1],
        [1, 4],
        [3],
        [5],
    ]
    asked = search.questions(classes, classification)
    assert asked.texts == ["cat", "dog", "cow"] and asked.prompts[1] == ["a dog", "the dog."]
    assert [np.flatnonzero(row).tolist() for row in asked.right] == [[0, 2, 5], [1, 4], [3, 6]]
    assert search.free(["x", "y"]).right is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captions", "classes"])
def test_pictures_come_by_cosine(split, classes, kind, tmp_path):
    of, task = (split, retrieval) if kind == "captions" else (classes, classification)
    torch.manual_seed(0)
    made, _, preprocess, tokenizer = models.create("demo-student")
    models.export(made, tmp_path / "model")
    asked = search.questions(of, task)
    found = search.search(f"local-dir:{tmp_path / 'model'}", of, asked, batch_size=3)
    with torch.no_grad():
        pictures = [
            made.encode_image(preprocess(read_image(p))[None])[0].double() for p in of.places
        ]
        for row, own in zip(found, asked.prompts, strict=True):
            text = sum(
                torch.nn.functional.normalize(made.encode_text(tokenizer([t]))[0], dim=0)
                for t in own
            ).double()
            cosine = [torch.cosine_similarity(text, x, dim=0).item() for x in pictures]
            assert sorted(row) == list(range(7))
            assert (np.diff(np.array(cosine)[row]) < 1e-6).all()


def test_precision_and_chance(split):
    asked = search.questions(split, retrieval)
    found = np.array(
        [
            [0, 2, 6, 1, 3, 4, 5],
            [0, 1, 2, 3, 4, 5, 6],
            [1, 0, 4, 2, 3, 5, 6],
            [0, 1, 2, 4, 5, 6, 3],
            [5, 0, 1, 2, 3, 4, 6],
        ]
    )
    np.testing.assert_allclose(search.precision(found, asked, 1), [1, 0, 1, 0, 1])
    np.testing.assert_allclose(search.precision(found, asked, 3), [1, 1, 1, 0, 1])
    np.testing.assert_allclose(search.precision(found, asked, 2), [1, 1, 0.5, 0, 1])
    rng = np.random.default_rng(0)
    drawn = np.mean(
        [
            search.precision(np.stack([rng.permutation(7) for _ in range(5)]), asked, 2).mean()
            for _ in range(4000)
        ]
    )
    assert search.chance(asked, 2) == pytest.approx(drawn, abs=0.01)
