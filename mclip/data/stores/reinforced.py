"""The reinforced set on disk: augmentation parameters, synthetic captions, ensemble embeddings
(papers.md 2.1).

    FOLDER/meta.json                      teachers, widths, logit scales, settings, counts
    FOLDER/reinforced_0000.safetensors    augment (n, n_aug, 4 + 2 ops) f32,
                                          image_emb (n, n_aug, D) bf16,
                                          text_emb (n, 1 + n_syn, D) bf16 (true caption first)
    FOLDER/reinforced_0000.parquet        key, caption, syn_text (list of n_syn)

Shard i belongs to shard i of the pairs. D is the sum of the teachers' widths; each teacher's slice
has unit norm by itself. Embeddings are stored by a codec (mclip.data.stores.codecs): bf16, unless
the tensors' file names another in its metadata. `from_published_sample` reads a sample of Apple's
published layout (papers.md 2.6).
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mclip.data.augment import from_published
from mclip.data.stores import codecs
from mclip.system.files import whole, write_json

CODEC = "bf16"  # of files that name none
EMBEDDINGS = ("image_emb", "text_emb")
Plain = Callable[[list[str], list[str]], tuple[np.ndarray, torch.Tensor]]


@dataclass(frozen=True)
class Shard:
    """One shard of the reinforced set; n samples, D the ensemble's width."""

    keys: list[str]
    captions: list[str]
    syn_text: list[list[str]]
    augment: np.ndarray  # (n, n_aug, 4 + 2 ops) float32
    image_emb: torch.Tensor  # (n, n_aug, D), bfloat16 where the codec is bf16
    text_emb: torch.Tensor  # (n, 1 + n_syn, D), the same


def paths(folder: str | Path, index: int) -> tuple[Path, Path]:
    """The two files of shard `index`: (safetensors, parquet)."""
    stem = Path(folder) / f"reinforced_{index:04d}"
    return stem.with_suffix(".safetensors"), stem.with_suffix(".parquet")


def write_shard(folder: str | Path, index: int, shard: Shard, codec: str = CODEC) -> None:
    """Write a shard; the tensors appear last, so a shard with tensors is whole."""
    tensors, table = paths(folder, index)
    frame = pd.DataFrame({"key": shard.keys, "caption": shard.captions, "syn_text": shard.syn_text})
    with whole(table) as draft:
        frame.to_parquet(draft, index=False)
    content = {"augment": torch.from_numpy(np.ascontiguousarray(shard.augment))}
    for name in EMBEDDINGS:
        stored = codecs.get(codec).encode(getattr(shard, name))
        content |= {f"{name}{suffix}": tensor for suffix, tensor in stored.items()}
    with whole(tensors) as draft:
        save_file(content, draft, metadata=None if codec == CODEC else {"codec": codec})


def read_keys(folder: str | Path, index: int) -> list[str]:
    """A shard's keys alone. Raises as `read_shard`."""
    return pq.read_table(_there(folder, index)[1], columns=["key"])["key"].to_pylist()


def count(folder: str | Path, index: int) -> int:
    """A shard's samples, from the table's footer. Raises as `read_shard`."""
    return pq.read_metadata(_there(folder, index)[1]).num_rows


def _there(folder: str | Path, index: int) -> tuple[Path, Path]:
    for path in paths(folder, index):
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run `dvc repro reinforce` first")
    return paths(folder, index)


def read_shard(folder: str | Path, index: int) -> Shard:
    """Read a shard. A FileNotFoundError names the missing file and the stage that writes it."""
    tensors, table = _there(folder, index)
    frame = pd.read_parquet(table)
    with safe_open(tensors, "pt") as file:
        data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        codec = codecs.get((file.metadata() or {}).get("codec", CODEC))
    image_emb, text_emb = (
        codec.decode({name.removeprefix(own): data[name] for name in data if name.startswith(own)})
        for own in EMBEDDINGS
    )
    if len(frame) != len(data["augment"]):
        raise ValueError(
            f"{table}: {len(frame)} rows, but {tensors.name} has {len(data['augment'])}"
        )
    return Shard(
        keys=frame["key"].tolist(),
        captions=frame["caption"].tolist(),
        syn_text=[list(s) for s in frame["syn_text"]],
        augment=data["augment"].numpy(),
        image_emb=image_emb,
        text_emb=text_emb,
    )


