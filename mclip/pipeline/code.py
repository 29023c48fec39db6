"""List what each stage's result depends on besides its data and params.yaml.

    mclip code     # the stage `code`: data/code/NAME for each notebook executed as
    reports/NAME.ipynb

A line of data/code/NAME is a digest and a file: the modules that the notebook imports, at any depth
(`mclip.system.source`). A comment, a docstring or another line break reruns nothing; any other edit
reruns the stages that depend on it, and no list is kept by hand.

The last line, VALUES, is a digest of what the schema of params.yaml fills in where the file is
silent: defaults, and the registry's entries of evaluation sets. Changes of the file itself are left
to DVC, which compares it key by key.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mclip import params
from mclip.pipeline import stages as dvc_stages
from mclip.system.files import digest, write_whole
from mclip.system.source import CodeError, Package

FOLDER = "data/code"
VALUES = "params.yaml, where it is silent"


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
    """data/code's lines of a stage, file -> digest; FileNotFoundError if `code` has not run."""
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
