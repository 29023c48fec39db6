"""Theme, colours, and a figure in words."""

import contextlib
from collections.abc import Iterable

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

WIDTH = 8.0  # inches, of every figure, so that type has one size down a page
DPI = 150
INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"

# seaborn's "colorblind" palette, one fixed colour a name; other names get the spare ones in sorted
# order.
COLOURS = {
    "clip": "#8c8c8c",
    "clip-cid": "#0173b2",
    "mobileclip": "#de8f05",
    "combined": "#029e73",
    "small": "#e9bfe0",
    "base": "#cc78bc",
    "large": "#8b3a7c",
}
SPARE = ["#d55e00", "#56b4e9", "#ca9161", "#ece133", "#fbafe4", "#5b5ea6", "#7f6000", "#44aa99"]


def style() -> None:
    """Set the theme; in a notebook also: PNG output, and a figure's title as its text form."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=[COLOURS["clip-cid"], COLOURS["mobileclip"], COLOURS["combined"], *SPARE],
        rc={
            "figure.figsize": (WIDTH, 4.2),
            "figure.dpi": DPI,
            "savefig.dpi": DPI,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "font.family": "DejaVu Sans",  # ships with matplotlib: the same everywhere
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 10,
            "figure.titlesize": 11.5,
            "figure.titleweight": "bold",
            "axes.labelsize": 10,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "grid.color": GRID,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.8,
        },
    )
    with contextlib.suppress(ImportError):
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        shell = get_ipython()
        if shell is not None and hasattr(shell, "kernel"):
            set_matplotlib_formats("png")
            # it would draw each figure once more, for windows that there are none of
            plt.uninstall_repl_displayhook()
            shell.display_formatter.formatters["text/plain"].for_type(
                Figure, lambda figure, printer, cycle: printer.text(f"Figure: {describe(figure)}")
            )


def describe(figure: Figure) -> str:
    """A figure in words: its title, or the titles of its axes."""
    title = figure.get_suptitle()
    titles = (
        [title]
        if title
        else [t for ax in figure.axes for t in [ax.get_title("left") or ax.get_title()] if t]
    )
    return " ".join("; ".join(titles or ["untitled"]).split())


def palette(names: Iterable[str]) -> dict[str, str]:
    """Each name's colour: the fixed one, else a spare one by sorted order."""
    names = list(dict.fromkeys(str(name) for name in names))
    spare = [name for name in sorted(names) if name not in COLOURS]
    extra = {name: SPARE[i % len(SPARE)] for i, name in enumerate(spare)}
    return {name: COLOURS.get(name) or extra[name] for name in names}
