"""Evaluation sets in CLIP_benchmark's webdataset layout, read as they lie: nothing is unpacked.

SET/{test,train}/{0,1,...}.tar + nshards.txt     KEY.{png,webp,jpg} + KEY.cls or .txt (a caption a line)
                                                 KEY.npy: numbers about the picture, such as its region
SET/classnames.txt                               one class a line; KEY.cls is its line number, from 0
SET/zeroshot_classification_templates.txt        one prompt a line, {c} is the class name
"""

import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGES = ("png", "jpg", "jpeg", "webp")
ANSWER = {"classification": "cls", "retrieval": "txt"}


class EvalError(ValueError):
    """A set that is there but can't be read; the message names the file."""


class Split(NamedTuple):
    """One split of a set: where its pictures lie in the tars, and what is right for each."""

    keys: list[str]
    places: list[tuple[str, int, int]]  # tar, byte offset, bytes
    labels: list[int]  # classification, else empty
    captions: list[list[str]]  # retrieval, else empty
    classes: list[str]
    templates: list[str]
    problems: list[str]
    groups: list[int] = []  # noqa: RUF012 - a number a picture, where one was asked for; never changed in place


def read_split(
    folder: str | Path, task: str, split: str = "test", groups: int | None = None
) -> Split:
    """Index one split: labels or captions now, pictures by their place in the tar (see
    `read_image`).

    task: "classification" reads KEY.cls, "retrieval" KEY.txt. A set may hold both.
    groups: the column of KEY.npy to keep as the picture's group.
    """
    folder, answer = Path(folder), ANSWER[task]
    count = folder / split / "nshards.txt"
    if not count.exists():
        raise EvalError(
            f"{count} is missing: {folder} is not in CLIP_benchmark's webdataset layout"
        )
    classes, templates = (
        _lines(folder / "classnames.txt"),
        _lines(folder / "zeroshot_classification_templates.txt"),
    )
    keys, places, labels, captions, problems, group = [], [], [], [], [], []
    for number in range(_count(count)):
        path = folder / split / f"{number}.tar"
        if not path.exists():
            problems.append(f"{path}: missing, nshards.txt counts {count.read_text().strip()}")
            continue
        samples: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.isfile():
                        key, _, ext = member.name.rpartition("/")[2].partition(".")
                        sample = samples.setdefault(key, {})
                        if ext.lower() in IMAGES:
                            sample["place"] = (str(path), member.offset_data, member.size)
                        elif ext == answer:
                            sample["answer"] = _text(tar.extractfile(member).read())
                        elif ext == "npy" and groups is not None:
                            sample["group"] = _number(tar.extractfile(member).read(), groups)
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError(
                        "truncated, no end-of-archive mark"
                    )  # tarfile passes over it
        except (tarfile.TarError, OSError) as err:
            problems.append(
                f"{path}: {err or type(err).__name__}, read {len(samples)} samples of it"
            )
        for key, sample in samples.items():
            if "place" not in sample:
                problems.append(f"{path}: {key}: no picture ({', '.join(IMAGES)})")
            elif not (sample.get("answer") or "").strip():
                lacks = (
                    "is not UTF-8" if sample.get("answer", "") is None else "is missing or empty"
                )
                problems.append(f"{path}: {key}: its .{answer} {lacks}")
            elif task == "classification" and not sample["answer"].strip().isdecimal():
                problems.append(
                    f"{path}: {key}: .cls holds {sample['answer'].strip()[:20]!r}, not a class number"
                )
            elif groups is not None and sample.get("group") is None:
                problems.append(
                    f"{path}: {key}: no .npy with a column {groups}, which the set's metric groups by"
                )
            else:
                keys.append(key)
                places.append(sample["place"])
                group.extend([sample["group"]] if groups is not None else [])
                if task == "classification":
                    labels.append(int(sample["answer"]))
                else:
                    captions.append(
                        [line.strip() for line in sample["answer"].splitlines() if line.strip()]
                    )
    return Split(keys, places, labels, captions, classes, templates, problems, group)


