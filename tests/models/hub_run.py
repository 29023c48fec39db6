"""Run by tests/models/test_hub.py in a process of its own, as the hub's cache is chosen when its library
is imported.

Puts random weights of the real architectures, cut to the number of layers that is asked for, where
the hub's client keeps what it has downloaded, and takes a hub teacher and a hub captioner through the stages' code: pinned, embedded with,
reinforced with.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(sys.argv[1])
os.environ |= {"HF_HOME": str(ROOT / "hub"), "HF_HUB_OFFLINE": "1"}

import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from mclip import embed, models, params, reinforce  # noqa: E402
from mclip.data import shards  # noqa: E402
from mclip.data.stores import balance as balance_store  # noqa: E402
from mclip.data.stores import reinforced  # noqa: E402
from mclip.teachers import align  # noqa: E402

TEACHER, CAPTIONER = (
    "ViT-B-32/laion2b_s34b_b79k",
    "coca_ViT-B-32/mscoco_finetuned_laion2b_s13b_b90k",
)


def put(name: str, seed: int) -> dict[str, torch.Tensor]:
    """Random weights of ARCH/TAG in the hub's cache."""
    arch, tag = name.split("/")
    torch.manual_seed(seed)
    model = open_clip.create_model(arch)
    with (
        torch.no_grad()
    ):  # not of use, but no garbage either: open_clip leaves some of CoCa's memory as it finds it
        for weight in model.parameters():
            if not torch.isfinite(weight).all() or weight.abs().max() > 1e3 or weight.ndim == 2:
                weight.normal_(std=0.02)
    state = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    repo = "models--" + open_clip.get_pretrained_cfg(arch, tag)["hf_hub"].strip("/").replace(
        "/", "--"
    )
    folder = ROOT / "hub" / "hub" / repo
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, folder / "snapshots" / ("0" * 40) / "open_clip_model.safetensors")
    return state


def main() -> None:
    (ROOT / "configs").mkdir()
    for arch in (name.split("/")[0] for name in (TEACHER, CAPTIONER)):
        config = open_clip.get_model_config(arch)
        for tower in ("vision_cfg", "text_cfg", "multimodal_cfg"):
            if "layers" in config.get(tower, {}):
                config[tower]["layers"] = int(sys.argv[2])
        (ROOT / "configs" / f"{arch}.json").write_text(json.dumps(config))
    open_clip.add_model_config(ROOT / "configs")
    expected = put(TEACHER, 0)
    put(CAPTIONER, 1)
    section = params.Teachers(
        models={"big": TEACHER},
        assemble={},
        captioner=CAPTIONER,
        captioner_train=None,
        align=params.load(Path(__file__).parents[2] / "params.yaml").teachers.align,
    )
    entry = align.assemble(section, out=ROOT / "models")["big"]
    embed.run({"big": TEACHER}, pairs=ROOT / "pairs", out=ROOT / "embeddings", batch_size=2)
    table = embed.load(ROOT / "embeddings" / "big")
    model, _, preprocess, _ = models.create(TEACHER)
    first = next(iter(shards.iter_samples(ROOT / "pairs")))
    with torch.no_grad():
        direct = torch.nn.functional.normalize(
            model.encode_image(preprocess(shards.decode(first))[None]), dim=-1
        )
    settings = params.Reinforce(
        ensemble=["big"],
        n_aug=1,
        n_syn=1,
        image_px=224,
        scale_min=0.5,
        randaugment_ops=2,
        randaugment_magnitude=9,
        caption_top_p=0.9,
        caption_candidates=2,
        batch_size=2,
        precision="fp32",
        seed=0,
    )
    n = len(table.keys)
    balance_store.write(
        ROOT / "balance",
        balance_store.Balance(
            np.arange(n), np.ones(n, bool), np.zeros(n), np.array(table.keys), 0.1, "sql2"
        ),
    )
    meta = reinforce.run(
        settings,
        {"big": TEACHER},
        CAPTIONER,
        pairs=ROOT / "pairs",
        balance=ROOT / "balance",
        out=ROOT / "reinforced",
        cache=ROOT / "cache",
    )
    shard = reinforced.read_shard(ROOT / "reinforced", 0)
    print(
        json.dumps(
            {
                "entry": entry,
                "keys": table.keys,
                "shape": table.image.shape,
                "scale": table.logit_scale,
                "same": bool(
                    torch.equal(model.state_dict()["visual.proj"], expected["visual.proj"])
                ),
                "cosine": float(
                    np.dot(table.image[0].astype(np.float64), direct[0].double().numpy())
                ),
                "captions": [len(c) for c in shard.syn_text],
                "samples": meta["samples"],
                "widths": [shard.image_emb.shape[-1], shard.text_emb.shape[-1]],
            }
        )
    )


if __name__ == "__main__":
    main()
