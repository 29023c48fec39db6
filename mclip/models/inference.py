"""Fast inference: folded batch norm and LayerScale, channels last, bf16 where it is fast.

On 2 CPU cores folding and channels last take EfficientNet-Lite0 at 64 px from 676 to 1,114
images/s.

`torch.no_grad` is used, never `torch.inference_mode`: there, torch 2.15's linear takes another path
for the transposed input of attention, in bf16 on a CPU with AMX; a ViT-B/16 with four pictures took
5.8 s instead of 0.3. In fp32 both give the same bits.
"""

import collections
import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import open_clip.hf_model
import torch
import torch.nn.functional as F
from timm.layers import LayerScale2d
from timm.models import fastvit
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mclip.system.precision import resolve_precision
from mclip.system.threads import side_by_side

SCALES = (LayerScale2d, fastvit.LayerScale2d)  # x -> gamma x, a factor a channel


def for_inference(model: nn.Module) -> nn.Module:
    """Fold a model for fast inference, without changing its embeddings.

    Parameters
    ----------
    model : torch.nn.Module
        An open_clip model, or anything with `.visual(images)` and `.visual.image_size`. It is not
        changed: a model with batch norm is copied first. One without, or one that is folded
        already, is returned itself.

    Returns
    -------
    torch.nn.Module
        In eval mode and channels-last memory; branches, batch norm and LayerScale of both towers
        are folded into convolutions. Its embeddings equal the model's to 1e-4.

    Notes
    -----
    Multi-branch blocks (timm's FastViT and MobileOne, MCt's RepMixer) become one convolution each.
    Then a probe run shows which batch norm or LayerScale reads which convolution's output; such a
    pair becomes one convolution (`torch.nn.utils.fusion`), and the activation of timm's
    BatchNormAct2d stays. A folded tower must repeat the probe's embedding to 1e-4, else it stays
    unfolded: the result is always right.

    References
    ----------
    Vasu et al., "MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training",
    arXiv 2311.17049, Section 4: the towers whose branches are folded.

    Examples
    --------
    >>> import torch
    >>> from mclip import models
    >>> model, *_ = models.create("demo-student")
    >>> fast = models.for_inference(model)
    >>> images = torch.randn(2, 3, 32, 32)
    >>> with torch.no_grad():
    ...     near = torch.allclose(model.encode_image(images), fast.encode_image(images), atol=1e-3)
    >>> near
    True
    """
    model.eval()
    towers = [name for name in ("visual", "text") if _foldable(getattr(model, name, None))]
    if not towers:
        return model.to(memory_format=torch.channels_last)
    known = getattr(
        model, "mclip", None
    )  # with its tokenizer, whose 49,408 words take a second to copy
    folded = copy.deepcopy(model, {id(known): known}).requires_grad_(False)
    for name in towers:
        tower = copy.deepcopy(getattr(folded, name))
        probe = _probe(tower)
        if not any(
            getattr(m, "reparam_conv", None) is not None for m in tower.modules()
        ):  # timm's can be done once
            reparameterize_model(tower, inplace=True)
        _fold(tower.eval(), probe)
        with torch.no_grad():
            same = torch.allclose(
                _embed(tower, probe), _embed(getattr(folded, name), probe), atol=1e-4
            )
        if same:
            tower.is_folded = True
            setattr(folded, name, tower.requires_grad_(False))
    return folded.to(memory_format=torch.channels_last)


def image_encoder(model: nn.Module, precision: str = "auto") -> Callable[[Tensor], Tensor]:
    """Make a function that embeds preprocessed pictures.

    Parameters
    ----------
    model : torch.nn.Module
        An open_clip model, ideally from `for_inference`; the pictures go to its device.
    precision : {"auto", "fp32", "bf16"}, default "auto"
        Of the arithmetic (autocast), see `resolve_precision`.

    Returns
    -------
    callable
        (b, 3, h, w) Tensor of float -> (b, d) Tensor of float32 on the CPU, unit-norm rows.

    Examples
    --------
    >>> import torch
    >>> from mclip import models
    >>> encode = models.image_encoder(models.create("demo-student")[0], "fp32")
    >>> with torch.no_grad():
    ...     encode(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 256])
    """
    device = next(model.parameters()).device
    dtype = resolve_precision(precision, device)

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            return F.normalize(model.encode_image(images).float(), dim=-1).cpu()

    return encode


