"""README's example for open_clip's trainer, run as it stands there, the trainer replaced by one
call of its loss.
"""

import re
import sys
from pathlib import Path
from types import ModuleType

import torch

from .reference import unit


def test_the_loss_for_open_clips_trainer(monkeypatch):
    blocks = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL
    )
    (code,) = (b for b in blocks if "open_clip_train" in b)
    trainer, found = ModuleType("open_clip_train.main"), {}
    image, text, scale = (
        unit(9, 4, seed=1),
        unit(9, 4, seed=2),
        torch.tensor(7.0, dtype=torch.float64),
    )
    trainer.main = lambda argv: found.update(
        trainer.create_loss(None)(
            image_features=image, text_features=text, logit_scale=scale, output_dict=True
        )
    )
    package = ModuleType("open_clip_train")
    package.main = trainer
    monkeypatch.setitem(sys.modules, "open_clip_train", package)
    monkeypatch.setitem(sys.modules, "open_clip_train.main", trainer)
    exec(code, {})
    import open_clip.loss

    (loss,) = found.values()
    torch.testing.assert_close(loss, open_clip.loss.ClipLoss()(image, text, scale))
