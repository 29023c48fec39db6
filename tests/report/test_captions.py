"""mclip.report.captions on made-up captions; tests/pipeline has it describe real sets."""

import numpy as np
import pytest
import torch

from mclip.data.stores.reinforced import Shard
from mclip.report import captions


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("a photo of a cat.", True),
        ("A CAT, sleeping", True),
        ("a cat and a dog", False),  # another class as well
        ("a photo of cattle", False),
        ("a fire truck", False),
    ],
)
def test_a_caption_names_a_class_by_whole_words(caption, right):
    assert captions.names_class(caption, ["dog", "cat", "fire truck"], 1) is right


def test_the_share_of_known_words_counts_repetitions():
    known = captions.words(["A photo of a cat."])
    assert captions.known_words(["a cat cat", "fple"], known) == 0.75
    assert np.isnan(captions.known_words([], known))


def test_similarities_are_means_over_views_and_teachers():
    image = torch.tensor([[[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]])  # 2 views, 2 teachers
    text = torch.tensor([[[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]])
    shard = Shard(["k"], ["a"], [["b"]], np.zeros((1, 2, 4)), image, text)
    assert captions.similarities(shard, 2).tolist() == [[0.75, 0.25]]


def test_goals_are_a_row_a_set():
    described = [
        captions.Described(
            "photos",
            [],
            ["a cat", "a dog"],
            ["a cat", "a fple"],
            np.array([[0.5, 0.4], [0.5, 0.2]]),
            np.array([True, False]),
            np.array([True, True]),
        ),
        captions.Described("icons", [], ["a"], ["a"], np.array([[0.4, 0.4]]), None, None),
    ]
    table = captions.goals(described, {"a", "cat", "dog"})
    assert table.loc["photos"].tolist() == pytest.approx([75, 50, 100, 0.5, 0.3])
    assert table.loc["icons"].isna().tolist() == [False, True, True, False, False]
