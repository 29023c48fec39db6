"""Progress bars that reach the terminal and never a notebook's output.

`bar` is tqdm with a rate and the time left. A stage run by `mclip.pipeline.run` points
MCLIP_PROGRESS at a file that the runner copies to its terminal; elsewhere the bar goes to stderr,
or to JupyterLab's widget-free bar.
"""

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm


def bar(
    iterable: Iterable | None = None,
    *,
    desc: str,
    unit: str = "it",
    total: int | None = None,
    initial: int = 0,
    hidden: bool = False,
) -> tqdm:
    """A tqdm bar over `iterable`, or `total` manual `.update()` steps, `initial` of them done
    before; hidden: it only counts.
    """
    path = os.environ.get("MCLIP_PROGRESS")
    stream = open(path, "a", buffering=1) if path else sys.stderr  # noqa: SIM115 - lives as long as the bar
    return tqdm(
        iterable,
        desc=desc,
        unit=unit,
        total=total,
        initial=initial,
        file=stream,
        mininterval=0.5,
        dynamic_ncols=not path,
        ncols=100 if path else None,
        leave=True,
        disable=hidden,
    )