@torch.no_grad()
def encode_images(
    model: nn.Module, batches: Iterable[Tensor], *, precision: str = "auto"
) -> Tensor:
    """Embed batches of preprocessed pictures.

    Parameters
    ----------
    model : torch.nn.Module
        An open_clip model, ideally from `for_inference`.
    batches : iterable of Tensor, shape (b, 3, h, w)
        For instance a DataLoader.
    precision : {"auto", "fp32", "bf16"}, default "auto"
        Of the arithmetic, see `resolve_precision`.

    Returns
    -------
    Tensor of float32, shape (n, d)
        Unit-norm rows, on the CPU.

    Examples
    --------
    >>> from PIL import Image
    >>> from mclip import models
    >>> model, _, preprocess, _ = models.create("demo-student")
    >>> pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    >>> models.encode_images(model, [preprocess(picture)[None] for picture in pictures]).shape
    torch.Size([2, 256])
    """
    encode = image_encoder(model, precision)
    out = list(side_by_side(encode, batches, next(model.parameters()).device))
    return torch.cat(out) if out else torch.empty(0, 0)


def encode_texts(
    model: nn.Module, tokenizer, texts: list[str], *, batch_size: int = 256, precision: str = "auto"
) -> Tensor:
    """Embed texts, each distinct one once.

    Hugging Face towers mask their padding, so their batches, sorted by length, are cut to their
    longest text: two to four times faster, the same embeddings.

    Parameters
    ----------
    model : torch.nn.Module
        An open_clip model.
    tokenizer : callable
        List of str -> (n, context) Tensor of int64, as `create` returns it.
    texts : list of str
        Any number of them, also with repetitions.
    batch_size : int, default 256
        Texts at a time.
    precision : {"auto", "fp32", "bf16"}, default "auto"
        Of the arithmetic, see `resolve_precision`.

    Returns
    -------
    Tensor of float32, shape (n, d)
        Unit-norm rows in the order of the texts, on the CPU.

    Examples
    --------
    >>> from mclip import models
    >>> model, _, _, tokenizer = models.create("demo-student")
    >>> rows = models.encode_texts(model, tokenizer, ["a cat", "a dog", "a cat"])
    >>> bool((rows[0] == rows[2]).all())
    True
    """
    return _encode_texts([model], tokenizer, texts, batch_size, precision)[0]


def encode_texts_with_all(
    ensemble: Sequence[tuple[nn.Module, Any]],
    texts: list[str],
    *,
    batch_size: int = 256,
    precision: str = "auto",
) -> list[Tensor]:
    """Embed texts by each model of an ensemble.

    Models whose Hugging Face text encoders have the same weights, such as teachers of one frozen
    sentence encoder, run it once and differ in their projections only.

    Parameters
    ----------
    ensemble : sequence of (torch.nn.Module, callable)
        Models and their tokenizers.
    texts : list of str
        Any number of them, also with repetitions.
    batch_size : int, default 256
        Texts at a time.
    precision : {"auto", "fp32", "bf16"}, default "auto"
        Of the arithmetic, see `resolve_precision`.

    Returns
    -------
    list of Tensor of float32, shape (n, d_k)
        Unit-norm rows by each model, on the CPU.

    Examples
    --------
    >>> from mclip import models
    >>> model, _, _, tokenizer = models.create("demo-student")
    >>> [rows.shape for rows in models.encode_texts_with_all([(model, tokenizer)] * 2, ["a cat"])]
    [torch.Size([1, 256]), torch.Size([1, 256])]
    """
    out: dict[int, Tensor] = {}
    for i, (model, tokenizer) in enumerate(ensemble):
        if i in out:
            continue
        alike = [
            j
            for j in range(i + 1, len(ensemble))
            if j not in out and _share_text(ensemble[i], ensemble[j])
        ]
        found = _encode_texts(
            [model, *(ensemble[j][0] for j in alike)], tokenizer, texts, batch_size, precision
        )
        out |= dict(zip([i, *alike], found, strict=True))
    return [out[i] for i in range(len(ensemble))]


def _share_text(a: tuple[nn.Module, Any], b: tuple[nn.Module, Any]) -> bool:
    """Do two models make the same text features before their projections?"""
    texts = [getattr(model, "text", None) for model, _ in (a, b)]
    if not all(isinstance(text, open_clip.hf_model.HFTextEncoder) for text in texts):
        return False
    tokenizers = [tokenizer for _, tokenizer in (a, b)]
    if not all(
        hasattr(t.tokenizer, "backend_tokenizer") for t in tokenizers
    ):  # a slow one can't be compared
        return False
    if (
        len(
            {
                (t.context_length, t.clean_fn, t.tokenizer.backend_tokenizer.to_str())
                for t in tokenizers
            }
        )
        > 1
    ):
        return False
    if len({type(text.pooler) for text in texts}) > 1:
        return False
    first, second = (text.transformer.state_dict() for text in texts)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@torch.no_grad()
