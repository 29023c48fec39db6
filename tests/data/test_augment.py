"""mclip.data.augment: drawn from the key alone, replayed to the same pixels, readable from the
published layout.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from mclip.data import augment

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def test_rows_depend_on_key_and_seed_only():
    first = augment.draw("a", (40, 30), 5, image_px=16, seed=0)
    assert np.array_equal(first, augment.draw("a", (40, 30), 5, image_px=16, seed=0))
    assert not np.array_equal(first, augment.draw("b", (40, 30), 5, image_px=16, seed=0))
    assert not np.array_equal(first, augment.draw("a", (40, 30), 5, image_px=16, seed=1))


def test_crops_stay_inside_and_keep_scale_and_ratio():
    rows = np.concatenate(
        [augment.draw(f"{i}", (40, 30), 20, image_px=16, seed=0) for i in range(50)]
    )
    top, left, height, width = rows[:, :4].T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 30).all() and (left + width <= 40).all()
    share = height * width / (40 * 30)
    assert share.min() < 0.12 and share.max() > 0.8 and share.min() > 0.05
    assert ((width / height) > 0.6).all() and ((width / height) < 1.6).all()
    assert set(rows[:, 4]) == set(range(len(augment.OPS)))  # every operation occurs
    assert (rows[:, 5] < 0).any() and (rows[:, 5] > 0).any()  # signed magnitudes both ways


def test_a_very_wide_image_still_gets_a_crop():
    row = augment.draw("k", (400, 3), 4, image_px=16, seed=0)[0]
    assert row[2] <= 3 and row[3] <= 400 and min(row[2:4]) >= 1


def test_replay_of_the_whole_image_is_a_plain_resize():
    row = np.asarray([0, 0, 30, 40], np.float32)
    expected = PHOTO.resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(augment.replay(PHOTO, row, 16)), np.asarray(expected))


@pytest.mark.parametrize("op", range(len(augment.OPS)))
def test_every_operation_replays_the_same_twice(op):
    row = np.asarray([2, 3, 20, 25, op, 0.3, 0, 0], np.float32)
    if augment.OPS[op] in ("Posterize", "Solarize"):
        row[5] = 4
    a, b = (np.asarray(augment.replay(PHOTO, row, 16)) for _ in range(2))
    assert a.shape == (16, 16, 3) and np.array_equal(a, b)
    plain = np.asarray(augment.replay(PHOTO, row[:4], 16))
    assert np.array_equal(a, plain) == (augment.OPS[op] in ("Identity",)) or op in (3, 4, 12)


def test_to_input_normalises_and_resizes():
    pixels = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    x = augment.to_input(pixels, 12, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert x.shape == (2, 3, 12, 12) and torch.allclose(x, torch.full_like(x, 2.0))


def test_published_layout_both_ways():
    published = [[[1, 2, 10, 12], [[1, 0.3], [6, -0.2]]], [[0, 0, 5, 5], [[0, 0.0], [13, None]]]]
    rows = augment.from_published(published)
    assert rows.shape == (2, 8) and rows[0].tolist()[:5] == [1, 2, 10, 12, 1]
    assert augment.to_published(rows)[0][0] == [1, 2, 10, 12]
    with pytest.raises(ValueError, match=r"param_aug\[1\]"):
        augment.from_published([published[0], [[1, 2], []]])
