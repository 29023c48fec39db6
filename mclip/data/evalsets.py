"""Evaluation sets in CLIP_benchmark's webdataset layout, read as they lie: nothing is unpacked.

SET/{test,train}/{0,1,...}.tar + nshards.txt     KEY.{png,webp,jpg} + what is right for it: KEY.cls
                                                 or .txt, as its task says (mclip.evaluate.tasks)
                                                 KEY.npy: numbers about the picture: its region
SET/classnames.txt                               one class a line; KEY.cls is its number, from 0
SET/zeroshot_classification_templates.txt        one prompt a line, {c} or {} is the class name
SET/dataset_type.txt                             "retrieval" where it is; may be missing

A key includes its folders, so pictures of equal names in class folders are different ones. Tars may
be compressed (N.tar or N.tar.gz), which is slow to read in any other order than theirs.
"""

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mclip.data import tars
from mclip.data.shards import FIRST_DOT, decode
from mclip.data.tars import TARS
from mclip.system.files import LFS_POINTER, is_lfs_pointer

IMAGES = ("png", "jpg", "jpeg", "webp")
# which task reads a file of this extension; there may be none of that name
TASKS = {"cls": "classification", "txt": "retrieval", "npy": "multilabel"}
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # how gzip, bzip2 and xz begin


class EvalError(ValueError):
    """A set that is there but can't be read; the message names the file."""


class Answer(NamedTuple):
    """The file of a sample that says what is right for its picture."""

    extension: str
    parse: Callable[[str], Any]  # its text, stripped; ValueError: what it is not


class Split(NamedTuple):
    """One split of a set: where its pictures lie in the tars, and what is right for each."""

    keys: list[str]
    places: list[tuple[str, int, int]]  # tar, byte offset, bytes
    answers: list[Any]  # what is right for each, as its task reads it: a class number, captions
    classes: list[str]
    templates: list[str]
    problems: list[str]
    groups: list[int]  # a number a picture, where one was asked for


def read_split(
    folder: str | Path,
    answer: Answer | None,
    split: str = "test",
    groups: int | None = None,
) -> Split:
    """Index one split: answers now, pictures by their place in the tar (see `read_image`).

    Parameters
    ----------
    folder : str or Path
        The set's. It may hold the answers of several tasks.
    answer : Answer or None
        The file that says what is right for a picture, of `mclip.evaluate.tasks`:
        `tasks.get("retrieval").ANSWER`. None: pictures only.
    split : str
        "test" or "train".
    groups : int, optional
        The column of KEY.npy to keep as the picture's group.

    Returns
    -------
    Split
        Samples and templates that can't be used are left out and named in its `problems`.

    Raises
    ------
    EvalError
        `folder` is not in this layout, or made for another task; no template has a place for the
        class name.
    """
    folder = Path(folder)
    count = folder / split / "nshards.txt"
    if not count.exists():
        raise EvalError(
            f"{count} is missing: {folder} is not in CLIP_benchmark's webdataset layout"
        )
    classes = _lines(folder / "classnames.txt")
    templates, problems = _templates(folder / "zeroshot_classification_templates.txt")
    out = Split([], [], [], classes, templates, problems if split == "test" else [], [])
    shards, extensions = _count(count), set()
    for number in range(shards):
        path = _tar(folder / split, number)
        if not path.exists():
            out.problems.append(f"{path}: missing, nshards.txt counts {shards}")
            continue
        samples: dict[str, _Sample] = {}
        try:
            for key, extension, member, data in _members(path):
                sample = samples.setdefault(key, _Sample(set()))
                if extension in sample.extensions:
                    out.problems.append(f"{path}: {key}.{extension}: again, the first counts")
                    continue
                sample.extensions.add(extension)
                if extension in IMAGES:
                    sample.place = (str(path), member.offset_data, member.size)
                elif answer and extension == answer.extension:
                    text = _text(data())
                    sample.answer = None if text is None else text.strip()
                elif extension == "npy" and groups is not None:
                    sample.group = _number(data(), groups)
        except tars.DAMAGE as err:
            out.problems.append(
                f"{path}: {err or type(err).__name__}, read {len(samples)} samples of it"
            )
        for key, sample in samples.items():
            extensions |= sample.extensions
            try:
                right = _answer(sample, answer, groups)
            except ValueError as err:
                out.problems.append(f"{path}: {key}: {err}")
                continue
            out.keys.append(key)
            out.places.append(sample.place)  # type: ignore[arg-type]
            out.answers.extend([right] if answer else [])
            out.groups.extend([] if groups is None else [sample.group])  # type: ignore[list-item]
    if answer and extensions and answer.extension not in extensions:
        others = [f"task: {TASKS[e]} has .{e}" for e in TASKS if e in extensions]
        raise EvalError(
            f"{folder}: no sample has a .{answer.extension}, they have "
            f"{', '.join(f'.{e}' for e in sorted(extensions))}"
            + (f"; {' and '.join(others)}" if others else "")
        )
    return out


def task_of(folder: str | Path) -> str:
    """The task that a set is made for: what its dataset_type.txt says, else what its first sample
    has beside the picture.
    """
    folder = Path(folder)
    file = folder / "dataset_type.txt"
    if file.exists():
        return file.read_text().strip().lower()
    path, found = _tar(folder / "test", 0), set()
    with suppress(*tars.DAMAGE):
        for key, extension, *_ in _members(path):
            found.add((key, extension))
            if len({key for key, _ in found}) > 1:
                break
    extensions = {extension for _, extension in found}
    return next((TASKS[e] for e in TASKS if e in extensions), TASKS["cls"])


