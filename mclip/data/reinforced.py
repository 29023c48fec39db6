"""The reinforced set on disk: augmentation parameters, synthetic captions, ensemble embeddings (papers.md 2.1).

    data/reinforced/meta.json                      teachers, widths, logit scales, settings, counts
    data/reinforced/reinforced_0000.safetensors    augment (n, n_aug, 4 + 2 ops) f32, image_emb (n, n_aug, D) bf16,
                                                   text_emb (n, 1 + n_syn, D) bf16 (true caption first)
    data/reinforced/reinforced_0000.parquet        key, caption, syn_text (list of n_syn)

Shard i belongs to shard i of the pairs. D is the sum of the teachers' widths; each teacher's slice has unit norm by
itself. `from_published_sample` reads a sample of Apple's published layout (papers.md 2.6).
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from ..files import whole
from .augment import from_published


@dataclass(frozen=True)
class Shard:
    """One shard of the reinforced set; n samples, D the ensemble's width."""

    keys: list[str]
    captions: list[str]
    syn_text: list[list[str]]
    augment: np.ndarray  # (n, n_aug, 4 + 2 ops) float32
    image_emb: torch.Tensor  # (n, n_aug, D) bfloat16
    text_emb: torch.Tensor  # (n, 1 + n_syn, D) bfloat16


def paths(folder: str | Path, index: int) -> tuple[Path, Path]:
    """The two files of shard `index`: (safetensors, parquet)."""
    stem = Path(folder) / f"reinforced_{index:04d}"
    return stem.with_suffix(".safetensors"), stem.with_suffix(".parquet")


def write_shard(folder: str | Path, index: int, shard: Shard) -> None:
    """Write a shard; the tensors appear last, so a shard with tensors is whole."""
    tensors, table = paths(folder, index)
    frame = pd.DataFrame({"key": shard.keys, "caption": shard.captions, "syn_text": shard.syn_text})
    with whole(table) as draft:
        frame.to_parquet(draft, index=False)
    content = {
        "augment": torch.from_numpy(np.ascontiguousarray(shard.augment)),
        "image_emb": shard.image_emb.contiguous(),
        "text_emb": shard.text_emb.contiguous(),
    }
    with whole(tensors) as draft:
        save_file(content, draft)


def read_shard(folder: str | Path, index: int) -> Shard:
    """Read a shard. Raises FileNotFoundError naming the missing file and the stage that writes it."""
    tensors, table = paths(folder, index)
    for path in (tensors, table):
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run `dvc repro reinforce` first")
    frame, data = pd.read_parquet(table), load_file(tensors)
    if len(frame) != len(data["augment"]):
        raise ValueError(f"{table}: {len(frame)} rows, but {tensors.name} has {len(data['augment'])}")
    return Shard(
        keys=frame["key"].tolist(),
        captions=frame["caption"].tolist(),
        syn_text=[list(s) for s in frame["syn_text"]],
        augment=data["augment"].numpy(),
        image_emb=data["image_emb"],
        text_emb=data["text_emb"],
    )


def read_meta(folder: str | Path) -> dict:
    """meta.json: `teachers` is a list of {name, model, width, logit_scale, slice: [start, stop]}."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `dvc repro reinforce` first")
    return json.loads(path.read_text())


def from_published_sample(sample: dict[str, bytes]) -> dict:
    """The reinforcement of one webdataset sample in the published layout (papers.md 2.6).

    Parameters
    ----------
    sample : raw bytes by extension: `syn.json`, `paug.json` and `npz` (or `pth.gz`).

    Returns
    -------
    {"syn_text": [...], "augment": (n_aug, p) float32, "image_emb": (n_aug, D) float32, "text_emb": (1 + n_syn, D)}

    Raises
    ------
    KeyError naming the missing extension; ValueError for a malformed augmentation.
    """
    for extension in ("syn.json", "paug.json"):
        if extension not in sample:
            raise KeyError(f"sample {sample.get('__key__', '?')} has no .{extension}")
    param_aug = json.loads(sample["paug.json"])["param_aug"]
    if isinstance(param_aug, str):  # the published set holds a JSON string, the training code a list
        param_aug = json.loads(param_aug)
    if "npz" in sample:
        with np.load(io.BytesIO(sample["npz"]), allow_pickle=False) as arrays:
            image_emb, text_emb = (np.asarray(arrays[k], dtype=np.float32) for k in ("image_emb", "text_emb"))
    elif "pth.gz" in sample:
        import gzip

        data = torch.load(io.BytesIO(gzip.decompress(sample["pth.gz"])), map_location="cpu", weights_only=True)
        image_emb, text_emb = (torch.as_tensor(data[k]).float().numpy() for k in ("image_emb", "text_emb"))
    else:
        raise KeyError(f"sample {sample.get('__key__', '?')} has neither .npz nor .pth.gz")
    return {
        "syn_text": json.loads(sample["syn.json"])["syn_text"],
        "augment": from_published(param_aug),
        "image_emb": image_emb,
        "text_emb": text_emb,
    }
