"""Everything that the result of a training run depends on, as one digest.

It names checkpoints, finished students and the studies' cache: a model that was trained with other
data, settings, code or libraries is neither taken for this run nor continued.
"""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mclip.data.stores import contents
from mclip.distill.pairs import FOLDERS, open_pairs
from mclip.distill.runs import Run
from mclip.params import Recipe
from mclip.system.files import digest
from mclip.system.source import code_digest

if TYPE_CHECKING:  # the code that an identity holds
    from mclip.distill import trainer  # noqa: F401

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
PACKAGES = ("torch", "open_clip_torch", "timm", "torchvision", "pillow", "numpy")
# of distill.train: never seen in what a run gives
UNSEEN = {"parallel_runs", "checkpoint_every", "workers"}


def identity(run: Run) -> str:
    """Digest of all that the bytes of a run's result depend on.

    What a run is called, where its data lie and how many runs go side by side is no part of it.
    Fingerprints of the data are read once a process, however many runs are planned.

    Raises
    ------
    FileNotFoundError
        A folder of data is missing; the message names the stage to run.
    """
    spec = {k: v for k, v in asdict(run.data).items() if k not in FOLDERS}
    # a stream's batches depend on how many processes read it
    unseen = UNSEEN if run.train.cache_pixels else UNSEEN - {"workers"}
    folders = open_pairs(run.data).folders
    return digest(
        {
            "student": _student(run.student),
            "recipe": _effective(run.recipe),
            "train": run.train.model_dump(exclude=unseen),
            "machine": _machine(run.train.precision),
            "seed": run.seed,
            "set": spec,
            "data": {name: contents.fingerprint(folder) for name, folder in folders.items()},
            "code": code_digest("mclip.distill.trainer"),
            "versions": {name: version(name) for name in PACKAGES},
        }
    )


def _effective(recipe: Recipe) -> dict[str, Any]:
    """The recipe without its title and without what a term of weight 0 would read."""
    spec = recipe.model_dump(exclude={"title"})
    silent = {name for name, weight in recipe.weight.items() if not weight}
    return {key: value for key, value in spec.items() if key not in silent} | {
        "weight": {name: weight for name, weight in recipe.weight.items() if weight}
    }


def _student(student: str) -> list[Any]:
    """Identify a student by its files' content, which may change under the same name."""
    folder = Path(student.removeprefix("local-dir:"))
    if student.startswith("local-dir:") and folder.is_dir():
        return [contents.fingerprint(folder)]
    name, _, weights = student.partition("/")
    files = [CONFIGS / f"{name}.json", Path(weights)]
    return [student, *(contents.checksum(file) for file in files if file.is_file())]


def _machine(precision: str) -> list[str]:
    """The kind of device and the precision that the trainer comes to on this machine."""
    import torch  # here: a plan is all that needs it

    from mclip.system.precision import resolve_precision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [device, str(resolve_precision(precision, device))]
