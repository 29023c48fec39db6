"""What code does, as digests: modules by their syntax trees, with all that they import.

`code_digest("mclip.distill.trainer")` names what a finished run or a derived data set was made by;
`mclip.pipeline.code` writes the same, module by module, for every stage.

- A module counts by its syntax tree: a comment, a docstring or another line break changes nothing.
- Imports are followed by grimp, at any depth, those within functions and under `if TYPE_CHECKING`
  too; a module also depends on the packages that it lies in, and on what in those is not Python.
- A module that starts another as a process imports it under `if TYPE_CHECKING`.
- A package that imports `pkgutil` finds its modules by name: all of them count.
- The modules in EXEMPT count for none.
"""

import ast
import functools
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grimp
from grimp.exceptions import SourceSyntaxError

from mclip.system.files import digest

_AS_VALUES = "what it decides are values, and those count as values"
_SHOWS = "draws what a notebook gives it"
EXEMPT = {  # module -> why an edit of it changes no stage's data (tests/pipeline/test_code.py)
    "mclip": "has a version number and nothing else",
    "mclip.__main__": "is a command of its own",
    "mclip.cli": "starts what others do",
    "mclip.pipeline.code": "says what depends on what",
    "mclip.system.source": "says what depends on what",
    "mclip.report.pages": "shows executed notebooks; the stage report lists it",
    "mclip.params": _AS_VALUES,
    "mclip.params.__main__": "is a command of its own",
    "mclip.params.ablations": _AS_VALUES,
    "mclip.params.schema": _AS_VALUES,
    "mclip.params.sections": _AS_VALUES,
    "mclip.params.terms": _AS_VALUES,
    "mclip.params.view": _AS_VALUES,
    "mclip.report.plots": _SHOWS,
    "mclip.report.plots.charts": _SHOWS,
    "mclip.report.plots.learning": _SHOWS,
    "mclip.report.plots.sheets": _SHOWS,
    "mclip.report.plots.tables": _SHOWS,
    "mclip.report.plots.theme": _SHOWS,
    "mclip.system.progress": "counts what passes through it unchanged",
    "mclip.report.build": "shows executed notebooks; the stage report lists it",
}
# fields of a syntax tree that say nothing more
_UNSEEN = {"ctx", "kind", "type_comment", "type_ignores"}


class CodeError(Exception):
    """A module of mclip is not Python; the message names its file and line."""


# --- syntax trees ---------------------------------------------------------------------------------


def canonical(source: str) -> str:
    """Python source as a text that only what the code does changes, the same under every version of
    Python.

    Without comments, docstrings (and other statements that are only a string) and positions; fields
    that are None or empty are left out, since versions differ in which they have.

    Raises
    ------
    SyntaxError : the source is not Python.
    """
    return _dump(ast.parse(source))