@dataclass
class _Sample:
    extensions: set[str]
    place: tuple[str, int, int] | None = None
    answer: str | None = ""  # None: not UTF-8
    group: int | None = None


def _members(
    path: Path,
) -> Iterator[tuple[str, str, tarfile.TarInfo, Callable[[], bytes]]]:
    """(key, extension, member, what reads it) of a tar's files."""
    with open(path, "rb") as file:
        if is_lfs_pointer(file.read(64)):
            raise OSError(LFS_POINTER)
    with tarfile.open(path) as tar:
        for member in tar:
            parts = tars.name_parts(member.name) if member.isfile() else None
            if parts:
                yield *parts, member, partial(tars.content, tar, member)
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            # tarfile passes over it
            raise tarfile.ReadError("truncated, no end-of-archive mark")


def _answer(sample: _Sample, answer: Answer | None, groups: int | None) -> Any:
    """What is right for a sample's picture; ValueError says why it can't be used."""
    if sample.place is None:
        odd = next((e for e in sorted(sample.extensions) if e.endswith(IMAGES)), "")
        why = f", .{odd} is none: {FIRST_DOT}" if odd else ""
        raise ValueError(f"no picture ({', '.join(IMAGES)}){why}")
    right = None
    if answer:
        if not sample.answer:
            lacks = "is not UTF-8" if sample.answer is None else "is missing or empty"
            raise ValueError(f"its .{answer.extension} {lacks}")
        try:
            right = answer.parse(sample.answer)
        except ValueError as err:
            raise ValueError(f".{answer.extension} holds {sample.answer[:20]!r}, {err}") from None
    if groups is not None and sample.group is None:
        raise ValueError(f"no .npy with a column {groups}, which the set's metric groups by")
    return right


def at_hand(name: str, sets: Mapping[str, Any], task: str | None = None) -> str:
    """The set `name`, or if it is not here the first one that is, one of the same task before
    others.

    A notebook that shows one set of many should show something where that one has not been fetched;
    which one it became is printed.

    Parameters
    ----------
    name : str
        A key of `sets`.
    sets : mapping of str to EvalSet
    task : str, optional
        What takes its place must be of this task; by default of any.

    Returns
    -------
    str

    Raises
    ------
    EvalError
        No such set is here.
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
            f"{name} is not here ({sets[name].path}), nor is any other"
            f"{f' {task}' if task else ''} set of evaluate.sets: "
            "`dvc repro data` makes the demo's, `mclip sets` tells where to get others"
        )
    other = next((n for n in fits if sets[n].task == sets[name].task), fits[0])
    print(f"{name} is not here ({sets[name].path}), {other} takes its place")
    return other


def read_image(place: tuple[str, int, int]) -> Image.Image:
    """One picture as RGB, transparent parts on white."""
    return decode(read_bytes(place))


def same_pictures(a: Split, b: Split) -> bool:
    """Do two splits hold the same pictures in the same order? They are only read where all sizes
    agree.
    """
    if [size for *_, size in a.places] != [size for *_, size in b.places]:
        return False
    return all(
        one == other or read_bytes(one) == read_bytes(other)
        for one, other in zip(a.places, b.places, strict=True)
    )


def read_bytes(place: tuple[str, int, int]) -> bytes:
    """One picture's encoded file."""
    path, offset, size = place
    with open(path, "rb") as file:
        if file.read(6).startswith(COMPRESSED):
            stream = _unpacked(path, os.stat(path).st_mtime_ns, os.getpid()).fileobj
            stream.seek(offset)
            return stream.read(size)
        file.seek(offset)
        return file.read(size)


@lru_cache(maxsize=4)
def _unpacked(path: str, changed: int, process: int) -> tarfile.TarFile:
    """A compressed tar, open: from picture to picture it is only read on. Each process needs its
    own, a forked one would move its parent's.
    """
    return tarfile.open(path)


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
        answers=pick(split.answers),
        groups=pick(split.groups),
        problems=split.problems + lines,
    )


def _lines(path: Path) -> list[str]:
    """A file's lines; one in the middle may be empty: a class's number is its line's."""
    text = _text(path.read_bytes()) if path.exists() else ""
    if text is None:
        raise EvalError(f"{path}: not UTF-8")
    return [line.strip() for line in text.rstrip().splitlines()]


def _templates(path: Path) -> tuple[list[str], list[str]]:
    """Prompts with {c} for the class name, and what is wrong with others.

    Without a place for the name, all classes would have the same prompt.
    """
    lines = [line for line in _lines(path) if line]
    templates = [re.sub(r"\{[^{}]*\}", "{c}", line) for line in lines]
    problems = [
        f"{path}: {line[:40]!r} has no {{c}}, where the class name goes: left out"
        for line in templates
        if "{c}" not in line
    ]
    if lines and len(problems) == len(lines):
        raise EvalError(f"{path}: no line has {{c}}, where the class name goes")
    return [line for line in templates if "{c}" in line], problems


def _tar(folder: Path, number: int) -> Path:
    """A split's tar, compressed or not; it need not exist."""
    names = [folder / f"{number}{end}" for end in TARS]
    return next((path for path in names if path.exists()), names[0])


def _count(path: Path) -> int:
    text = (_text(path.read_bytes()) or "").strip()
    if not text.isdecimal():
        raise EvalError(f"{path}: expected a number of shards, found {text[:20]!r}")
    return int(text)


def _text(data: bytes) -> str | None:
    """Decode UTF-8; None if it is not."""
    with suppress(UnicodeDecodeError):
        return data.decode()
    return None


def _number(data: bytes, column: int) -> int | None:
    try:
        return int(np.load(io.BytesIO(data), allow_pickle=False).ravel()[column])
    except (ValueError, EOFError, IndexError):
        return None
