"""The default data: captions, hold-out, evaluation layout, on tiny fixtures; and whole, where it is
cached.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mclip import params
from mclip.data import fetch, shards
from mclip.data.demo import build as demo
from mclip.data.demo import emoji, packages

ROOT = Path(__file__).parents[2]

SKIN = {"1F3FB": {"unified": "1F44B-1F3FB"}, "1F3FC-1F3FF": {"unified": "1F44B-1F3FC-200D-1F3FF"}}
EMOJI = [
    {
        "unified": "1F44B",
        "category": "People & Body",
        "subcategory": "hand-fingers-open",
        "skin_variations": SKIN,
    },
    {"unified": "0023-FE0F-20E3", "category": "Symbols", "subcategory": "keycap"},
    {"unified": "1F1F9-1F1E9", "category": "Flags", "subcategory": "country-flag"},
]
NAMES = {
    "👋": {"tts": ["waving hand"], "default": ["bye", "hand", "Hello", "yo"]},
    "👋🏻": {"tts": ["waving hand: light skin tone"], "default": ["bye"]},
    "👋🏼\u200d🏿": {"tts": ["waving hand: medium-light skin tone, dark skin tone"]},
    "#\ufe0f\u20e3": {"tts": ["keycap: #"]},
    "🇹🇩": {"tts": ["flag: Chad"]},
}
PNG = packages._png(Image.new("RGB", (8, 8), "red"))


def test_concepts():
    found = emoji.concepts(EMOJI, NAMES)
    assert [c.name for c in found] == ["keycap #", "flag of chad", "waving hand"]
    hand = found[2]
    assert [v.code for v in hand.variants] == ["1f44b", "1f44b-1f3fb", "1f44b-1f3fc-200d-1f3ff"]
    assert hand.variants[1].name == "waving hand, light skin tone"
    assert [v.tone for v in hand.variants] == [
        "",
        "light skin tone",
        "medium-light and dark skin tone",
    ]
    assert [c.name for c in emoji.concepts(EMOJI, NAMES, limit=2)] == ["keycap #", "flag of chad"]


def test_held_out_is_every_seventh():
    trained, unseen = emoji.held_out(list(range(20)), 7)
    assert unseen == [0, 7, 14] and sorted(trained + unseen) == list(range(20))


def test_captions_vary_and_are_the_key_s_own():
    hand = emoji.concepts(EMOJI, NAMES)[2].variants[0]
    texts = {emoji.caption(f"noto-{i}", hand, "noto") for i in range(200)}
    assert {"waving hand", "an emoji of waving hand", "a glossy emoji of waving hand"} < texts
    assert any(t.startswith("waving hand, hello") for t in texts) and len(texts) > 6
    assert not any(", hand" in t for t in texts)  # the name says it already
    assert all(t == t.lower() and "waving hand" in t for t in texts)
    # the same on every machine and in every run
    assert [emoji.caption(f"noto-{i}", hand, "noto", seed) for seed in (0, 1) for i in (2, 3)] == [
        "waving hand, bye, yo",
        "waving hand, yo",
        "waving hand, hello, yo",
        "waving hand",
    ]


@pytest.mark.parametrize(
    "name, text",
    [("flag: Chad", "flag of chad"), ("keycap: #", "keycap #"), ("Japanese “here” button", "japanese here button"),
     ("kiss: woman, man", "kiss, woman, man"), ("twelve o’clock", "twelve o'clock")],
)  # fmt: skip
def test_plain(name, text):
    assert emoji.plain(name) == text


def test_image_code():
    assert emoji.image_code("0023-FE0F-20E3") == emoji.image_code("0023-20e3") == "0023-20e3"


def test_cifar_templates_are_clip_s():
    assert len(set(demo.CIFAR_TEMPLATES)) == 18
    assert {
        "a photo of a {c}.",
        "a black and white photo of the {c}.",
        "a photo of the big {c}.",
    } < set(demo.CIFAR_TEMPLATES)


def test_rasterise_and_resize_are_on_white():
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><path d="M5 0h5v10H5z"/></svg>'
    image = Image.open(io.BytesIO(packages.rasterise(svg, 16)))
    assert image.size == (16, 16) and image.mode == "RGB"
    assert image.getpixel((2, 8)) == (255, 255, 255) and image.getpixel((13, 8)) == (0, 0, 0)
    clear = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(clear, "WEBP")
    image = Image.open(io.BytesIO(packages.resize(clear.getvalue(), 8)))
    assert image.size == (8, 8) and image.getpixel((4, 4)) == (255, 255, 255)


def test_emoji_package(tmp_path):
    path = tmp_path / "e.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name in (
            "package/img/1f44b.png",
            "package/img/0023-fe0f-20e3.png",
            "package/img/1f999.png",
            "x.png",
        ):
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            tar.addfile(info, io.BytesIO(PNG))
    assert set(packages.read_emoji(path, "package/img/", {"1f44b", "0023-20e3"}, 8)) == {
        "1f44b",
        "0023-20e3",
    }


@pytest.mark.slow
def test_cifar_package(tmp_path):
    pixels = np.zeros((10_000, 32, 32, 3), np.uint8)
    pixels[7] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    strip = io.BytesIO()
    Image.fromarray(pixels.reshape(10_000, 1024, 3)).save(strip, "PNG", compress_level=1)
    files = {
        "data_batch_2.png": strip.getvalue(),
        "train_lables.json": json.dumps([i % 10 for i in range(50_000)]).encode(),
        "test_lables.json": b"[3]",
    }
    with tarfile.open(tmp_path / "c.tgz", "w:gz", compresslevel=1) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (item,) = packages.read_cifar(tmp_path / "c.tgz", {"pairs": np.array([10_007])})["pairs"]
    assert (item.key, item.target) == ("cifar10-train-10007", 7)
    assert (np.asarray(shards.decode(item.image)) == pixels[7]).all()


def test_eval_layout(tmp_path):
    items = {
        "test": [packages.Item("a", PNG, 1), packages.Item("b", PNG, 0)],
        "train": [packages.Item("c", PNG, 1)],
    }
    demo.write_eval(tmp_path / "s", splits=items, classes=["x", "y"], templates=["{c}"], info={})
    names = sorted(
        str(p.relative_to(tmp_path / "s")) for p in (tmp_path / "s").rglob("*") if p.is_file()
    )
    assert names == [
        "classnames.txt",
        "dataset_type.txt",
        "manifest.json",
        "test/0.tar",
        "test/nshards.txt",
        "train/0.tar",
        "train/nshards.txt",
        "zeroshot_classification_templates.txt",
    ]
    assert (tmp_path / "s/classnames.txt").read_text() == "x\ny\n"
    with tarfile.open(tmp_path / "s/test/0.tar") as tar:
        assert tar.getnames() == ["a.cls", "a.png", "b.cls", "b.png"]
        assert tar.extractfile("a.cls").read() == b"1"
    assert demo.read_eval(tmp_path / "s", count=9) == [(PNG, "y"), (PNG, "x")]


def test_sets_of_others_in_the_stage_s_folder_stop_it(tmp_path):
    demo.no_eval(tmp_path)
    demo.no_eval(
        tmp_path
    )  # its own note is no hindrance, nor are sets that a run before has written
    demo.write_eval(
        tmp_path / "eval/s",
        splits={"test": [packages.Item("a", PNG, "b")]},
        classes=None,
        templates=None,
        info={},
    )
    demo.no_eval(tmp_path)
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["none.txt"]
    (tmp_path / "eval/wds_imagenet1k/test").mkdir(parents=True)
    for run in (demo.no_eval, lambda out: demo.build(params.load(ROOT / "params.yaml").data, out)):
        with pytest.raises(
            ValueError, match=r"eval/wds_imagenet1k was not made here.* move it to data/sets$"
        ):
            run(tmp_path)
    assert (tmp_path / "eval/wds_imagenet1k/test").is_dir()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small build from the cached packages, twice."""
    styles = ["noto"]
    if missing := [name for name in packages.packages_of(styles) if fetch.cached(name) is None]:
        pytest.skip(f"not cached: {', '.join(missing)} (mclip fetch)")
    data = params.Data(source="demo", shards=[], shard_size=150, demo=params.DemoData(
        styles=styles, cifar_train=40, cifar_probe=20, cifar_test=20, holdout_every=7, openmoji_every=1, max_concepts=60,
        image_px=32, seed=0))  # fmt: skip
    out = tmp_path_factory.mktemp("demo")
    return out, demo.build(data, out / "a"), demo.build(data, out / "b")


