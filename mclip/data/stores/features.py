"""Features of a frozen image trunk, a shard a file: computed once for all that put a head on them.

A teacher's image tower is a trunk, which is expensive, and a linear head, which costs nothing. The
stage `teachers` needs every picture's features to train the head, the stage `embed` to apply it.
`image_features` computes them, or reads them where somebody kept them:

    data/cache/features/<digest>.safetensors     features: (n, width), in the trunk's own precision

The digest is of all that the numbers depend on: the folded trunk's weights, the picture's size and
preprocessing, precision, batch size, kind of device, and the shard's sha256. So whoever reads gets
the bits that it would have computed itself, and `rm -r data/cache/features` is always safe.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mclip.data import shards
from mclip.system.files import digest, whole

if TYPE_CHECKING:
    import torch

CACHE = Path("data/cache/features")


def has_trunk(model: Any) -> bool:
    """Tell whether a model's image tower is a timm trunk with a head of its own.

    Parameters
    ----------
    model : torch.nn.Module
        An open_clip model.

    Returns
    -------
    bool

    Examples
    --------
    >>> from mclip import models
    >>> from mclip.data.stores import features
    >>> features.has_trunk(models.create("demo-vit")[0])
    False
    """
    from open_clip.timm_model import TimmModel

    return isinstance(getattr(model, "visual", None), TimmModel)


def image_features(
    model: Any,
    samples: list[shards.Sample],
    shard: dict[str, Any],
    *,
    precision: str = "auto",
    batch_size: int = 64,
    decoders: int = 0,
    cache: str | Path = CACHE,
    keep: bool = False,
    done: Callable[[int], object] = lambda pictures: None,
) -> "torch.Tensor":
    """Features of a shard's pictures before the model's head, from the cache where it has them.

    Parameters
    ----------
    model : torch.nn.Module
        Of `mclip.models.for_inference`, with a trunk (`has_trunk`); its device does the work.
    samples : list of Sample
        The shard's pairs.
    shard : dict
        Its entry of the manifest, whose sha256 and number of pairs say which it is.
    precision : {"auto", "fp32", "bf16"}, default "auto"
        Of the arithmetic, see `mclip.models.resolve_precision`.
    batch_size : int, default 64
        Pictures at a time.
    decoders : int, default 0
        Decoding processes; 0: this one decodes.
    cache : path
        Folder of the kept features.
    keep : bool, default False
        Write what had to be computed into the cache: four bytes times the width a picture.
    done : callable
        Called with the number of pictures of each batch.

    Returns
    -------
    Tensor, shape (n, width)
        On the CPU, float32 or bfloat16 as the trunk gives them. The same bits from the cache as
        computed.

    See Also
    --------
    embed_images : The embeddings that the model's head makes of them.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from torch.utils.data import DataLoader

    from mclip import models
    from mclip.system.threads import side_by_side

    trunk, device = model.visual.trunk, next(model.parameters()).device
    dtype = models.resolve_precision(precision, device)
    file = path(model, shard, precision=precision, batch_size=batch_size, cache=cache)
    if file.is_file():
        done(len(samples))
        return load_file(file)["features"]
    loader: DataLoader = DataLoader(
        shards.Pictures(samples, _preprocessing(model)),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=decoders,
        pin_memory=device.type == "cuda",
    )

    def encode(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            return trunk(images).cpu()

    batches = []
    for rows in side_by_side(encode, loader, device):
        batches.append(rows)
        done(len(rows))
    features = torch.cat(batches).contiguous()
    if keep:
        with whole(file) as draft:
            save_file({"features": features}, draft)
    return features


def embed_images(
    model: Any, features: "torch.Tensor", *, precision: str = "auto", batch_size: int = 64
) -> "torch.Tensor":
    """Embeddings of pictures from the features of their trunk.

    Parameters
    ----------
    model : torch.nn.Module
        Whose trunk the features are of.
    features : Tensor, shape (n, width)
        Of `image_features`.
    precision, batch_size
        As `image_features` has them; the bits depend on both.

    Returns
    -------
    Tensor of float32, shape (n, d)
        Unit-norm rows, on the CPU: what `mclip.models.encode_images` makes of the pictures.
    """
    import torch
    from torch.nn import functional as F

    from mclip import models
    from mclip.system.threads import side_by_side

    device = next(model.parameters()).device
    dtype = models.resolve_precision(precision, device)

    def project(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return F.normalize(model.visual.head(rows.to(device)).float(), dim=-1).cpu()

    return torch.cat(list(side_by_side(project, features.split(batch_size), device)))


def path(
    model: Any,
    shard: dict[str, Any],
    *,
    precision: str = "auto",
    batch_size: int = 64,
    cache: str | Path = CACHE,
) -> Path:
    """The cache's file for a shard's features, there or not; arguments as in `image_features`."""
    from mclip import models

    device = next(model.parameters()).device
    made_of = {
        "trunk": _weights(model.visual.trunk),
        "size": models.image_size(model),
        "preprocess": _preprocess(model),
        "precision": str(models.resolve_precision(precision, device)),
        "batch_size": batch_size,
        "device": device.type,
        "shard": [shard["sha256"], shard["samples"]],
    }
    return Path(cache) / f"{digest(made_of)}.safetensors"


def _preprocess(model: Any) -> dict[str, Any]:
    settings = model.visual.preprocess_cfg
    return {
        "mean": list(settings["mean"]),
        "std": list(settings["std"]),
        "interpolation": settings["interpolation"],
        "resize_mode": settings["resize_mode"],
    }


def _preprocessing(model: Any) -> Callable:
    from mclip import models
    from mclip.models.factory import preprocessing

    return preprocessing(models.image_size(model), _preprocess(model))


def _weights(trunk: Any) -> str:
    """A digest of a network's layers and weights."""
    found = hashlib.sha256(str(trunk).encode())
    for name, tensor in trunk.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return found.hexdigest()
