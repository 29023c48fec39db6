"""Codecs of stored embeddings: each a module of this folder, found by its name.

encode(rows) -> {suffix: tensor}    (..., d) float rows as what is stored; NAME + suffix names it
decode(stored) -> Tensor            the rows again, (..., d) of a float dtype
bytes_a_row(width) -> int           what a row of this width takes
"""

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """Names of all codecs."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """The codec of a name; a ValueError for another name lists all codecs."""
    if name not in names():
        raise ValueError(f"codec: expected one of {', '.join(names())}, found {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
