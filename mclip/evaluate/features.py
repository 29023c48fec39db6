"""Embeddings that an evaluation compares, pictures and classes, each computed once a model."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mclip.data.evalsets import Split, batches, same_pictures, without
from mclip.models import image_encoder
from mclip.system.threads import side_by_side


def image_features(
    models: Sequence[torch.nn.Module],
    split: Split,
    preprocess,
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    known: list[tuple[Split, list[int], dict[int, str], list[Tensor]]] | None = None,
) -> tuple[Split, list[Tensor]]:
    """Embed every readable picture of a split by each model, decoding it once.

    Parameters
    ----------
    models : sequence of torch.nn.Module
        Models that share `preprocess`.
    split : Split
        Of `mclip.data.evalsets.read_split`.
    preprocess : callable
        PIL image -> (3, h, w) Tensor.
    batch_size : int, default 256
        Pictures at a time.
    workers : int, default 0
        Processes that decode; 0 is this one.
    precision : {"fp32", "bf16", "auto"}, default "fp32"
        Of the encoders.
    known : list, optional
        What these models have encoded so far, to which this is added. The same pictures are not
        encoded again.

    Returns
    -------
    split : Split
        Without the pictures that can't be decoded, which its `problems` name.
    features : list of Tensor of float32, shape (n, d)
        Unit-norm embeddings by each model.

    Examples
    --------
    >>> import io, tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from mclip import evaluate, models
    >>> from mclip.data import evalsets, tars
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (32, 32), "red").save(file := io.BytesIO(), "PNG")
    >>> (folder / "test").mkdir()
    >>> written = (folder / "test" / "nshards.txt").write_text("1")
    >>> sample = {"__key__": "red", "png": file.getvalue(), "cls": b"0"}
    >>> written = tars.write_tar(folder / "test" / "0.tar", [sample])
    >>> split = evalsets.read_split(folder, answer=None)
    >>> model, _, preprocess, _ = models.create("demo-student")
    >>> split, (features,) = evaluate.image_features([model], split, preprocess)
    >>> features.shape
    torch.Size([1, 256])
    """
    for other, kept, broken, features in known or ():
        if same_pictures(split, other):
            return without(split, kept, broken), features
    kept, broken = [], {}
    encoders = [image_encoder(model, precision) for model in models]

    def pictures() -> Iterator[Tensor]:
        for indices, readable, bad in batches(split, preprocess, batch_size, workers):
            kept.extend(indices)
            broken.update(bad)
            if readable is not None:
                yield readable

    device = next(models[0].parameters()).device
    parts = list(
        side_by_side(lambda batch: [encode(batch) for encode in encoders], pictures(), device)
    )
    features = [torch.cat(own) for own in zip(*parts, strict=True)] or [
        torch.empty(0, 0) for _ in models
    ]
    if known is not None:
        known.append((split, kept, broken, features))
    return without(split, kept, broken), features


def prompts(split: Split) -> list[str]:
    """Write every class into every template, class by class.

    Parameters
    ----------
    split : Split
        With `classes` and `templates`; without templates the class names stand alone.

    Returns
    -------
    list of str
        All len(classes) * len(templates) texts.

    Examples
    --------
    >>> from mclip import evaluate
    >>> from mclip.data.evalsets import Split
    >>> split = Split([], [], [], ["cat", "dog"], ["a {c}", "my {c}"], [], [])
    >>> evaluate.prompts(split)
    ['a cat', 'my cat', 'a dog', 'my dog']
    """
    return [t.replace("{c}", name) for name in split.classes for t in split.templates or ["{c}"]]


def class_features(features: Tensor, classes: int) -> Tensor:
    """Average the embeddings of each class's prompts, and normalise the mean.

    Parameters
    ----------
    features : Tensor, shape (classes * templates, d)
        Unit-norm embeddings of `prompts`.
    classes : int
        Number of classes.

    Returns
    -------
    Tensor, shape (classes, d)
        Unit-norm rows.

    References
    ----------
    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
    arXiv 2103.00020, Section 3.1.4: prompt ensembling.

    Examples
    --------
    >>> import torch
    >>> from mclip import evaluate
    >>> evaluate.class_features(torch.eye(2), classes=1)
    tensor([[0.7071, 0.7071]])
    """
    return F.normalize(features.view(classes, -1, features.shape[-1]).mean(1), dim=-1)


def once(tokenizer: Callable[[list[str]], Tensor]) -> Callable[[list[str]], Tensor]:
    """Wrap a tokenizer for models that get the same texts: each text is tokenised once."""
    known: dict[tuple[str, ...], Tensor] = {}

    def tokenize(texts: list[str]) -> Tensor:
        if (key := tuple(texts)) not in known:
            known[key] = tokenizer(texts)
        return known[key]

    return tokenize
