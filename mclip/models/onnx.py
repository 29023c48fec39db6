"""Write towers as ONNX, run them in onnxruntime, and compare them with torch.

    tower = Tower(mclip.models.for_inference(model), "image")
    to_onnx(tower, "image.onnx")
    agreement("image.onnx", tower, tower.example(4))     # the lowest cosine to torch's embeddings

A tower has one input, `pixels` (batch, 3, h, w) float32 or `tokens` (batch, context) int64, and one
output, `image_embedding` or `text_embedding` (batch, d), unit-norm. Any batch size is accepted.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mclip.models.factory import quiet
from mclip.system.files import whole


class Tower(nn.Module):
    """A tower with one input and one output: unit-norm embeddings, (batch, d)."""

    def __init__(self, model: nn.Module, kind: str):
        super().__init__()
        self.model, self.kind = model, kind

    @property
    def input_name(self) -> str:
        return "pixels" if self.kind == "image" else "tokens"

    def example(self, batch: int, seed: int = 0) -> Tensor:
        """An input of the right shape: noise, or tokens drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "image":
            size = self.model.visual.image_size
            sides = size if isinstance(size, (tuple, list)) else (size, size)
            return torch.randn(batch, 3, *sides, generator=generator)
        text = getattr(self.model, "text", self.model)
        return torch.randint(1, text.vocab_size, (batch, text.context_length), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        encode = self.model.encode_image if self.kind == "image" else self.model.encode_text
        return F.normalize(encode(x), dim=-1)


def to_onnx(tower: Tower, path: str | Path, *, opset: int | None = None) -> Path:
    """Write a tower (of a model from `for_inference`) as ONNX with a dynamic batch; whole or not at
    all.

    opset : None: the current one of torch's exporter.
    """
    tower = tower.eval()
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            tower,
            (tower.example(2),),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[tower.input_name],
            output_names=[f"{tower.kind}_embedding"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        with whole(path) as draft:
            program.save(draft, external_data=False)
    return Path(path)


def session(path: str | Path, threads: int | None = None) -> Callable[[Tensor], np.ndarray]:
    """An ONNX tower in onnxruntime on the CPU: input tensor to embeddings."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    running = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = running.get_inputs()[0].name
    return lambda x: running.run(None, {name: x.numpy()})[0]


def agreement(path: str | Path, tower: Tower, x: Tensor) -> float:
    """The lowest cosine between the embeddings of torch and of an ONNX file, over the rows of x."""
    run = session(path)
    found = np.concatenate([run(x[:1]), run(x[1:])]) if len(x) > 1 else run(x)  # two sizes of batch
    with torch.no_grad():
        expected = tower(x).double()
    lowest = float(F.cosine_similarity(torch.from_numpy(found).double(), expected).min())
    return math.floor(1e6 * lowest) / 1e6  # to be said with "at least"
