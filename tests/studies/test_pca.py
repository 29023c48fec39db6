"""mclip.models.maps and mclip.studies.pca: the map is what the tower pools, components repeat, and
the masks are those of the pictures.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.decomposition import PCA

from mclip import models
from mclip.models import maps
from mclip.studies import pca


def drawing(colour: str = "red", at: int = 8) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((at, at, at + 40, at + 40), fill=colour)
    return image


@pytest.fixture(scope="module")
def eyes():
    torch.manual_seed(0)
    return {name: maps.load(name) for name in ("demo-student", "demo-mci", "demo-vit")}


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("name", ["demo-student", "demo-mci", "demo-vit"])
def test_the_cells_mean_is_the_pictures_embedding_where_the_head_is_linear(eyes, name):
    eye = eyes[name]
    batch = torch.randn(3, 3, eye.side, eye.side, generator=torch.Generator().manual_seed(1))
    cells = maps.embed_cells(eye.model, maps.feature_map(eye.model, batch))
    with torch.no_grad():
        whole = eye.model.encode_image(batch)
    torch.testing.assert_close(cells.mean((1, 2)), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["demo-student", "demo-vit"])
def test_a_captions_shares_add_up_to_its_cosine(eyes, name):
    images, captions = (
        [drawing("red"), drawing("blue", 16), drawing("green", 2)],
        [["a", "b"], ["c", "a"], ["b", "d"]],
    )
    scores, cosine = maps.caption_maps(eyes[name], images, captions)
    eye = eyes[name]
    with torch.no_grad():
        whole = F.normalize(
            eye.model.encode_image(torch.stack([eye.preprocess(x) for x in images])), dim=-1
        )
    for m in range(2):
        texts = models.encode_texts(eye.model, eye.tokenizer, [own[m] for own in captions])
        np.testing.assert_allclose(cosine[:, m], (whole * texts).sum(1).numpy(), atol=1e-5)
    assert scores.shape[:2] == (3, 2)
    np.testing.assert_allclose(scores.mean((2, 3)), cosine, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "cells"), [("demo-student", 6), ("demo-mci", 6), ("demo-vit", 12)]
)
def test_larger_pictures_have_larger_maps(name, cells):
    torch.manual_seed(0)
    eye = maps.load(name, 96)
    found = maps.feature_maps(eye, [drawing(), drawing("blue"), drawing("lime", 20)] * 4)
    assert found.shape[:3] == (12, cells, cells) and found.dtype == np.float32
    assert (eye.side, eye.own_side) == (96, 32)
    small = maps.load(name)
    large = maps.resized(small, 64)
    assert (small.side, large.side) == (32, 64) and maps.resized(small, 32) is small
    assert (
        maps.feature_maps(small, [drawing()]).shape[1] * 2
        == maps.feature_maps(large, [drawing()]).shape[1]
    )


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        (
            "VisionTransformer",
            {
                "image_size": 32,
                "patch_size": 8,
                "width": 32,
                "layers": 1,
                "heads": 2,
                "mlp_ratio": 2.0,
            },
        ),
        ("ModifiedResNet", {"layers": [1, 1, 1, 1], "image_size": 64, "heads": 2, "width": 8}),
    ],
)
def test_clips_own_towers_take_larger_pictures(arch, options):
    import open_clip.modified_resnet
    import open_clip.transformer

    torch.manual_seed(0)
    module = open_clip.transformer if arch == "VisionTransformer" else open_clip.modified_resnet
    visual = getattr(module, arch)(output_dim=16, **options).eval()
    holder = visual.attnpool if arch == "ModifiedResNet" else visual
    holder.positional_embedding = torch.nn.Parameter(torch.ones_like(holder.positional_embedding))
    model = torch.nn.Module()
    model.visual = visual
    side = 2 * options["image_size"]
    maps._resize(visual, side)
    assert (
        holder.positional_embedding.shape[0]
        == 1 + {"VisionTransformer": 64, "ModifiedResNet": 16}[arch]
    )
    torch.testing.assert_close(
        holder.positional_embedding, torch.ones_like(holder.positional_embedding)
    )
    batch = torch.randn(2, 3, side, side)
    found = maps.feature_map(model, batch)
    assert (
        found.shape[0] == 2
        and maps.embed_cells(model, found).shape[-1] == visual(batch).shape[-1] == 16
    )


# ---------------------------------------------------------------- components


def test_components_are_those_of_sklearn_with_fixed_signs():
    rows = np.random.default_rng(0).normal(size=(50, 7)) * np.arange(1, 8)
    mean, axes = pca.principal(rows, 3)
    want = PCA(3).fit(rows)
    np.testing.assert_allclose(mean, want.mean_)
    np.testing.assert_allclose(np.abs(axes @ want.components_.T), np.eye(3), atol=1e-9)
    assert (axes[np.arange(3), np.abs(axes).argmax(1)] > 0).all()
    np.testing.assert_allclose(pca.principal(rows[::-1], 3)[1], axes, atol=1e-9)


def test_components_of_too_few_rows_are_zero():
    for rows in (np.empty((0, 4)), np.ones((1, 4)), np.ones((5, 4))):
        assert not pca.principal(rows, 3)[1].any()
    assert np.linalg.matrix_rank(pca.principal(np.eye(4)[:2], 3)[1]) == 1


def test_otsu_against_every_threshold_tried_in_turn():
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.normal(0, 1, 60), rng.normal(6, 2, 31)])

    def between(t):
        low, high = values[values <= t], values[values > t]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    best = max((between(t), t) for t in np.sort(values)[:-1])[1]
    cut = pca.otsu(values)
    assert best <= cut < min(values[values > best])


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_what_does_not_lie_at_the_border(sign):
    features = np.random.default_rng(0).normal(size=(2, 6, 6, 5)) * 0.01
    features[:, 2:4, 1:5] += sign * np.array([3.0, 0, 1, 0, 0])
    first, mask = pca.foreground(features)
    want = np.zeros((2, 6, 6), bool)
    want[:, 2:4, 1:5] = True
    assert (mask == want).all() and first[want].min() > first[~want].max()


def test_colours_are_alike_where_features_are_and_the_background_is_paper():
    features = np.zeros((2, 4, 4, 6))
    features[:, :2, :, 0], features[:, 2:, :, 1] = 5, 5
    features[0, 0, 0, 2] = 1
    mask = np.ones((2, 4, 4), bool)
    mask[:, :, 0] = False
    rgb = pca.colours(features, mask, paper=0.5)
    assert rgb.min() >= 0 and rgb.max() <= 1 and (rgb[~mask] == 0.5).all()
    np.testing.assert_allclose(rgb[0, 0, 1], rgb[1, 1, 3])
    assert np.abs(rgb[0, 0, 1] - rgb[0, 3, 1]).max() > 0.5
    assert (pca.colours(features, np.zeros_like(mask)) == 1).all()


# ---------------------------------------------------------------- pictures


def test_a_silhouette_has_the_white_inside_but_not_the_white_around():
    image = drawing("red")
    ImageDraw.Draw(image).ellipse((20, 20, 30, 30), fill="white")
    drawn = pca.silhouette(image)
    assert drawn[25, 25] and drawn[10, 28] and not drawn[1, 1]
    assert pca.silhouette(Image.new("RGB", (8, 8), "navy")) is None  # no white around: a photograph
    assert pca.silhouette(Image.new("RGB", (8, 8), "white")) is None  # nothing is drawn


def test_overlap_is_intersection_over_union_at_the_pictures_resolution():
    drawn = np.zeros((8, 8), bool)
    drawn[:, :4] = True
    assert pca.overlap(np.array([[True, False]] * 2), drawn) == 1
    assert pca.overlap(np.array([[True, True], [False, False]]), drawn) == pytest.approx(16 / 48)
    assert pca.overlap(np.zeros((2, 2), bool), drawn) == 0


def test_the_most_frequent_class_unless_one_is_named(tmp_path):
    from mclip.data.evalsets import Split
    from mclip.evaluate import tasks

    for i in range(4):
        drawing().save(tmp_path / f"{i}.png")
    places = [(str(f), 0, f.stat().st_size) for f in sorted(tmp_path.iterdir())]
    split = Split(list("abcd"), places, [1, 0, 1, 2], ["x", "y", "z"], [], [], [])
    assert [
        (name, len(found))
        for name, found in (
            pca.of_class(split, None, 9),
            pca.of_class(split, "y", 1),
            pca.of_class(split, "z", 9),
        )
    ] == [("y", 2), ("y", 1), ("z", 1)]
    with pytest.raises(ValueError, match="no such class 'w'; there are x, y, z"):
        pca.of_class(split, "w", 1)
    images, texts = pca.one_each(
        split._replace(templates=["a {c}."]), tasks.get("classification"), 5
    )
    assert sorted(texts) == ["a x.", "a y.", "a z."] and len(images) == 3
    captions = [["one", "uno"], ["two"], ["one"], ["three"]]
    captioned = split._replace(answers=captions)
    assert len(set(pca.one_each(captioned, tasks.get("retrieval"), 2)[1])) == 2


def test_quarters_of_a_mosaic_are_its_pictures():
    four = [Image.new("L", (10, 10), level) for level in (10, 60, 110, 160)]
    sheets = pca.mosaics([*four, *four[::-1], four[0]], side=4)
    assert len(sheets) == 2 and sheets[0].size == (8, 8)
    features = np.stack([np.asarray(s)[..., 0] for s in sheets]).astype(float)
    np.testing.assert_allclose(pca.quarters(features), [[10, 60, 110, 160], [160, 110, 60, 10]])
    assert pca.quarters(features[:, None]).shape == (2, 1, 4)
    odd = np.arange(3.0) * np.ones((3, 1))  # the middle column counts for both sides, half
    np.testing.assert_allclose(pca.quarters(odd), [1 / 3, 5 / 3, 1 / 3, 5 / 3])
