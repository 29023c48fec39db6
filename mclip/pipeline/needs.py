"""Is there what a notebook reads? If not: one line that says which stage to run.

    from mclip import needs
    needs.check("cluster")                  # after params.stage, at the head of a notebook; a stage of dvc.yaml
    needs.check(f"evaluate@{recipe}")       # one of several, as dvc names it

What a notebook reads is what its stage depends on in dvc.yaml (data/, models/, reports/metrics/;
executed notebooks are for the site only), so there is no second list to keep. Under `dvc repro` the
check passes: DVC ran those stages before.
"""

import itertools
import re
from pathlib import Path
from typing import Any

from mclip import params

READ = ("data/", "models/", "reports/metrics")
CODE = "data/code/"  # what a stage depends on (mclip.pipeline.code); no notebook reads it


class MissingInput(FileNotFoundError):
    """A stage has not run whose outputs a notebook reads; IPython shows the message alone, without
    a traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def check(stage: str, root: str | Path = ".") -> None:
    """MissingInput names what is missing of a stage's inputs and the stages that make it; None
    where all is there.
    """
    known = stages(root)
    if stage not in known:
        raise MissingInput(
            f"with this params.yaml there is no stage {stage!r}; there are {', '.join(known)}"
        )
    gone = [path for path in reads(known[stage]) if not _is_there(Path(root) / path)]
    if not gone:
        return
    makers = [
        name
        for name, entry in known.items()
        if any(_overlap(out, path) for out in outs(entry) for path in gone)
    ]
    last = [
        m for m in makers if not any(m in _before(known, other) for other in makers if other != m)
    ]
    missing = " and ".join(filter(None, [", ".join(gone[:-1]), gone[-1]]))
    todo = f": run `dvc repro {' '.join(last)}` first" if last else ""
    raise MissingInput(
        f"{stage} reads {missing}, which {'is' if len(gone) == 1 else 'are'} missing{todo}"
    )


def stages(root: str | Path = ".") -> dict[str, dict[str, Any]]:
    """dvc.yaml's stages by the names that dvc gives them, foreach and matrix spelled out, ${...}
    filled in.
    """
    tree, values = (
        params.read_yaml(Path(root) / "dvc.yaml"),
        params.read_yaml(Path(root) / "params.yaml"),
    )
    out = {}
    for name, entry in tree["stages"].items():
        if "foreach" in entry:
            over = _filled(entry["foreach"], values)
            items = over.items() if isinstance(over, dict) else ((str(i), i) for i in over)
            for key, item in items:
                local = {"key": key, "item": item} if isinstance(over, dict) else {"item": item}
                out[f"{name}@{key}"] = _filled(entry["do"], values | local)
        elif "matrix" in entry:
            over = {k: _filled(v, values) for k, v in entry["matrix"].items()}
            for chosen in itertools.product(*over.values()):
                item = dict(zip(over, chosen, strict=True))
                rest = {k: v for k, v in entry.items() if k != "matrix"}
                out[f"{name}@{'-'.join(map(str, chosen))}"] = _filled(rest, values | {"item": item})
        else:
            out[name] = _filled(entry, values)
    return out


def reads(entry: dict[str, Any]) -> list[str]:
    """What a stage depends on beside code, notebooks and parameters."""
    paths = [
        path for dep in entry.get("deps", []) for path in ([dep] if isinstance(dep, str) else dep)
    ]
    return [path for path in paths if path.startswith(READ) and not path.startswith(CODE)]


def outs(entry: dict[str, Any]) -> list[str]:
    """What a stage writes, metrics and plots included."""
    found = [out for kind in ("outs", "metrics", "plots") for out in entry.get(kind, [])]
    return [path for out in found for path in ([out] if isinstance(out, str) else out)]


def _filled(node: Any, values: dict[str, Any]) -> Any:
    """A part of dvc.yaml with ${dotted.key} replaced; a string that is nothing else becomes the
    value itself.
    """
    if isinstance(node, dict):
        return {_filled(k, values): _filled(v, values) for k, v in node.items()}
    if isinstance(node, list):
        return [_filled(item, values) for item in node]
    if not isinstance(node, str):
        return node
    if whole := re.fullmatch(r"\$\{([^}]+)\}", node):
        return _at(values, whole[1])
    return re.sub(r"\$\{([^}]+)\}", lambda m: str(_at(values, m[1])), node)


def _at(values: Any, key: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", key):
        try:
            values = values[int(part) if isinstance(values, list) else part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise params.ParamsError(f"dvc.yaml: params.yaml has no {key!r}") from None
    return values


def _is_there(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _overlap(a: str, b: str) -> bool:
    return a == b or a.startswith(f"{b}/") or b.startswith(f"{a}/")


def _before(known: dict[str, dict[str, Any]], stage: str, seen: set[str] | None = None) -> set[str]:
    """The stages that run before one, all the way up."""
    seen = set() if seen is None else seen
    for path in reads(known[stage]):
        for name, entry in known.items():
            if (
                name not in seen
                and name != stage
                and any(_overlap(out, path) for out in outs(entry))
            ):
                seen.add(name)
                _before(known, name, seen)
    return seen
