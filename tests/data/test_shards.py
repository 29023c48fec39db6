"""Shards: same samples, same bytes; each kind of bad input is named and nothing else is lost."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mclip.data import shards, tars
from mclip.data.check import check_shards, expand
from mclip.data.shards import Sample, ShardError
from mclip.data.stores import lookup


def picture(seed: int = 0, fmt: str = "PNG", size: int = 16) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, fmt)
    return file.getvalue()


def pairs(count: int, start: int = 0) -> list[Sample]:
    return [
        Sample(f"k{i:03d}", picture(i), "png", f"caption {i}", {"i": i})
        for i in range(start, start + count)
    ]


def write_raw(path, files: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def pair(key: str, seed: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", picture(seed)), (f"{key}.txt", b"a thing"), (f"{key}.json", b"{}")]


def check(tmp_path, *sources: str) -> tuple[dict, list[str], dict]:
    """(manifest, keys that iter_samples gives, {key: reason})"""
    manifest = check_shards(sources, tmp_path / "out", workers=1)
    keys = [s.key for s in shards.iter_samples(tmp_path / "out")]
    assert len(keys) == manifest["samples"]
    return manifest, keys, {entry["key"]: entry["reason"] for entry in manifest["skipped"]}


def test_round_trip(tmp_path):
    samples = pairs(7)
    manifest = shards.write_shards(samples, tmp_path / "p", shard_size=3)
    assert [s["samples"] for s in manifest["shards"]] == [3, 3, 1]
    assert manifest == shards.read_manifest(tmp_path / "p")
    assert list(shards.iter_samples(tmp_path / "p")) == samples
    assert list(shards.iter_samples(tmp_path / "p", shards=[2])) == samples[6:]


def test_same_samples_same_bytes(tmp_path):
    for name in "ab":
        shards.write_shards(pairs(5), tmp_path / name, shard_size=2)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_failing_write_leaves_what_was_there(tmp_path):
    shards.write_shards(pairs(2), tmp_path / "p", shard_size=2)
    with pytest.raises(ShardError, match="'k000' twice"):
        shards.write_shards([*pairs(3), *pairs(1)], tmp_path / "p", shard_size=2)
    assert len(list(shards.iter_samples(tmp_path / "p"))) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_clean_shards(tmp_path):
    shards.write_shards(pairs(5), tmp_path / "p", shard_size=2)
    manifest, keys, skipped = check(tmp_path, str(tmp_path / "p" / "*.tar"))
    assert keys == [f"k{i:03d}" for i in range(5)] and not skipped
    assert [s["sha256"] for s in manifest["shards"]] == [
        s["sha256"] for s in shards.read_manifest(tmp_path / "p")["shards"]
    ]


@pytest.mark.parametrize(
    "files, reason",
    [
        ([("bad.png", picture()[:-40]), ("bad.txt", b"x")], "corrupt image"),
        ([("bad.jpg", picture(0, "JPEG", 64)[:600]), ("bad.txt", b"x")], "corrupt image"),
        ([("bad.png", b"not an image"), ("bad.txt", b"x")], "corrupt image"),
        ([("bad.png", b""), ("bad.txt", b"x")], "corrupt image"),
        ([("bad.png", picture()), ("bad.txt", b" \n")], "empty caption"),
        ([("bad.png", picture()), ("bad.json", b"{}")], "missing caption"),
        ([("bad.png", picture()), ("bad.txt", b"\xff\xfe\xff")], "caption is not UTF-8"),
        ([("bad.txt", b"x"), ("bad.json", b"{}")], "missing image"),
        ([("bad.bmp", picture()), ("bad.txt", b"x")], "odd extension .bmp"),
        ([("bad", b"x")], "odd extension: none"),
        (
            [("bad.png", picture()), ("bad.txt", b"x"), ("bad.json", b"[1")],
            "metadata is not a JSON object",
        ),
    ],
)
def test_bad_sample(tmp_path, files, reason):
    source = write_raw(tmp_path / "s.tar", pair("a") + files + pair("b"))
    _, keys, skipped = check(tmp_path, source)
    assert keys == ["a", "b"]
    assert list(skipped) == ["bad"] and skipped["bad"].startswith(reason)


def test_duplicate_keys_within_and_across_shards(tmp_path):
    one = write_raw(tmp_path / "1.tar", pair("a", 1) + pair("a", 2) + pair("b", 3) + pair("a", 4))
    two = write_raw(tmp_path / "2.tar", pair("c", 5) + pair("b", 6))
    manifest, keys, _ = check(tmp_path, one, two)
    assert keys == ["a", "b", "c"]
    assert [(e["key"], e["reason"]) for e in manifest["skipped"]] == [
        (k, "duplicate key") for k in ("a", "a", "b")
    ]
    assert [s.image for s in shards.iter_samples(tmp_path / "out")] == [
        picture(1),
        picture(3),
        picture(5),
    ]


def test_keys_that_only_share_a_hash_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(
        lookup, "hashes", lambda keys: np.array([len(key) for key in keys], np.uint64)
    )
    first = write_raw(tmp_path / "0.tar", pair("a") + pair("b") + pair("cc"))
    second = write_raw(tmp_path / "1.tar", pair("d") + pair("b") + pair("eee"))
    manifest, keys, _ = check(tmp_path, first, second)
    assert keys == ["a", "b", "cc", "d", "eee"]
    assert [(e["key"], e["reason"]) for e in manifest["skipped"]] == [("b", "duplicate key")]


def test_a_duplicate_of_a_bad_sample_is_kept(tmp_path):
    source = write_raw(
        tmp_path / "s.tar", [("a.png", b"x"), ("a.txt", b"x"), *pair("b"), *pair("a", 1)]
    )
    _, keys, skipped = check(tmp_path, source)
    assert keys == ["b", "a"] and skipped["a"].startswith("corrupt image")


@pytest.mark.parametrize("cut", ["in a file", "in a header", "between files", "between samples"])
def test_truncated_tar(tmp_path, cut):
    whole = write_raw(tmp_path / "s.tar", pair("a") + pair("b") + pair("c"))
    with tarfile.open(whole) as tar:
        at = {m.name: m for m in tar}
    end = {
        "in a file": at["c.png"].offset_data + 100,
        "in a header": at["c.png"].offset + 100,
        "between files": at["c.txt"].offset,
        "between samples": at["c.png"].offset,
    }[cut]
    with open(whole, "r+b") as file:
        file.truncate(end)
    good = write_raw(tmp_path / "t.tar", pair("d"))
    manifest, keys, _ = check(tmp_path, whole, good)
    assert keys == ["a", "b", "d"]
    assert any(
        "truncated" in e["reason"] and e["file"].endswith("s.tar") for e in manifest["skipped"]
    )
    assert ("c" in {e["key"] for e in manifest["skipped"]}) == (cut == "between files")


def test_a_cut_that_takes_nothing_of_a_sample_keeps_it(tmp_path):
    whole = write_raw(tmp_path / "s.tar", pair("a") + pair("b"))
    with tarfile.open(whole) as tar:
        end = tar.getmember("b.json").offset
    with open(whole, "r+b") as file:
        file.truncate(end)
    _, keys, skipped = check(tmp_path, whole)
    assert keys == ["a", "b"] and list(skipped) == [None]


def test_rubbish_in_a_tar_is_not_taken_for_its_end(tmp_path):
    source = write_raw(tmp_path / "s.tar", pair("a") + pair("b") + pair("c"))
    with tarfile.open(source) as tar:
        at = tar.getmember("b.png").offset
    with open(source, "r+b") as file:
        file.seek(at)
        file.write(b"\x07" * 512)
    _, keys, skipped = check(tmp_path, source)
    assert keys == ["a"] and skipped[None].startswith("truncated or damaged tar")


def test_missing_and_empty_shards(tmp_path):
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("hello")
    good = write_raw(tmp_path / "000.tar", pair("a"))
    manifest, keys, _ = check(
        tmp_path,
        str(tmp_path / "{000..001}.tar"),
        *(str(tmp_path / n) for n in ("empty.tar", "text.tar")),
    )
    assert good and keys == ["a"]
    reasons = {e["file"].rpartition("/")[2]: e["reason"] for e in manifest["skipped"]}
    assert set(reasons) == {"001.tar", "empty.tar", "text.tar"}
    assert reasons["001.tar"].startswith("missing shard") and "tar" in reasons["text.tar"]


def test_nothing_good_is_an_error(tmp_path):
    with pytest.raises(ShardError, match=r"no good pair in 1 shards.*missing shard"):
        check_shards([str(tmp_path / "no-*.tar")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_inside_the_output_are_refused(tmp_path):
    shards.write_shards(pairs(2), tmp_path / "out", shard_size=2)
    with pytest.raises(ShardError, match="move it elsewhere"):
        check_shards([str(tmp_path / "out" / "*.tar")], tmp_path / "out")
    assert len(list(shards.iter_samples(tmp_path / "out"))) == 2


@pytest.mark.slow
def test_processes_give_the_same_manifest(tmp_path):
    shards.write_shards(pairs(6), tmp_path / "p", shard_size=2)
    source = [str(tmp_path / "p" / "*.tar"), str(tmp_path / "none.tar")]
    one = check_shards(source, tmp_path / "one", workers=1)
    two = check_shards(source, tmp_path / "two", workers=2)
    assert one == two
    assert (tmp_path / "one/manifest.json").read_bytes() == (
        tmp_path / "two/manifest.json"
    ).read_bytes()


def test_a_killed_check_goes_on_where_it_was(tmp_path, monkeypatch):
    shards.write_shards(pairs(6), tmp_path / "p", shard_size=2)
    files = sorted((tmp_path / "p").glob("*.tar"))
    sources, state, read, plain = (
        [*map(str, files), str(tmp_path / "none.tar")],
        tmp_path / "state",
        [],
        tars.open_source,
    )
    want = check_shards(sources, tmp_path / "out", workers=1)

    def opened(source):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(Path(source).name)
        return plain(source)

    monkeypatch.setattr(tars, "open_source", opened)
    with pytest.raises(KeyboardInterrupt):
        check_shards(sources, tmp_path / "again", workers=1, state=state)
    assert read == [files[0].name, files[1].name] and not (tmp_path / "again").exists()
    os.utime(files[0], ns=(1, 1))  # written again meanwhile, as far as can be told
    read.clear()
    read.append("")
    with pytest.raises(KeyboardInterrupt):
        check_shards(sources, tmp_path / "again", workers=1, state=state)
    assert read == ["", files[0].name]
    monkeypatch.setattr(
        tars, "open_source", lambda source: (read.append(Path(source).name), plain(source))[1]
    )
    assert check_shards(sources, tmp_path / "again", workers=1, state=state) == want
    assert read[2:] == [files[2].name, "none.tar"] and not state.exists()


@pytest.mark.slow
def test_a_shard_that_was_missing_is_looked_for_again(tmp_path):
    source = f"pipe:cat {tmp_path}/s.tar 2>&-"
    with pytest.raises(ShardError, match="no good pair"):
        check_shards([source], tmp_path / "out", workers=1, state=tmp_path / "state")
    write_raw(tmp_path / "s.tar", pair("a"))
    assert (
        check_shards([source], tmp_path / "out", workers=1, state=tmp_path / "state")["samples"]
        == 1
    )


def test_a_name_that_is_no_text(tmp_path):
    source = write_raw(tmp_path / "s.tar", pair("a") + pair("b\udcff") + pair("c"))
    _, keys, skipped = check(tmp_path, source)
    assert keys == ["a", "c"] and skipped == {"b\\udcff": "key is not UTF-8"}


def test_relative_sources_move_with_the_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards.write_shards(pairs(2), "p", shard_size=2)
    manifest = check_shards(["p/*.tar"], "data/pairs", workers=1)
    assert manifest["shards"][0]["file"] == "../../p/pairs-000000.tar"
    monkeypatch.chdir("/")
    assert len(list(shards.iter_samples(tmp_path / "data/pairs"))) == 2


@pytest.mark.slow
def test_compressed_and_piped_shards(tmp_path):
    path = tmp_path / "s.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in pair("a") + pair("b", 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    _, keys, skipped = check(tmp_path, f"pipe:cat {path}")
    assert keys == ["a", "b"] and not skipped


@pytest.mark.slow
def test_a_download_that_breaks_off_is_a_truncated_tar(tmp_path):
    source = write_raw(tmp_path / "s.tar", pair("a") + pair("b"))
    with tarfile.open(source) as tar:
        end = tar.getmember("b.png").offset + 600
    _, keys, skipped = check(tmp_path, f"pipe:head -c {end} {source}; exit 7")
    assert keys == ["a"] and "truncated" in skipped[None]
    good = write_raw(tmp_path / "t.tar", pair("c"))
    _, keys, skipped = check(tmp_path, f"pipe:cat {source}.none 2>&-", good)
    assert keys == ["c"] and skipped[None] == "missing shard: nothing came from it"


def test_a_shard_changed_since_the_check(tmp_path):
    source = write_raw(tmp_path / "s.tar", pair("a") + pair("b"))
    check_shards([source], tmp_path / "out", workers=1)
    write_raw(source, pair("a"))
    with pytest.raises(ShardError, match=r"s\.tar: 1 samples, 2 when it was checked"):
        list(shards.iter_samples(tmp_path / "out"))


def test_missing_manifest_names_the_stage(tmp_path):
    with pytest.raises(ShardError, match="dvc repro data"):
        shards.read_manifest(tmp_path)


def test_expand(tmp_path):
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    assert expand([f"{tmp_path}/*.tar", f"{tmp_path}/a.tar", "https://host/{00..02}.tar"]) == [
        f"{tmp_path}/a.tar",
        f"{tmp_path}/b.tar",
        *(f"https://host/{i:02d}.tar" for i in range(3)),
    ]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1"])
def test_decode_puts_transparency_on_white(mode):
    image = (
        Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
        if mode != "P"
        else Image.new("P", (4, 4), 0)
    )
    file = io.BytesIO()
    image.save(file, "PNG", **({"transparency": 0} if mode == "P" else {}))
    decoded = shards.decode(file.getvalue())
    assert decoded.mode == "RGB"
    assert decoded.getpixel((0, 0)) == ((255,) * 3 if mode in ("RGBA", "LA", "P") else (0,) * 3)


def test_open_clip_and_webdataset_read_what_is_written(tmp_path):
    wds = pytest.importorskip("webdataset")
    shards.write_shards(pairs(3), tmp_path / "p", shard_size=3)
    read = list(wds.WebDataset(str(tmp_path / "p/pairs-000000.tar"), shardshuffle=False))
    assert [s["txt"].decode() for s in read] == ["caption 0", "caption 1", "caption 2"]
    assert json.loads(read[2]["json"]) == {"i": 2} and read[0]["png"] == picture(0)