@pytest.mark.slow
def test_build_is_deterministic(built):
    out, one, two = built
    assert one == two
    files = [p.relative_to(out / "a") for p in (out / "a").rglob("*") if p.is_file()]
    assert len(files) > 20
    assert all((out / "a" / f).read_bytes() == (out / "b" / f).read_bytes() for f in files)


@pytest.mark.slow
def test_nothing_held_out_is_trained_on(built):
    out, manifest, _ = built
    samples = list(shards.iter_samples(out / "a/pairs"))
    concepts, pictures = {s.meta["concept"] for s in samples}, {s.image for s in samples}
    with tarfile.open(out / "a/eval/emoji-unseen/test/0.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    unseen = {data.decode() for name, data in files.items() if name.endswith(".txt")}
    assert len(unseen) == manifest["eval"]["emoji-unseen"]["splits"]["test"]["targets"] >= 8
    assert not unseen & concepts and not pictures & {
        d for n, d in files.items() if n.endswith(".png")
    }
    for name in ("openmoji-color", "openmoji-black"):
        classes = (out / f"a/eval/{name}/classnames.txt").read_text().splitlines()
        assert set(classes) <= concepts
    keys = {s.key for s in samples}
    for split in ("test", "train"):
        with tarfile.open(out / f"a/eval/cifar10/{split}/0.tar") as tar:
            assert not keys & {n.partition(".")[0] for n in tar.getnames()}
