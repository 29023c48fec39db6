"""The default data: captions, hold-out, evaluation layout, on tiny fixtures; and whole, where it is
cached.
"""

import io
import json
import re
import tarfile
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mclip import params
from mclip.data import fetch, shards, tars
from mclip.data.demo import build as demo
from mclip.data.demo import captions, emoji, packages
from mclip.data.demo.classes import CLASSES
from mclip.params import registry

ROOT = Path(__file__).parents[2]

SKIN = {"1F3FB": {"unified": "1F44B-1F3FB"}, "1F3FC-1F3FF": {"unified": "1F44B-1F3FC-200D-1F3FF"}}
EMOJI = [
    {
        "unified": "1F44B",
        "category": "People & Body",
        "subcategory": "hand-fingers-open",
        "skin_variations": SKIN,
        "name": "WAVING HAND SIGN",
        "short_name": "wave",
    },
    {
        "unified": "0023-FE0F-20E3",
        "category": "Symbols",
        "subcategory": "keycap",
        "name": "HASH KEY",
        "short_name": "hash",
    },
    {
        "unified": "1F1F9-1F1E9",
        "category": "Flags",
        "subcategory": "country-flag",
        "name": "Chad Flag",
        "short_name": "flag-td",
    },
]
NAMES = {
    "👋": {"tts": ["waving hand"], "default": ["bye", "hand", "Hello", "yo"]},
    "👋🏻": {"tts": ["waving hand: light skin tone"], "default": ["bye"]},
    "👋🏼\u200d🏿": {"tts": ["waving hand: medium-light skin tone, dark skin tone"]},
    "#\ufe0f\u20e3": {"tts": ["keycap: #"]},
    "🇹🇩": {"tts": ["flag: Chad"]},
}
PNG = packages.png(Image.new("RGB", (8, 8), "red"))


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


def _concept(code, name, subgroup="person-role", group="People & Body"):
    return emoji.Concept(
        name, group, subgroup, (emoji.Variant(code, name, (), "", name, name.replace(" ", "_")),)
    )


FAMILIES = [  # what a family has, one a line
    [
        _concept("1f468-200d-1f373", "man cook"),
        _concept("1f469-200d-1f373", "woman cook"),
        _concept("1f9d1-200d-1f373", "cook"),
    ],
    [
        _concept("1f3c3", "person running"),
        _concept("1f3c3-200d-2640-200d-27a1", "woman running, facing right"),
    ],
    [_concept("1f46b", "woman and man holding hands"), _concept("1f46c", "men holding hands")],
    [_concept("1f468", "man"), _concept("1f9d1-200d-1f9b0", "person, red hair")],
    [_concept("1f473", "prince"), _concept("1f478", "princess")],
    [_concept("27a1", "right arrow", "arrow", "Symbols")],
    [_concept("2b05", "left arrow", "arrow", "Symbols")],
]
FLAGS = [_concept("1f1f9-1f1e9", "flag of chad", "country-flag", "Flags")]


def test_families_have_every_gender_and_no_flag():
    found = emoji.families([c for f in FAMILIES for c in f] + FLAGS)
    assert sorted(sorted(c.name for c in f) for f in found) == sorted(
        sorted(c.name for c in f) for f in FAMILIES
    )


def test_every_so_many_families_are_held_out_whole():
    found = FLAGS + [c for f in FAMILIES for c in f]
    trained, unseen = emoji.held_out(found, 3)
    assert sorted(c.code for c in trained + unseen) == sorted(c.code for c in found)
    assert FLAGS[0] in trained
    wholes = [f for f in FAMILIES if {c.code for c in f} & {c.code for c in unseen}]
    assert len(wholes) == 7 // 3 and sum(map(len, wholes)) == len(unseen)


def test_captions_vary_and_are_the_key_s_own():
    hand = emoji.concepts(EMOJI, NAMES)[2].variants[0]
    texts = {captions.clean_emoji(f"noto-{i}", hand, "noto", 0) for i in range(200)}
    assert {"waving hand", "an emoji of waving hand", "a glossy emoji of waving hand"} < texts
    assert any(t.startswith("waving hand, hello") for t in texts) and len(texts) > 6
    assert not any(", hand" in t for t in texts)  # the name says it already
    assert all(t == t.lower() and "waving hand" in t for t in texts)
    # the same on every machine and in every run
    assert [
        captions.clean_emoji(f"noto-{i}", hand, "noto", seed) for seed in (0, 1) for i in (2, 3)
    ] == [
        "waving hand, bye, yo",
        "waving hand, yo",
        "waving hand, hello, yo",
        "waving hand",
    ]


