"""Keep a run under a name, go back to it, and see what changed between two of them.

    mclip save mine          # a branch: parameters, lock, metrics and reports of this run
    mclip compare mine       # what changed since then
    mclip back mine          # that run again, data and models included

A saved run is a git branch, so that `dvc metrics diff mine` and `git push` know it. Data and models
stay where DVC has them, in its cache, which the branch's dvc.lock names.
"""

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from mclip.data.stores.metrics import COLUMNS
from mclip.report.compare import main_metric, welch

LAST = "last-run"  # the branch that keeps what `back` replaced
METRICS = "reports/metrics"


class BaselineError(ValueError):
    """A name is taken or unknown, or git or DVC failed; the message says which."""


def save(name: str, *, replace: bool = False) -> str:
    """Keep the files as they are now as the branch `name`; neither they nor HEAD change.

    Parameters
    ----------
    name : str
        Of the branch.
    replace : bool, default False
        Move a branch of that name; by default it is an error.

    Returns
    -------
    str
        The commit.

    Raises
    ------
    BaselineError
        The name is taken or is none for a branch.
    """
    exists = _git("branch", "--list", name).strip()
    if exists and not replace:
        raise BaselineError(f"{name}: there is a branch of that name; another name, or --replace")
    if exists.startswith("*"):
        raise BaselineError(f"{name}: the branch that is checked out, commit to it by `git commit`")
    with tempfile.TemporaryDirectory() as folder:  # an index of its own: what is staged stays so
        own = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        _git("read-tree", "HEAD", **own)
        _git("add", "--all", ":/", **own)
        tree = _git("write-tree", **own).strip()
    commit = _git("commit-tree", tree, "-p", "HEAD", "-m", f"Run {name}").strip()
    _git("branch", "--force", name, commit)
    return commit


def back(name: str) -> None:
    """Bring back a saved run: its files, and the data and models that DVC's cache has of it.

    What is there now is saved first, as the branch `LAST`, whatever that was; going back to it is
    the undo. HEAD stays.

    Parameters
    ----------
    name : str
        A saved run, or any revision.

    Raises
    ------
    BaselineError
        There is no such revision; or DVC would delete outputs that its cache does not have, which
        are left as they are.
    """
    commit = _revision(name)  # before LAST moves, which it may be
    last = save(LAST, replace=True)
    root = Path(_git("rev-parse", "--show-toplevel").strip())
    gone = _git("diff", "--name-only", "--no-renames", "--diff-filter=D", "-z", last, commit)
    for path in filter(None, gone.split("\0")):
        (root / path).unlink(missing_ok=True)
    _git("restore", "--source", commit, "--worktree", ":/")
    # not --force: an output that DVC's cache does not have, of a stage that was killed, stays
    call = [sys.executable, "-m", "dvc", "checkout", "--allow-missing", "--quiet"]
    done = subprocess.run(call, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise BaselineError(f"dvc checkout: {done.stderr.strip()} (undo: `mclip back {LAST}`)")


def compare(a: str, b: str | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare two runs: the parameters that differ, and the recipes' metrics.

    Parameters
    ----------
    a : str
        A saved run, or any revision.
    b : str, optional
        The same; by default what is there now.

    Returns
    -------
    parameters : DataFrame
        A row for each that differs: parameter, a, b.
    metrics : DataFrame
        A row for each recipe and set of both, in percent: recipe, set, a, b, difference (b - a) and
        low, high, its 95 % Welch interval over the seeds; infinite for a single seed.

    Raises
    ------
    BaselineError
        There is no such revision, or it has no params.yaml.
    """
    revisions = [_revision(a), b and _revision(b)]
    trees = [_flat(YAML(typ="safe").load(_read(rev, "params.yaml"))) for rev in revisions]
    keys = list(dict.fromkeys([*trees[0], *trees[1]]))
    values = [(key, *(tree.get(key, "-") for tree in trees)) for key in keys]
    parameters = pd.DataFrame(
        [row for row in values if row[1] != row[2]], columns=["parameter", "a", "b"]
    )
    mains = [main_metric(_metrics(rev)) for rev in revisions]
    rows = []
    for (recipe, name), before in mains[0].groupby(["recipe", "set"], sort=False):
        now = mains[1][(mains[1]["recipe"] == recipe) & (mains[1]["set"] == name)]
        if len(now):
            means = 100 * before["value"].mean(), 100 * now["value"].mean()
            low, high = welch(100 * now["value"], 100 * before["value"])
            rows.append((recipe, name, *means, means[1] - means[0], low, high))
    columns = ["recipe", "set", "a", "b", "difference", "low", "high"]
    return parameters, pd.DataFrame(rows, columns=columns)


def _git(*words: str, **environment: str) -> str:
    done = subprocess.run(
        ["git", *words], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        raise BaselineError(f"git {words[0]}: {done.stderr.strip().removeprefix('fatal: ')}")
    return done.stdout


def _revision(name: str) -> str:
    try:
        return _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()
    except BaselineError:
        raise BaselineError(f"{name}: no such run or revision (`git branch` lists them)") from None


def _read(revision: str | None, path: str) -> str:
    """A file of a revision; None: as it is now."""
    if revision:
        return _git("show", f"{revision}:./{path}")
    return Path(path).read_text()


def _metrics(revision: str | None) -> pd.DataFrame:
    """The recipes' metrics, a row a seed, as `mclip.data.stores.metrics.read_seeds` has them."""
    if revision:
        found = _git("ls-tree", "--name-only", revision, f"./{METRICS}/").split()
    else:
        found = [path.as_posix() for path in sorted(Path(METRICS).glob("*.csv"))]
    paths = [path for path in found if PurePosixPath(path).suffix == ".csv"]
    tables = [pd.read_csv(io.StringIO(_read(revision, path))) for path in paths]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    """The leaves of a tree by their dotted keys; lists are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {key: tree}
    return {
        k: v
        for name, value in tree.items()
        for k, v in _flat(value, f"{key}.{name}" if key else str(name)).items()
    }
