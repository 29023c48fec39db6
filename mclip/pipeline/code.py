"""The code that each notebook stands on, as checksums: what a stage depends on besides its notebook
and its data.

    python -m mclip.pipeline.code         # data/code/NAME for each notebooks/NAME.ipynb: the first stage of dvc.yaml
    sha256sum -c data/code/distill  # what has changed since

A line is a file of mclip: a module that the notebook imports or that one of those imports, at any
depth, also within a function. A string that is a module's name counts as an import of it: so are
processes started. A package brings what lies in it that isn't Python. An edit then reruns the
stages that stand on it and no others, with no list kept by hand.

`code("mclip.distill.trainer")` names by the same rule what `mclip.studies.ablate` and
`mclip.studies.derive` keep. Imports nothing heavy.
"""

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from mclip.system.files import digest, write_whole

FOLDER = "data/code"
# never change a stage's data: they show, check, name, or start what gives the same bytes when it is
# started otherwise
SHOWING = {
    "closure",
    "files",
    "forks",
    "needs",
    "pages",
    "params",
    "plots",
    "progress",
    "report",
    "warm",
}
NAME = re.compile(r"mclip(\.\w+)+")


class Package:
    """mclip below a repository's root; each module is read once."""

    def __init__(self, root: str | Path = "."):
        self.root = Path(root)
        self._named: dict[str, set[str]] = {}

    def notebook(self, path: str | Path) -> list[Path]:
        """The files that a notebook stands on, below the root; all there are where its code can't
        be told.
        """
        try:
            cells = json.loads((self.root / path).read_text())["cells"]
            code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
            names = {name for source in code for name in self._names(_plain(source))}
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            SyntaxError,
        ):  # it fails as a stage, and says why
            names = {
                ".".join(file.relative_to(self.root).with_suffix("").parts)
                for file in self.root.glob("mclip/**/*.py")
            }
        return self.files(names)

    def files(self, names: Iterable[str]) -> list[Path]:
        """The files of modules and of all that they import."""
        seen, todo = set(), list(names)
        while todo:
            name = todo.pop()
            if name in seen or "." not in name or name.split(".")[1] in SHOWING:
                # nothing runs in mclip/__init__.py: a new version number makes nothing anew
                continue
            seen.add(name)
            todo += [name.rpartition(".")[0], *self._imports(name)]
        return sorted({path for name in seen for path in self._own(name)})

    def checksums(self, files: Iterable[Path]) -> dict[str, str]:
        """File -> sha256."""
        return {
            path.as_posix(): hashlib.sha256((self.root / path).read_bytes()).hexdigest()
            for path in files
        }

    def _file(self, name: str) -> Path | None:
        path = Path(*name.split("."))
        return next(
            (
                file
                for file in (path / "__init__.py", path.with_suffix(".py"))
                if (self.root / file).is_file()
            ),
            None,
        )

    def _own(self, name: str) -> list[Path]:
        """A module's file; of a package also what isn't Python."""
        file = self._file(name)
        if file is None or file.name != "__init__.py":
            return [] if file is None else [file]
        beside = [
            path.relative_to(self.root)
            for path in (self.root / file.parent).rglob("*")
            if path.is_file()
        ]
        return [
            file,
            *(
                path
                for path in beside
                if path.suffix not in (".py", ".pyc")
                and not any(part.startswith(".") for part in path.parts)
            ),
        ]

    def _imports(self, name: str) -> set[str]:
        if name not in self._named:
            file = self._file(name)
            package = name if file and file.name == "__init__.py" else name.rpartition(".")[0]
            try:
                self._named[name] = (
                    self._names((self.root / file).read_text(), package) if file else set()
                )
            except SyntaxError:  # who imports it fails, and says where
                self._named[name] = set()
        return self._named[name]

    def _names(self, code: str, package: str = "") -> set[str]:
        """The modules that Python source names."""
        found = set()
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = (
                    package.split(".")[: len(package.split(".")) - node.level + 1]
                    if node.level
                    else []
                )
                base = ".".join([*above, *filter(None, [node.module])])
                found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and NAME.fullmatch(node.value)
            ):
                found |= {node.value} if self._file(node.value) else set()
        return {self._module(name) for name in found if NAME.fullmatch(name)}

    def _module(self, name: str) -> str:
        """Of a name that may be a module's attribute: the module."""
        while "." in name and self._file(name) is None:
            name = name.rpartition(".")[0]
        return name


def _plain(source: str) -> str:
    """A cell without IPython's lines."""
    return "" if source.startswith("%%") else re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)


@functools.cache
def code(module: str) -> str:
    """Digest of a module of this package and all that it imports; once a process, which keeps what
    it has imported.
    """
    package = Package(Path(__file__).parents[2])
    return digest(package.checksums(package.files([module])))


def recorded(stage: str, root: str | Path = ".") -> dict[str, str]:
    """What data/code says of a notebook, file -> sha256; FileNotFoundError where the stage has not
    run.
    """
    lines = (Path(root) / FOLDER / stage).read_text().splitlines()
    return {path: checksum for checksum, path in (line.split("  ", 1) for line in lines)}


def write(root: str | Path = ".") -> list[Path]:
    """Write data/code of every source notebook; the files that changed."""
    root, package = Path(root), Package(root)
    texts = {}
    for path in sorted(root.glob("notebooks/**/*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            path = path.relative_to(root)
            lines = [
                f"{checksum}  {file}\n"
                for file, checksum in package.checksums(package.notebook(path)).items()
            ]
            texts[root / FOLDER / path.relative_to("notebooks").with_suffix("")] = "".join(lines)
    there = {path: path.read_text() for path in (root / FOLDER).rglob("*") if path.is_file()}
    for path in there.keys() - texts.keys():
        path.unlink()
    changed = [path for path, text in texts.items() if there.get(path) != text]
    for path in changed:
        write_whole(path, texts[path])
    return changed


if __name__ == "__main__":
    written = write()
    print(f"{FOLDER}: {len(written)} notebook(s) stand on other code than before")