def test_alt_text_is_what_the_packages_hold():
    base, toned, mixed = emoji.concepts(EMOJI, NAMES)[2].variants
    texts = [captions.of_emoji(f"noto-{i}", base, "noto", "1f44b", 0) for i in range(50)]
    assert {t["unicode"] for t in texts} == {"waving hand sign"}
    assert {t["shortcode"] for t in texts} == {":wave:", "wave"}
    assert {t["file"] for t in texts} == {"1f44b"}
    words = {k for t in texts for k in t["keywords"].split(", ")}
    assert words == {"bye", "hand", "hello", "yo"}  # each without the name
    assert toned.shortcode == "wave::skin-tone-2" and mixed.shortcode == "wave::skin-tone-3-6"
    # the mixed one has no keywords: that sort's share goes to the others
    assert "keywords" not in captions.of_emoji("k", mixed, "noto", "x", 0)


def test_sorts_of_alt_text_come_by_their_shares():
    shares = {"name": 0.3, "unicode": 0.15, "shortcode": 0.15, "keywords": 0.2, "file": 0.2}

    def counts(texts):
        sorts = [captions.drawn(f"k{i}", texts, shares, 0)[0] for i in range(4000)]
        return {sort: sorts.count(sort) / 4000 for sort in texts}

    assert counts({s: s for s in shares}) == pytest.approx(shares, abs=0.03)
    photo = counts({"name": "a", "keywords": "b", "file": "c"})
    assert photo == pytest.approx({"name": 3 / 7, "keywords": 2 / 7, "file": 2 / 7}, abs=0.03)
    assert captions.drawn("k", {"name": "a"}, {"name": 0.0, "file": 1.0}, 0) == ("name", "a")


def test_alt_text_of_photos():
    frog = {"🐸": {"tts": ["frog"], "default": ["face", "frog"]}}
    texts = [
        captions.of_photo(f"cifar10-train-{i}", "frog", packages.cifar_file("t-10007"), frog, 0)
        for i in range(30)
    ]
    assert {t["file"] for t in texts} == {"data_batch_2-7"}
    assert {t["keywords"] for t in texts} == {"frog", "frog, face"}
    assert all(t["name"].endswith("frog.") for t in texts)


