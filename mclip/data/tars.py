"""Tars as streams: written with nothing but the samples, read as far as they are readable.

webdataset writes them and opens URLs. They are read by the standard library, for two reasons: a
damaged tar must still yield its good samples, and webdataset imports torch, which processes that
only read do not need.
"""

import hashlib
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mclip.system.files import LFS_POINTER, is_lfs_pointer

TARS = (".tar", ".tar.gz", ".tgz")  # how the names of tars end
# what reading a damaged tar raises, compressed or not
DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


def write_tar(path: str | Path, samples: Iterable[dict[str, Any]]) -> tuple[int, str]:
    """A tar of {"__key__": key, extension: bytes, ...} with nothing in it but them: same samples,
    same bytes.

    Returns (samples, sha256). Names are sorted within a sample; time 0, a fixed owner.
    """
    from webdataset import TarWriter

    count = 0
    with open(path, "wb") as file:
        writer = TarWriter(
            file, user="mclip", group="mclip", mode=0o644, mtime=0, encoder=False, compress=False
        )
        for count, sample in enumerate(samples, 1):  # noqa: B007 - the last count is what is returned
            writer.write(sample)
        writer.close()
    with open(path, "rb") as file:
        return count, hashlib.file_digest(file, "sha256").hexdigest()


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a regular file."""
    return tar.extractfile(member).read()  # type: ignore[union-attr]


def name_parts(name: str) -> tuple[str, str] | None:
    """A member's key and its extension in lower case, as webdataset splits them: at the first dot
    of the file's name, so a key includes its folders. None: a file beside the samples.

    >>> name_parts("cats/0001.input.JPG"), name_parts("cats/._0001.jpg")
    (('cats/0001', 'input.jpg'), None)
    """
    folder, slash, file = name.rpartition("/")
    if file.startswith(("__", "._")):  # webdataset's own entries, macOS's forks
        return None
    base, _, extension = file.partition(".")
    return folder + slash + base, extension.lower()


def groups(
    stream: "BinaryIO | Recorder",
) -> Iterator[tuple[str | None, dict[str, bytes], str | None]]:
    """(key, {extension: bytes}, None) for each sample of a tar, in order, as far as the tar is
    readable.

    With a reason in place of None: a file that is part of no sample (it has no files then), and the
    last sample of a damaged tar, which may be incomplete. A damaged tar ends with (None, {}, what
    is wrong with it). An extension that comes again starts a new sample, so that adjacent
    duplicates are told apart.
    """
    key: str | None = None
    files: dict[str, bytes] = {}
    damage: str | None = None
    try:
        # not closed: that would read what is damaged
        tar: tarfile.TarFile = tarfile.open(fileobj=stream, mode="r|*")  # type: ignore[call-overload]  # noqa: SIM115
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # a stream of millions stays small
            if not member.isreg():
                continue
            parts = name_parts(member.name)
            if parts is None:
                continue
            data = content(tar, member)
            own, ext = parts
            if not ext or own.endswith("/") or not own:
                yield member.name, {}, "odd extension: none"
                continue
            if own != key or ext in files:
                if key is not None:
                    yield key, files, None
                key, files = own, {}
            files[ext] = data
        damage = stream.damage(tar.offset) if isinstance(stream, Recorder) else None
    except DAMAGE as err:
        damage = short(err)
        if isinstance(stream, Recorder) and is_lfs_pointer(stream.start):
            yield None, {}, LFS_POINTER
            return
    if key is not None:
        yield key, files, "cut off: the tar ends within it" if damage else None
    if damage:
        yield None, {}, f"truncated or damaged tar: {damage}"


class Recorder:
    """A stream that notes its sha256, length and last non-zero byte while it is read.

    tarfile takes a cut between two members, or rubbish where a header should be, for the end of the
    archive; the two numbers tell them apart from a proper end.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()
        self.length, self.content_end = 0, 0
        self.plain: bool | None = None
        self.start = b""

    def read(self, size: int = -1) -> bytes:
        try:
            data = self.file.read(size)
        except OSError:
            if not self.length:
                raise
            data = b""  # what a failing disk gave so far counts as a truncated tar
        if self.plain is None:
            self.plain = data[257:262] == b"ustar"  # not compressed: offsets mean what they say
            self.start = data[:64]
        self.sha256.update(data)
        if content := len(data.rstrip(b"\0")):
            self.content_end = self.length + content
        self.length += len(data)
        return data

    def drain(self) -> None:
        while self.read(1 << 20):
            pass

    def damage(self, end: int) -> str | None:
        """What is wrong with a tar whose members end at byte `end`."""
        self.drain()
        if self.plain and self.length < end + tarfile.BLOCKSIZE:
            return "no end-of-archive mark"
        if self.plain and self.content_end > end:
            return f"unreadable after byte {end}"
        return None


def is_url(source: str) -> bool:
    """Whether webdataset opens it (https://, s3://, pipe:...) rather than the file system."""
    return "://" in source or source.startswith("pipe:")


def open_source(source: str) -> BinaryIO:
    """Open a shard; OSError says in a line what to write instead of a URL that nothing opens."""
    if not is_url(source):
        return open(source, "rb")
    from webdataset.gopen import gopen

    try:
        stream = gopen(source, "rb")
    except OSError:
        raise
    except Exception as err:  # each scheme has its own library, and that its own errors
        raise OSError(f"can't be opened ({short(err)}): {_instead(source)}") from err
    # a command that fails, or that is stopped before its end, must not take the samples that it
    # gave with it: what it left out is seen from the tar itself
    stream.ignore_errors = True
    return stream


def _instead(url: str) -> str:
    """What to write for a URL that can't be opened."""
    scheme, _, rest = url.partition("://")
    if scheme == "hf":
        parts = rest.removeprefix("datasets/").split("/")
        repository, file = "/".join(parts[:2]).partition("@")[0], "/".join(parts[2:])
        return (
            f"run `hf download --repo-type dataset {repository} --local-dir FOLDER`, "
            f"write FOLDER/{file}"
        )
    command = "aws s3 cp" if scheme == "s3" else "COMMAND"
    return f"write `pipe:{command} {url} -`, a command that prints the tar"


def short(err: Exception) -> str:
    """An exception in a few words, without the memory addresses that Pillow prints."""
    return re.sub(r"<[^>]*>", "file", str(err) or type(err).__name__)[:120]