def _dump(node: Any) -> str:
    if isinstance(node, ast.JoinedStr):
        return f"JoinedStr([{','.join(_joined(node))}])"
    if isinstance(node, ast.AST):
        fields = []
        for name in sorted(node._fields):
            value = getattr(node, name, None)
            if isinstance(value, list):
                value = [item for item in value if not _is_text_alone(item)]
            elif name == "format_spec" and value is not None:
                value = _joined(value) and value
            if name in _UNSEEN or value is None or value == []:
                continue
            fields.append(f"{name}={_dump(value)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(_dump(item) for item in node)}]"
    if isinstance(node, int) and not isinstance(node, bool):
        return hex(node)  # Python refuses to write a huge number in decimal
    return ascii(
        node
    )  # repr writes a character as it is, or escaped, by the version's Unicode tables


def _joined(node: ast.JoinedStr) -> list[str]:
    """The parts of an f-string; versions differ in where they cut its constant text."""
    parts: list[str] = []
    text = ""
    for value in node.values:
        if isinstance(value, ast.Constant):
            text += str(value.value)
            continue
        parts += [ascii(text)] * bool(text) + [_dump(value)]
        text = ""
    return parts + [ascii(text)] * bool(text)


def _is_text_alone(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


# --- imports --------------------------------------------------------------------------------------


class Package:
    """mclip below a repository's root: its imports are read at once, each file when it is first
    asked for.

    Parameters
    ----------
    root : folder with mclip/ and notebooks/.

    Raises
    ------
    CodeError : a module is not Python.
    """

    def __init__(self, root: str | Path = "."):
        self.root = Path(root)
        self._digests: dict[Path, str] = {}
        graph = _imports_below(self.root)
        self._modules = {name for name in graph.modules if name.partition(".")[0] == "mclip"}
        for name in self._modules - {"mclip"}:  # importing a module runs its package
            graph.add_import(importer=name, imported=name.rpartition(".")[0])
        by_name = (
            graph.find_modules_that_directly_import("pkgutil")
            if "pkgutil" in graph.modules
            else set()
        )
        for package in by_name:
            for name in graph.find_descendants(package):
                graph.add_import(importer=package, imported=name)
        for name in EXEMPT.keys() & graph.modules:
            for imported in graph.find_modules_directly_imported_by(name):
                graph.remove_import(importer=name, imported=imported)
        self._graph = graph

    def notebook(self, path: str | Path) -> list[Path]:
        """The files that a notebook depends on, below the root; all there are where its code can't
        be read.
        """
        try:
            cells = json.loads((self.root / path).read_text())["cells"]
            code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
            return self.files({name for source in code for name in self._imports(_plain(source))})
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            SyntaxError,
        ):  # it fails as a stage, and says why
            return self.files(self._modules)

    def files(self, modules: Iterable[str]) -> list[Path]:
        """The files of modules and of all that they import, below the root."""
        asked = set(modules)
        found = asked.union(*(self._graph.find_upstream_modules(name) for name in asked))
        return sorted(
            {path for name in found & self._modules - EXEMPT.keys() for path in self._own(name)}
        )

    def digests(self, files: Iterable[Path]) -> dict[str, str]:
        """File -> digest of what it does; each file is read once."""
        for path in (files := list(files)):
            if path not in self._digests:
                self._digests[path] = file_digest(self.root / path)
        return {path.as_posix(): self._digests[path] for path in files}

    def _own(self, name: str) -> list[Path]:
        """A module's file; of a package also what isn't Python."""
        path = Path(*name.split("."))
        file = path / "__init__.py"
        if not (self.root / file).is_file():
            return [path.with_suffix(".py")]
        beside = [
            each.relative_to(self.root) for each in (self.root / path).rglob("*") if each.is_file()
        ]
        return [
            file,
            *(
                each
                for each in beside
                if each.suffix not in (".py", ".pyc")
                and not any(part.startswith(".") for part in each.parts)
            ),
        ]

    def _imports(self, source: str) -> set[str]:
        """The modules of mclip that a notebook's cell imports."""
        names = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        return names & self._modules


def _imports_below(root: Path) -> grimp.ImportGraph:
    """Which module imports which; no modules where there is no mclip."""
    if not (root / "mclip/__init__.py").is_file():
        return grimp.ImportGraph()
    with _first_on_path(root):
        try:
            return grimp.build_graph("mclip", include_external_packages=True, cache_dir=None)
        except SourceSyntaxError as err:
            where = Path(err.filename).resolve().relative_to(root.resolve())
            raise CodeError(f"{where}, line {err.lineno}: not valid Python") from None


@contextmanager
def _first_on_path(root: Path) -> Iterator[None]:
    """Let `mclip` be the package below root for who looks for it, whichever of that name this
    process has imported.
    """
    here = sys.modules["mclip"]
    if Path(here.__path__[0]).resolve() == (root / "mclip").resolve():
        yield
        return
    del sys.modules["mclip"]
    sys.path.insert(0, str(root.resolve()))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(root.resolve()))
        sys.modules["mclip"] = here


def _plain(source: str) -> str:
    """A cell without IPython's lines."""
    return "" if source.startswith("%%") else re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)


def file_digest(path: Path) -> str:
    """16 hex digits: of a module's syntax tree or another file's bytes; "" if there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return ""
    if path.suffix == ".py":
        with suppress(SyntaxError, ValueError):  # in the middle of an edit it is no Python
            content = canonical(content.decode()).encode()
    return hashlib.sha256(content).hexdigest()[:16]


@functools.cache
def code_digest(module: str) -> str:
    """Digest of a module of this package and all that it imports; once a process, which keeps what
    it has imported.
    """
    package = _this()
    return digest(package.digests(package.files([module])))


@functools.cache
def _this() -> Package:
    return Package(Path(__file__).parents[2])
