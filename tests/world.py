"""A tiny world: 24 pairs in three shards, a 2-teacher ensemble, embeddings, balance, clusters, a
reinforced set; and a tiny student.

The folders hold what the stages write, made by the stages' own writers from random numbers, so that
loaders and the trainer are tested without teachers. The fixtures `world`, `training_set` and
`student` of conftest.py hand them out.
"""

import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
from PIL import Image
from torch.nn import functional as F

from mclip import balance, cluster, models
from mclip.data import augment, shards
from mclip.data.stores import embeddings as embedding_store
from mclip.data.stores import reinforced
from mclip.distill.pairs import FOLDERS, TrainingSet
from mclip.params import Recipe, Train

N, SHARD, PX, WIDTHS = 24, 8, 16, (6, 5)


def png(seed: int, side: int = 20) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def write_world(root: Path) -> None:
    """Write `root / "pairs"` and the other stages' folders."""
    keys = [f"k{i:03d}" for i in range(N)]
    captions = [f"a picture of thing {i % 9}" for i in range(N)]
    shards.write_shards(
        [
            shards.Sample(k, png(i), "png", c, {})
            for i, (k, c) in enumerate(zip(keys, captions, strict=True))
        ],
        root / "pairs",
        shard_size=SHARD,
    )
    emb = root / "embeddings" / "large"
    for part, seed in (("img_emb", 1), ("text_emb", 2)):
        (emb / part).mkdir(parents=True)
        for i, rows in enumerate(unit(N, WIDTHS[1], seed=seed).half().split(SHARD)):
            np.save(embedding_store.part_file(emb, part, i), rows.numpy())
    (emb / "metadata").mkdir()
    table = pd.DataFrame({"key": keys, "caption": captions})
    for i in range(N // SHARD):
        table[i * SHARD : (i + 1) * SHARD].to_parquet(embedding_store.part_file(emb, "metadata", i))
    rows = unit(N, WIDTHS[1], seed=1).half().numpy()
    rows[5] = rows[4]  # one duplicate: k005 goes
    result = balance.balance(rows, keys, threshold=1e-3, metric="sql2")
    balance.write(root / "balance", result)
    cluster.write(root / "clusters", cluster.cluster(rows, 4, iterations=5, seed=0, keys=keys))
    (root / "reinforced").mkdir()
    for index in range(N // SHARD):
        mine = list(range(index * SHARD, (index + 1) * SHARD))
        reinforced.write_shard(
            root / "reinforced",
            index,
            reinforced.Shard(
                keys=[keys[i] for i in mine],
                captions=[captions[i] for i in mine],
                syn_text=[[f"thing {i % 9}", "a thing"] for i in mine],
                augment=np.stack(
                    [augment.draw(keys[i], (20, 20), 3, image_px=PX, seed=0) for i in mine]
                ),
                image_emb=torch.cat(
                    [unit(len(mine), 3, w, seed=index) for w in WIDTHS], -1
                ).bfloat16(),
                text_emb=torch.cat(
                    [unit(len(mine), 3, w, seed=index + 9) for w in WIDTHS], -1
                ).bfloat16(),
            ),
        )
    teachers = [
        {"name": "base", "slice": [0, 6], "width": 6, "logit_scale": 10.0, "model": "-"},
        {"name": "large", "slice": [6, 11], "width": 5, "logit_scale": 20.0, "model": "-"},
    ]
    (root / "reinforced" / "meta.json").write_text(
        json.dumps(
            {
                "teachers": teachers,
                "settings": {"image_px": PX, "n_aug": 3, "n_syn": 2},
                "samples": N,
            }
        )
    )


def make_training_set(
    root: Path, which: str, use_reinforced: bool = False, **options
) -> TrainingSet:
    """A TrainingSet over the tiny world in `root`."""
    folders = {name: str(root / name) for name in FOLDERS}
    return TrainingSet(which, use_reinforced, **({"image_px": PX} | folders | options))


TRAIN = Train(
    samples=48,
    batch_size=8,
    accumulate=1,
    grad_checkpoint=False,
    loss_kernel="auto",
    optimizer="adamw",
    lr=1e-3,
    lr_adamw=1e-3,
    lr_min=0,
    lr_centres=1e-3,
    warmup_steps=2,
    weight_decay=0.1,
    betas=(0.9, 0.98),
    grad_clip=1.0,
    ema=None,
    precision="fp32",
    logit_scale_init=14.3,
    logit_scale_max=100,
    light_scale_min=0.9,
    cache_pixels=True,
    light_views=2,
    processes=1,
    parallel_runs=2,
    threads=1,
    workers=0,
    checkpoint_every=10,
)

RECIPES = {
    "clip": Recipe(title="CLIP", pairs="all", weight={"clip": 1.0}),
    "clip-cid": Recipe(
        title="CLIP-CID",
        pairs="kept",
        weight={"clip": 1, "cluster": 1, "instance": 1},
        multi_positive=True,
    ),
    "mobileclip": Recipe(
        title="MobileCLIP",
        pairs="all",
        reinforced=True,
        weight={"clip": 1, "affinity": 1},
        synthetic=True,
        **{"lambda": 1.0},
    ),
    "combined": Recipe(
        title="combined",
        pairs="kept",
        reinforced=True,
        multi_positive=True,
        synthetic=True,
        weight={"clip": 1, "cluster": 1, "instance": 1, "affinity": 1},
        **{"lambda": 0.7},
    ),
}


def write_student(folder: Path) -> str:
    """Model string of a tiny student without batch norm (so that splitting a batch changes
    nothing).
    """
    torch.manual_seed(0)
    cfg = {
        "embed_dim": 7,
        "vision_cfg": {
            "image_size": PX,
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**cfg)
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    models.export(model, folder, config=cfg, preprocess=preprocess)
    return f"local-dir:{folder}"