def test_copies_have_another_size_and_say_of_what():
    image = packages.png(Image.new("RGB", (64, 64), "red"))
    every = SimpleNamespace(seed=0, copies=1.0)
    sides = set()
    for i in range(40):
        (key, same, original), (copy, other, copy_of) = demo._with_copy(f"k{i}", image, every)
        assert (key, same, original) == (f"k{i}", image, "")
        assert (copy, copy_of) == (f"k{i}-copy", f"k{i}")
        sides.add(shards.decode(other).width)
    assert sides == {48, 56, 72, 96}
    half = [len(list(demo._with_copy(f"k{i}", image, SimpleNamespace(seed=0, copies=0.5)))) - 1
            for i in range(400)]  # fmt: skip
    assert sum(half) / 400 == pytest.approx(0.5, abs=0.08)


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
    assert len(set(captions.CIFAR_TEMPLATES)) == 18
    assert {
        "a photo of a {c}.",
        "a black and white photo of the {c}.",
        "a photo of the big {c}.",
    } < set(captions.CIFAR_TEMPLATES)


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
    found = packages.read_emoji(path, "package/img/", {"1f44b", "0023-20e3"}, 8)
    assert {code: picture.file for code, picture in found.items()} == {
        "1f44b": "1f44b",
        "0023-20e3": "0023-fe0f-20e3",
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
    demo.no_demo(tmp_path)
    demo.no_demo(
        tmp_path
    )  # its own note is no hindrance, nor are sets that a run before has written
    demo.write_eval(
        tmp_path / "eval/s",
        splits={"test": [packages.Item("a", PNG, "b")]},
        classes=None,
        templates=None,
        info={},
    )
    demo.no_demo(tmp_path)
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["none.txt"]
    assert shards.read_manifest(tmp_path / "align")["samples"] == 0
    (tmp_path / "eval/wds_imagenet1k/test").mkdir(parents=True)
    for run in (demo.no_demo, lambda out: demo.build(params.load(ROOT / "params.yaml").data, out)):
        with pytest.raises(
            ValueError, match=r"eval/wds_imagenet1k was not made here.* move it to data/sets$"
        ):
            run(tmp_path)
    assert (tmp_path / "eval/wds_imagenet1k/test").is_dir()


def _packages(styles):
    if missing := [name for name in packages.packages_of(styles) if fetch.cached(name) is None]:
        pytest.skip(f"not cached: {', '.join(missing)} (mclip fetch)")
    return {name: fetch.cached(name) for name in packages.packages_of(styles)}


def _eval_tar(folder, split="test"):
    """{key: (target, PNG)}"""
    with open(folder / split / "0.tar", "rb") as file:
        found = {key: files for key, files, _ in tars.groups(file)}
    return {key: (f.get("cls", f.get("txt")).decode(), f["png"]) for key, f in found.items()}


@pytest.fixture(scope="module")
def real():
    """The real concepts: all, trained, held out."""
    found = emoji.concepts(*packages.tables(_packages([])))
    data = params.load(ROOT / "params.yaml").data.demo
    return found, *emoji.held_out(found, data.holdout_every)


@pytest.mark.slow
def test_no_held_out_concept_has_a_trained_twin(real):
    _, trained, unseen = real
    assert len(unseen) > 200 and not {c.group for c in unseen} & {"Flags", "Component"}

    def alike(name):  # apart from the rule of the code: any person is "they", any hair none
        name = re.sub(r"^(wo)?m[ae]n|^person|^people|^old(er)?|, facing right$", "", name)
        return re.sub(r"^ |, .* hair$|, bald$|, beard$", "", name).strip()

    twins = {alike(c.name) for c in trained} & {alike(c.name) for c in unseen}
    assert not twins
    # signs of gender and direction apart, no code of one is that of another
    bare = [
        {re.sub(r"-200d-(2640|2642|27a1)", "", c.code) for c in part} for part in (trained, unseen)
    ]
    assert not bare[0] & bare[1]


@pytest.mark.slow
def test_every_subgroup_has_a_class(real):
    found = real[0]
    assert {c.subgroup for c in found} == set(CLASSES)


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The default build of params.yaml: (folder, result)."""
    data = params.load(ROOT / "params.yaml").data
    _packages(data.demo.styles)
    out = tmp_path_factory.mktemp("default")
    return out, demo.build(data, out)


@pytest.mark.slow
def test_every_default_set_can_tell(default):
    out, result = default
    entries = {name: registry.get(name) for name in registry.SUITES["demo"]}
    assert set(entries) == set(result["eval"])
    for name, manifest in result["eval"].items():
        assert manifest["splits"]["test"]["samples"] >= 500
        if manifest["task"] == "classification":
            targets = Counter(target for target, _ in _eval_tar(out / "eval" / name).values())
            assert min(targets.values()) >= 10
            assert len(targets) == manifest["classes"] == entries[name].classes
    for name in ("emoji-subgroup", "openmoji-color"):
        test, train = (_eval_tar(out / "eval" / name, split) for split in ("test", "train"))
        # the key ends in the concept's code, after the style
        first, second = ({re.sub(r"^.*?-(color-)?", "", key) for key in p} for p in (test, train))
        assert first and second and not first & second
        assert {t for t, _ in train.values()} == {t for t, _ in test.values()}


@pytest.mark.slow
def test_default_pairs(default):
    out, result = default
    pairs = list(shards.iter_samples(out / "pairs"))
    assert 12_000 < len(pairs) == result["pairs"]["samples"] <= 14_000
    photos = [s for s in pairs if s.meta["style"] == "photo"]
    emojis = [s for s in pairs if s.meta["style"] != "photo"]
    data = params.load(ROOT / "params.yaml").data.demo
    shares = data.alt_text.model_dump()
    sorts = Counter(s.meta["alt"] for s in emojis)
    assert {k: n / len(emojis) for k, n in sorts.items()} == pytest.approx(shares, abs=0.02)
    assert {s.meta["alt"] for s in photos} == {"name", "keywords", "file"}
    assert all(s.meta["clean"] == s.caption for s in pairs if s.meta["alt"] == "name")
    assert all(s.caption and s.meta["clean"] for s in pairs)
    copies = [s for s in pairs if s.meta["copy_of"]]
    assert {s.meta["copy_of"] for s in copies} < {s.key for s in pairs}
    assert len(copies) / (len(pairs) - len(copies)) == pytest.approx(data.copies, abs=0.02)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small build from the cached packages, twice."""
    styles = ["noto"]
    _packages(styles)
    demo_data = params.load(ROOT / "params.yaml").data.demo.model_copy(update={
        "styles": styles, "cifar_train": 40, "cifar_probe": 20, "cifar_align": 30, "cifar_test": 20,
        "class_min": 1, "max_concepts": 90, "image_px": 32})  # fmt: skip
    data = params.Data(source="demo", shards=[], shard_size=150, demo=demo_data)
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
    unseen = _eval_tar(out / "a/eval/emoji-unseen")
    names = {target for target, _ in unseen.values()}
    assert len(names) == manifest["eval"]["emoji-unseen"]["splits"]["test"]["targets"] >= 8
    assert not names & concepts and not pictures & {image for _, image in unseen.values()}
    align = list(shards.iter_samples(out / "a/align"))
    assert len(align) == 30 and all(s.caption == s.meta["clean"] for s in align)
    keys = {s.key for s in samples}
    photos = [keys, {s.key for s in align}]
    photos += [set(_eval_tar(out / "a/eval/cifar10", split)) for split in ("test", "train")]
    assert all(not a & b for a, b in combinations(photos, 2))
