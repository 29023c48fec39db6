"""Shards as people have them: read, or skipped with a line that says what to do."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mclip import cli
from mclip.data import shards, tars
from mclip.data.check import check_shards, expand

from .test_shards import check, pair, picture, write_raw


def encoded(image: Image.Image, fmt: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


# --- where shards lie -----------------------------------------------------------------------------


def test_a_folder_a_home_and_file_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cc3m").mkdir()
    for name in ("00001.tar", "00000.tar", "00000.parquet", "2.tar.gz"):
        (tmp_path / "cc3m" / name).touch()
    tars_there = [f"{tmp_path}/cc3m/{name}" for name in ("00000.tar", "00001.tar", "2.tar.gz")]
    for way in ("~/cc3m", f"{tmp_path}/cc3m", f"file://{tmp_path}/cc3m", f"{tmp_path}/cc*"):
        assert expand([way]) == tars_there
    assert expand(["~/cc3m/{00000..00001}.tar", "file:cc3m/0.tar", "file:///a%20b.tar"]) == [
        *tars_there[:2],
        "cc3m/0.tar",
        "/a b.tar",
    ]


def test_a_folder_without_tars_is_named(tmp_path):
    good = write_raw(tmp_path / "s.tar", pair("a"))
    (tmp_path / "empty").mkdir()
    manifest, keys, _ = check(tmp_path, str(tmp_path / "empty"), good)
    assert keys == ["a"]
    assert "a folder without .tar" in manifest["skipped"][0]["reason"]


def test_urls_that_nothing_opens_are_one_skipped_entry_each(tmp_path, monkeypatch):
    import webdataset.gopen  # noqa: F401
    from webdataset.gopen import gopen_schemes

    def refused(url, *_, **__):  # the hub's library raises errors of its own
        raise RuntimeError("no such repository")

    monkeypatch.setitem(gopen_schemes, "hf", refused)
    good = write_raw(tmp_path / "s.tar", pair("a"))
    urls = [
        "s3://bucket/cc3m/0.tar",
        "hf://datasets/org/name@main/data/0.tar",
        "swift://box/0.tar",
    ]
    manifest, keys, _ = check(tmp_path, *urls, good)
    assert keys == ["a"]
    reasons = {entry["file"]: entry["reason"] for entry in manifest["skipped"]}
    assert list(reasons) == urls
    assert "write `pipe:aws s3 cp s3://bucket/cc3m/0.tar -`" in reasons[urls[0]]
    assert "no such repository" in reasons[urls[1]]
    assert (
        "hf download --repo-type dataset org/name --local-dir FOLDER`, write FOLDER/data/0.tar"
        in reasons[urls[1]]
    )
    assert "write `pipe:COMMAND swift://box/0.tar -`" in reasons[urls[2]]


def test_a_git_lfs_pointer_says_so(tmp_path):
    pointer = tmp_path / "0.tar"
    pointer.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    )
    good = write_raw(tmp_path / "1.tar", pair("a"))
    manifest, keys, _ = check(tmp_path, str(pointer), good)
    assert keys == ["a"]
    assert [e["reason"] for e in manifest["skipped"]] == [
        "a Git LFS pointer, the file itself was not downloaded: run `git lfs pull`"
    ]


# --- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captions", "files"),
    [
        ("cap", [("k.cap", b"a cat\n")]),
        ("caption", [("k.caption", b"a cat")]),
        ("json.caption", [("k.json", json.dumps({"caption": " a cat"}).encode())]),
        ("json.TEXT", [("k.txt", b"a URL"), ("k.json", b'{"TEXT": "a cat"}')]),
    ],
)
def test_captions_elsewhere_are_named_and_can_be_asked_for(tmp_path, captions, files):
    source = write_raw(tmp_path / "s.tar", [("k.png", picture()), *files])
    if len(files) == 1:  # without a .txt
        with pytest.raises(shards.ShardError, match="no good pair"):
            check(tmp_path, source)
        assert shards.as_sample("k", {"png": b"", files[0][0][2:]: files[0][1]}) == (
            f"missing caption: no .txt, but there is {captions} (--captions, data.captions)"
        )
    check_shards([source], tmp_path / "named", captions=captions, workers=1)
    assert shards.read_manifest(tmp_path / "named")["captions"] == captions
    assert [s.caption for s in shards.iter_samples(tmp_path / "named")] == ["a cat"]


def test_the_command_takes_them_too(tmp_path, capsys):
    source = write_raw(tmp_path / "s.tar", [("k.png", picture()), ("k.json", b'{"text": "x"}')])
    assert cli.main(["check", source]) == 1
    assert "there is json.text (--captions" in capsys.readouterr().out
    assert cli.main(["check", source, "--captions", "json.text"]) == 0
    assert "1 samples can be used" in capsys.readouterr().out


def test_a_caption_that_is_no_text(tmp_path):
    files = {"png": b"", "json": b'{"caption": ["a", "b"]}'}
    assert shards.as_sample("k", files, "json.caption") == (
        "caption is no text: json.caption is a list"
    )
    assert shards.as_sample("k", {"png": b"", "json": b"{}"}, "json.caption") == "missing caption"
    files = {"png": b"", "txt": b"a cat"}
    assert "but there is txt (" in shards.as_sample("k", files, "json.caption")


# --- names ----------------------------------------------------------------------------------------


def test_files_that_lie_apart(tmp_path):
    apart = [("a.png", picture(1)), ("b.png", picture(2)), ("a.txt", b"x"), ("b.txt", b"x")]
    source = write_raw(tmp_path / "s.tar", [*pair("c"), *apart, ("d.txt", b"alone")])
    manifest, keys, skipped = check(tmp_path, source)
    assert keys == ["c"] and len(manifest["skipped"]) == 5
    assert skipped["a"] == skipped["b"] and "as `tar --sort=name` writes" in skipped["a"]
    assert skipped["d"] == "missing image"


@pytest.mark.parametrize(
    "files",
    [
        [("k.input.jpg", picture()), ("k.txt", b"x")],
        [("k_0.5_big.png", picture()), ("k_0.5_big.txt", b"x")],
    ],
)
def test_how_a_key_is_made(tmp_path, files):
    source = write_raw(tmp_path / "s.tar", pair("a") + files)
    _, keys, skipped = check(tmp_path, source)
    (reason,) = skipped.values()
    assert keys == ["a"] and reason.startswith("odd extension .")
    assert "a key ends at the first dot of the file's name" in reason


def test_names_are_split_as_webdataset_does():
    from webdataset.tariterators import base_plus_ext

    for name in ("a/b.c/0.input.jpg", "./0.jpg", "0.JPG"):
        base, extension = base_plus_ext(name)
        assert tars.name_parts(name) == (base, extension.lower())
    assert base_plus_ext("a.b/c") == (None, None) and tars.name_parts("a.b/c") == ("a.b/c", "")


# --- pictures -------------------------------------------------------------------------------------


def test_wide_pixels_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 1, 16).reshape(4, 4)
    wanted = (ramp * 255).round()
    wide = {
        "I;16": encoded(Image.fromarray((ramp * 65535).astype(np.uint16))),
        "F": encoded(Image.fromarray(ramp.astype(np.float32)), "TIFF"),
    }
    for mode, data in wide.items():
        assert Image.open(io.BytesIO(data)).mode == mode
        image = shards.decode(data)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image)[..., 0] - wanted).max() <= 1, mode
    files = [(f"k{i}.png", data) for i, data in enumerate(wide.values())]
    files = [entry for name, data in files for entry in ((name, data), (name[:2] + ".txt", b"x"))]
    assert check(tmp_path, write_raw(tmp_path / "s.tar", files))[1] == ["k0", "k1"]


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [([0, 255], np.float32), ([-0.5, 0.5], np.float32), ([0, np.nan], np.float32), ([0, 9], "i4")],
)
def test_pixels_whose_white_is_unknown_are_skipped(tmp_path, pixels, kind):
    data = encoded(Image.fromarray(np.array([pixels], kind)), "TIFF")
    source = write_raw(tmp_path / "s.tar", [*pair("a"), ("k.png", data), ("k.txt", b"x")])
    _, keys, skipped = check(tmp_path, source)
    assert keys == ["a"]
    assert "32-bit pixels from" in skipped["k"] and "floats from 0 to 1" in skipped["k"]


def test_exif_orientation_is_counted_and_not_applied(tmp_path, capsys):
    image = Image.new("RGB", (6, 2), "red")
    exif = Image.Exif()
    files = []
    for key, orientation in (("turned", 6), ("upright", 1)):
        exif[0x0112] = orientation
        files += [(f"{key}.jpg", encoded(image, "JPEG", exif=exif)), (f"{key}.txt", b"x")]
    files += pair("none")
    source = write_raw(tmp_path / "s.tar", files)
    manifest, _, _ = check(tmp_path, source)
    assert manifest["exif_turned"] == 1
    sizes = {s.key: shards.decode(s).size for s in shards.iter_samples(tmp_path / "out")}
    assert sizes["turned"] == sizes["upright"] == (6, 2)
    assert cli.main(["check", source]) == 0
    assert "1 of them have an EXIF orientation" in capsys.readouterr().out


def test_compressed_shards_of_a_folder(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/0.tar.gz", "w:gz") as tar:
        for name, data in pair("a"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    _, keys, skipped = check(tmp_path, str(Path(tmp_path / "in")))
    assert keys == ["a"] and not skipped