def read_meta(folder: str | Path) -> dict:
    """meta.json: `teachers` is a list of {name, model, width, logit_scale, slice: [start, end]}."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `dvc repro reinforce` first")
    return json.loads(path.read_text())


def pictures(meta: dict) -> dict:
    """What the augmented pictures of a set depend on, of its meta.json: sets that share it have the
    same pictures.
    """
    drawn = ("n_aug", "image_px", "scale_min", "randaugment_ops", "randaugment_magnitude", "seed")
    settings = {k: v for k, v in meta["settings"].items() if k in drawn}
    return settings | {k: meta[k] for k in ("ops", "kept", "pairs", "versions") if k in meta}


def select(
    folder: str | Path,
    out: str | Path,
    *,
    n_aug: int | None = None,
    n_syn: int | None = None,
    ensemble: list[str] | None = None,
    captions: str = "true",
    plain: Plain | None = None,
) -> None:
    """Write a part of a reinforced set as a set of its own, without computing anything again.

    Parameters
    ----------
    n_aug, n_syn : how many augmentations and synthetic captions a sample, the first of those
        stored; None: all. n_aug 0: the picture itself, whole, with what `plain` says of it.
    ensemble : teachers, in the order wanted; None: all.
    captions : "synthetic": each sample's first synthetic caption takes the place of the true one.
    plain : (keys, names) -> (n, 4) crops that hold the whole picture, (n, D) float embeddings by
        these teachers.

    Raises
    ------
    ValueError where more is asked for than is stored.
    """
    meta = read_meta(folder)
    settings = dict(meta["settings"])
    for what, wanted in (("n_aug", n_aug), ("n_syn", n_syn)):
        if wanted is not None and wanted > settings.get(what, wanted):
            raise ValueError(f"{folder}: {settings[what]} stored, {what} {wanted} wanted")
    by_name = {t["name"]: t for t in meta["teachers"]}
    names = list(by_name) if ensemble is None else ensemble
    if unknown := [n for n in names if n not in by_name]:
        raise ValueError(f"{folder}: no teacher {unknown[0]!r}, there are {', '.join(by_name)}")
    columns = torch.cat([torch.arange(*by_name[n]["slice"]) for n in names])
    teachers, start = [], 0
    for name in names:
        teachers.append(by_name[name] | {"slice": [start, start + by_name[name]["width"]]})
        start += by_name[name]["width"]
    for index in sorted(
        int(path.stem.rpartition("_")[2]) for path in Path(folder).glob("reinforced_*.safetensors")
    ):
        shard = read_shard(folder, index)
        rows, image_emb = shard.augment[:, :n_aug], shard.image_emb[:, :n_aug, columns]
        if n_aug == 0:
            crops, found = plain(shard.keys, names)  # type: ignore[misc]
            rows = np.pad(crops, ((0, 0), (0, shard.augment.shape[2] - 4)))[:, None].astype(
                np.float32
            )  # op 0: none
            image_emb = found[:, None].bfloat16()
        texts, syn_text, text_emb = shard.captions, shard.syn_text, shard.text_emb[:, :, columns]
        if captions == "synthetic":
            texts, syn_text, text_emb = (
                [s[0] for s in syn_text],
                [s[1:] for s in syn_text],
                text_emb[:, 1:],
            )
        if n_syn is not None:
            syn_text, text_emb = [s[:n_syn] for s in syn_text], text_emb[:, : 1 + n_syn]
        write_shard(out, index, Shard(shard.keys, texts, syn_text, rows, image_emb, text_emb))
    settings |= {
        k: v
        for k, v in {"n_aug": n_aug, "n_syn": n_syn, "ensemble": ensemble}.items()
        if v is not None
    }
    if captions == "synthetic" and "n_syn" in meta["settings"]:
        settings["n_syn"] = min(meta["settings"]["n_syn"] - 1, settings["n_syn"])
    if n_aug == 0:
        settings |= {"n_aug": 1, "scale_min": "plain", "randaugment_ops": 0}
    write_json(
        Path(out) / "meta.json",
        meta | {"settings": settings, "teachers": teachers, "captions": captions},
    )


def from_published_sample(sample: dict[str, bytes]) -> dict:
    """The reinforcement of one webdataset sample in the published layout (papers.md 2.6).

    Parameters
    ----------
    sample : raw bytes by extension: `syn.json`, `paug.json` and `npz` (or `pth.gz`).

    Returns
    -------
    {"syn_text": [...], "augment": (n_aug, p) float32, "image_emb": (n_aug, D) float32,
    "text_emb": (1 + n_syn, D)}

    Raises
    ------
    KeyError naming the missing extension; ValueError for a malformed augmentation.
    """
    for extension in ("syn.json", "paug.json"):
        if extension not in sample:
            raise KeyError(f"sample {sample.get('__key__', '?')} has no .{extension}")
    param_aug = json.loads(sample["paug.json"])["param_aug"]
    if isinstance(
        param_aug, str
    ):  # the published set holds a JSON string, the training code a list
        param_aug = json.loads(param_aug)
    if "npz" in sample:
        with np.load(io.BytesIO(sample["npz"]), allow_pickle=False) as arrays:
            image_emb, text_emb = (
                np.asarray(arrays[k], dtype=np.float32) for k in ("image_emb", "text_emb")
            )
    elif "pth.gz" in sample:
        import gzip

        data = torch.load(
            io.BytesIO(gzip.decompress(sample["pth.gz"])), map_location="cpu", weights_only=True
        )
        image_emb, text_emb = (
            torch.as_tensor(data[k]).float().numpy() for k in ("image_emb", "text_emb")
        )
    else:
        raise KeyError(f"sample {sample.get('__key__', '?')} has neither .npz nor .pth.gz")
    return {
        "syn_text": json.loads(sample["syn.json"])["syn_text"],
        "augment": from_published(param_aug),
        "image_emb": image_emb,
        "text_emb": text_emb,
    }