def at_hand(name: str, sets: Mapping[str, Any], task: str | None = None) -> str:
    """The set `name`, or if it is not here the first one that is, one of the same task before
    others.

    A notebook that shows one set of many should show something where that one has not been fetched;
    which one it became is printed.

    Parameters
    ----------
    sets : name -> params.EvalSet.
    task : what takes its place must be of this task; None: any.

    Raises
    ------
    EvalError : no such set is here.
    """
    fits = [
        n
        for n in sets
        if task in (None, sets[n].task) and (Path(sets[n].path) / "test" / "nshards.txt").exists()
    ]
    if name in fits:
        return name
    if not fits:
        raise EvalError(
            f"{name} is not here ({sets[name].path}), nor is any other{f' {task}' if task else ''} set of "
            "evaluate.sets: `mclip sets` tells where to get them"
        )
    other = next((n for n in fits if sets[n].task == sets[name].task), fits[0])
    print(f"{name} is not here ({sets[name].path}), {other} takes its place")
    return other


def read_image(place: tuple[str, int, int]) -> Image.Image:
    """One picture as RGB, transparent parts on white."""
    image = Image.open(io.BytesIO(_bytes(place)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def same_pictures(a: Split, b: Split) -> bool:
    """Do two splits hold the same pictures in the same order? They are only read where all sizes
    agree.
    """
    if [size for *_, size in a.places] != [size for *_, size in b.places]:
        return False
    return all(
        one == other or _bytes(one) == _bytes(other)
        for one, other in zip(a.places, b.places, strict=True)
    )


def _bytes(place: tuple[str, int, int]) -> bytes:
    path, offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, places: list[tuple[str, int, int]], preprocess):
        self.places, self.preprocess = places, preprocess

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[int, Tensor | str]:
        try:
            return i, self.preprocess(read_image(self.places[i]))
        except Exception as err:  # any decoder error: the picture is named, the rest goes on
            return i, re.sub(r" ?<.*?>", "", f"{type(err).__name__}: {err}")  # no memory address


def _collate(
    items: list[tuple[int, Tensor | str]],
) -> tuple[list[int], Tensor | None, dict[int, str]]:
    good = [(i, x) for i, x in items if isinstance(x, Tensor)]
    bad = {i: x for i, x in items if not isinstance(x, Tensor)}
    return [i for i, _ in good], torch.stack([x for _, x in good]) if good else None, bad


def batches(
    split: Split, preprocess, batch_size: int = 256, workers: int = 0
) -> Iterator[tuple[list[int], Tensor | None, dict[int, str]]]:
    """(indices, (b, 3, h, w) pictures, {index: why} of the broken ones) in the split's order."""
    workers = (
        workers if len(split.places) > batch_size else 0
    )  # starting two processes costs more than 256 pictures
    yield from torch.utils.data.DataLoader(
        _Pictures(split.places, preprocess), batch_size, num_workers=workers, collate_fn=_collate
    )


def without(split: Split, kept: list[int], broken: dict[int, str]) -> Split:
    """The split with the samples `kept` only, and the broken ones named among its problems."""
    pick = lambda values: [values[i] for i in kept] if len(values) == len(split.keys) else values  # noqa: E731
    lines = [
        f"{split.places[i][0]}: {split.keys[i]}: picture can't be read ({why})"
        for i, why in broken.items()
    ]
    return split._replace(
        keys=pick(split.keys),
        places=pick(split.places),
        labels=pick(split.labels),
        captions=pick(split.captions),
        groups=pick(split.groups),
        problems=split.problems + lines,
    )


def _lines(path: Path) -> list[str]:
    """A file's lines; one in the middle may be empty: a class's number is its line's."""
    text = _text(path.read_bytes()) if path.exists() else ""
    if text is None:
        raise EvalError(f"{path}: not UTF-8")
    return [line.strip() for line in text.rstrip().splitlines()]


def _count(path: Path) -> int:
    text = (_text(path.read_bytes()) or "").strip()
    if not text.isdecimal():
        raise EvalError(f"{path}: expected a number of shards, found {text[:20]!r}")
    return int(text)


def _text(data: bytes) -> str | None:
    """None where it is not UTF-8."""
    with suppress(UnicodeDecodeError):
        return data.decode()
    return None


def _number(data: bytes, column: int) -> int | None:
    try:
        return int(np.load(io.BytesIO(data), allow_pickle=False).ravel()[column])
    except (ValueError, EOFError, IndexError):
        return None
