"""What each stage's result depends on besides its data and params.yaml: the code, and what the
schema fills in.

    python -m mclip.pipeline.code     # data/code/NAME for each notebook executed as reports/NAME.ipynb: the stage `code`

A line of data/code/NAME is a digest and a file: the modules that the notebook imports and what
those import, at any depth (grimp reads the imports, those within functions and under `if
TYPE_CHECKING` too), each with the packages that it lies in and what lies in those that is not
Python. A module counts by its syntax tree, so a comment, a docstring or another line break reruns
nothing; any other edit reruns the stages that depend on it, and no list is kept by hand.

- A module that starts another as a process imports it under `if TYPE_CHECKING`.
- A package that imports `pkgutil` finds its modules by name: all of them count.
- The modules in EXEMPT count for none.

The last line, VALUES, is a digest of what the schema of params.yaml fills in where the file is
silent: defaults, and the registry's entries of evaluation sets. What the file says is left to DVC,
which compares it key by key.

`code("mclip.distill.trainer")` names by the same rule what `mclip.studies.ablate` and
`mclip.studies.derive` keep.
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
from typing import Any, NamedTuple

import grimp
from grimp.exceptions import SourceSyntaxError

from mclip import params
from mclip.pipeline import stages as dvc_stages
from mclip.system.files import digest, write_whole

FOLDER = "data/code"
VALUES = "params.yaml, where it is silent"
_AS_VALUES = "what it decides are values, and those count as values"
_SHOWS = "draws what a notebook gives it"
EXEMPT = {  # module -> why an edit of it changes no stage's data (tests/test_closure.py)
    "mclip": "has a version number and nothing else",
    "mclip.__main__": "is a command of its own",
    "mclip.cli": "starts what others do",
    "mclip.pipeline.code": "says what depends on what",
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
_UNSEEN = {
    "ctx",
    "kind",
    "type_comment",
    "type_ignores",
}  # fields of a syntax tree that say nothing more


class CodeError(Exception):
    """A module of mclip is not Python; the message names its file and line."""


# --- syntax trees -----------------------------------------------------------------------------------------


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
            if name == "format_spec" and value is not None:
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
            text += value.value
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


# --- imports ----------------------------------------------------------------------------------------------


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
    """16 hex digits: of a module's syntax tree, of any other file's bytes; "" where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return ""
    if path.suffix == ".py":
        with suppress(SyntaxError, ValueError):  # in the middle of an edit it is no Python
            content = canonical(content.decode()).encode()
    return hashlib.sha256(content).hexdigest()[:16]


@functools.cache
def code(module: str) -> str:
    """Digest of a module of this package and all that it imports; once a process, which keeps what
    it has imported.
    """
    package = _this()
    return digest(package.digests(package.files([module])))


@functools.cache
def _this() -> Package:
    return Package(Path(__file__).parents[2])


# --- stages -----------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """A stage of dvc.yaml that runs a notebook."""

    notebook: str
    keys: list[str]  # of params.yaml, dotted


def stages(root: str | Path = ".") -> dict[str, Stage]:
    """The stages that depend on a file of data/code, by that file's name; several entries of one
    are taken together.

    Notebooks that no stage runs, of overlays for example, stand under their own names, without
    keys.
    """
    found: dict[str, Stage] = {}
    for entry in dvc_stages.resolved(root).values():
        deps = entry.get("deps", [])
        for name in (
            dep.removeprefix(f"{FOLDER}/") for dep in deps if dep.startswith(f"{FOLDER}/")
        ):
            notebook = next(dep for dep in deps if dep.startswith("notebooks/"))
            before = found[name].keys if name in found else []
            found[name] = Stage(notebook, sorted({*before, *entry.get("params", [])}))
    run = {stage.notebook for stage in found.values()}
    for path in sorted(Path(root).glob("notebooks/**/*.ipynb")):
        path = path.relative_to(root)
        if path.as_posix() not in run and ".ipynb_checkpoints" not in path.parts:
            found[path.relative_to("notebooks").with_suffix("").as_posix()] = Stage(
                path.as_posix(), []
            )
    return found


def silent(values: dict[str, Any], said: Any) -> dict[str, Any]:
    """What of validated values is not as the file says it.

    Parameters
    ----------
    values : a tree of params.yaml with everything filled in.
    said : the tree as it is written.

    Returns
    -------
    The leaves of `values`, nested as there, that `said` lacks or has otherwise (null, or a path for
    a whole entry).
    """
    said = said if isinstance(said, dict) else {}
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            if below := silent(value, said.get(key)):
                found[key] = below
        elif key not in said or said[key] != value:
            found[key] = value
    return found


def depends_on(package: Package, names: Iterable[str] | None = None) -> dict[str, dict[str, str]]:
    """Name of a stage -> file -> digest of what its notebook depends on, and VALUES -> what
    params.yaml leaves open.

    Parameters
    ----------
    names : of `stages`; None: all. What isn't among them is left out.

    Raises
    ------
    ParamsError : params.yaml is not valid. The schema is the running mclip's, whatever lies below
        the package's root.
    """
    said, known = params.read_yaml(package.root / "params.yaml"), stages(package.root)
    values = params.check(said).model_dump(by_alias=True, mode="json")
    return {
        name: package.digests(package.notebook(known[name].notebook))
        | {VALUES: digest(silent(params.pick(values, known[name].keys), said))}
        for name in (known if names is None else known.keys() & set(names))
    }


def recorded(name: str, root: str | Path = ".") -> dict[str, str]:
    """What data/code says of a stage, file -> digest; FileNotFoundError where `code` has not run."""
    lines = (Path(root) / FOLDER / name).read_text().splitlines()
    return {path: checksum for checksum, path in (line.split("  ", 1) for line in lines)}


def write(root: str | Path = ".") -> list[Path]:
    """Write data/code for every stage; the files that changed.

    Raises
    ------
    CodeError : a module is not Python.
    ParamsError : params.yaml is not valid.
    """
    root, package = Path(root), Package(root)
    texts = {
        root / FOLDER / name: "".join(f"{checksum}  {what}\n" for what, checksum in lines.items())
        for name, lines in depends_on(package).items()
    }
    there = {path: path.read_text() for path in (root / FOLDER).rglob("*") if path.is_file()}
    for path in there.keys() - texts.keys():
        path.unlink()
    changed = [path for path, text in texts.items() if there.get(path) != text]
    for path in changed:
        write_whole(path, texts[path])
    return changed


def main() -> int:
    try:
        written = write()
    except (CodeError, params.ParamsError) as err:
        print(err, file=sys.stderr)
        return 2
    print(f"{FOLDER}: {len(written)} stage(s) depend on other code or defaults than before")
    return 0


if __name__ == "__main__":
    sys.exit(main())
