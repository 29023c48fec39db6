"""What a training run is, as RUN.json: `mclip.distill.plan` writes it, the trainer reads it.

Imports nothing heavy.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mclip.distill.pairs import TrainingSet
from mclip.params import Recipe, Train


@dataclass(frozen=True)
class Run:
    """A training run; RUN.json holds these fields by name."""

    name: str
    seed: int
    student: str
    train: Train
    recipe: Recipe
    data: TrainingSet
    out: str
    scratch: str  # checkpoints
    # of mclip.distill.identity: a checkpoint or student of another one is not this run's
    identity: str = ""

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
