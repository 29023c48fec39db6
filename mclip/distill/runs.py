"""What a training run is: `mclip.distill` writes it as RUN.json, `mclip.distill.trainer` reads it.
Imports nothing heavy.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mclip.params import Recipe, Train


@dataclass(frozen=True)
class TrainingSet:
    """Where the parts are. `teacher` names a folder of `embeddings`; None where a recipe needs no
    teacher.
    """

    pairs_kind: str  # all | kept | reinforced
    image_px: int | None = None  # side of the student's input; None: the trainer asks the student
    teacher: str | None = None
    synthetic: bool = False
    light_scale_min: float = 0.9
    light_views: int = 4
    seed: int = 0  # of the light augmentations
    # of the pairs, the same ones for every recipe and seed; a smaller part lies in a larger one
    fraction: float = 1.0
    pairs: str = "data/pairs"
    balance: str = "data/balance"
    clusters: str = "data/clusters"
    embeddings: str = "data/embeddings"
    reinforced: str = "data/reinforced"
    cache: str = "data/cache"


def in_part(key: str, fraction: float) -> bool:
    """Is a pair in that fraction of all? By a hash of its key: a shard need not know the others."""
    return (
        fraction >= 1
        or int.from_bytes(hashlib.sha1(key.encode()).digest()[:8], "big") < fraction * 2**64
    )


@dataclass(frozen=True)
class Run:
    """What a run is; RUN.json holds these fields by name."""

    name: str
    seed: int
    student: str
    train: Train
    recipe: Recipe
    data: TrainingSet
    out: str
    scratch: str  # checkpoints

    def save(self, path: Path) -> None:
        content = asdict(self) | {
            "train": self.train.model_dump(),
            "recipe": self.recipe.model_dump(by_alias=True),
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Run":
        d = json.loads(path.read_text())
        return cls(
            **d
            | {
                "train": Train.model_validate(d["train"]),
                "recipe": Recipe.model_validate(d["recipe"]),
                "data": TrainingSet(**d["data"]),
            }
        )