def _encode_texts(
    models: Sequence[nn.Module], tokenizer, texts: list[str], batch_size: int, precision: str
) -> list[Tensor]:
    """Embeddings by models that differ in their text projections only: the first one's encoder
    serves all.
    """
    if not texts:
        return [torch.empty(0, 0) for _ in models]
    model = models[0]
    device = next(model.parameters()).device
    dtype = resolve_precision(precision, device)
    distinct = sorted(set(texts))
    row = {text: i for i, text in enumerate(distinct)}
    tokens = torch.cat([tokenizer(distinct[i : i + 8192]) for i in range(0, len(distinct), 8192)])
    order = torch.arange(len(distinct))
    trim = isinstance(getattr(model, "text", None), open_clip.hf_model.HFTextEncoder)
    if trim:
        pad: Any = model.text.config.pad_token_id
        length = tokens.shape[1] - (tokens.flip(1) != pad).int().argmax(1)
        order = length.argsort(stable=True)
    projections = [m.text.proj for m in models] if len(models) > 1 else [nn.Identity()]

    def encode(rows: Tensor) -> list[Tensor]:
        batch = tokens[rows, : int(length[rows].max())] if trim else tokens[rows]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features = model.encode_text(batch.to(device))
            return [F.normalize(project(features).float(), dim=-1).cpu() for project in projections]

    if len(models) > 1:
        model.text.proj = nn.Identity()
    try:
        parts = list(side_by_side(encode, order.split(batch_size), device))
    finally:
        if len(models) > 1:
            model.text.proj = projections[0]
    found, back = [], order.argsort()
    for own in zip(*parts, strict=True):
        found.append(torch.cat(own)[back][[row[text] for text in texts]])
    return found


def is_folded(model: nn.Module) -> bool:
    """Has a tower of the model gone through `for_inference`? open_clip can't build such a one."""
    return any(
        getattr(getattr(model, name, None), "is_folded", False) for name in ("visual", "text")
    )


def _foldable(tower: nn.Module | None) -> bool:
    return (
        tower is not None
        and not getattr(tower, "is_folded", False)
        and any(isinstance(m, nn.BatchNorm2d) for m in tower.modules())
    )


def _probe(tower: Any) -> Tensor:
    """An input for a tower: two noise pictures, or two rows of tokens."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(tower.parameters())
    if not hasattr(tower, "image_size"):
        return torch.randint(tower.vocab_size, (2, tower.context_length), generator=generator).to(
            parameter.device
        )
    size = tower.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    return torch.randn(2, 3, *size, generator=generator).to(parameter.device, parameter.dtype)


def _embed(tower: nn.Module, probe: Tensor) -> Tensor:
    out = tower(probe)
    return F.normalize((out[0] if isinstance(out, tuple) else out).float(), dim=-1)


def _fold(root: nn.Module, probe: Tensor) -> None:
    """Fold in place every batch norm and LayerScale that is the only reader of a convolution's
    output on the probe run.
    """
    source: dict[
        int, tuple[str, Tensor]
    ] = {}  # id -> convolution that made it, the tensor (kept alive)
    pairs: dict[str, str] = {}  # batch norm or LayerScale -> convolution

    def made(name):
        def hook(module, args, out):
            source[id(out)] = name, out
            readers.count[id(out)] = 0  # a tensor that is gone may have had this id

        return hook

    def reads(name):
        def hook(module, args):
            if (found := source.get(id(args[0]))) and found[1] is args[0]:
                pairs[name] = found[0]

        return hook

    handles, readers = [], _Readers()
    for name, module in root.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(made(name)))
        elif isinstance(module, (nn.BatchNorm2d, *SCALES)):
            handles.append(module.register_forward_pre_hook(reads(name)))
    with torch.no_grad(), readers:
        root(probe)
    for handle in handles:
        handle.remove()
    alone = {
        name for name, out in source.values() if readers.count[id(out)] == 1
    }  # no residual branch reads it, too
    for name, conv_name in pairs.items():
        if conv_name not in alone:
            continue
        module, conv = root.get_submodule(name), root.get_submodule(conv_name)
        fuse: Callable = _scaled if isinstance(module, SCALES) else fuse_conv_bn_eval
        root.set_submodule(conv_name, fuse(conv, module))
        root.set_submodule(name, getattr(module, "act", nn.Identity()))


@torch.no_grad()
def _scaled(conv: nn.Conv2d, scale: nn.Module) -> nn.Conv2d:
    """The convolution that does what `conv` and the LayerScale after it do."""
    conv, gamma = copy.deepcopy(conv), scale.gamma.flatten()
    conv.weight.mul_(gamma[:, None, None, None])
    if conv.bias is not None:
        conv.bias.mul_(gamma)
    return conv


class _Readers(TorchDispatchMode):
    """Counts how many operations read each tensor, by its id."""

    def __init__(self):
        super().__init__()
        self.count: collections.Counter[int] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count.update(id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))
