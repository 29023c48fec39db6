"""Reinforce the kept pairs once; every later training replays it and never loads a teacher (papers.md 2.1).

Per kept pair: n_aug strong augmentations as parameters, n_syn synthetic captions, and the ensemble's embeddings of
each augmented picture and of each caption, true one first. Work goes shard by shard: a shard appears when it is
whole, and a rerun with the same settings goes on with the first missing one.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from . import models
from .data import augment, reinforced, shards
from .data.reinforced import Shard
from .files import write_json
from .params import Reinforce
from .progress import bar


class _Views(Dataset):
    """The picture itself (at image_px) and its augmentations, uint8: ((3, s, s), (n_aug, 3, s, s), parameters)."""

    def __init__(self, samples: Sequence[shards.Sample], settings: Reinforce):
        self.samples, self.settings = samples, settings

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int):
        s, sample = self.settings, self.samples[i]
        image = shards.decode(sample)
        rows = augment.draw(sample.key, image.size, s.n_aug, image_px=s.image_px, seed=s.seed,
                            scale_min=s.scale_min, ops=s.randaugment_ops, magnitude=s.randaugment_magnitude)
        plain = np.asarray([0, 0, image.height, image.width], dtype=np.float32)
        return (torch.from_numpy(augment.replay_all(image, [plain], s.image_px)[0]),
                torch.from_numpy(augment.replay_all(image, rows, s.image_px)), torch.from_numpy(rows))


def run(
    settings: Reinforce,
    teachers: dict[str, str],
    captioner: str,
    kept: set[str],
    *,
    pairs: str | Path = "data/pairs",
    out: str | Path = "data/reinforced",
    workers: int | None = None,
) -> dict:
    """Write the reinforced set of the pairs whose key is in `kept`.

    Parameters
    ----------
    settings : params.yaml's reinforce section.
    teachers : name -> open_clip model string; settings.ensemble picks and orders them.
    captioner : model string of an open_clip CoCa; not loaded when n_syn is 0.
    kept : keys to reinforce; all other pairs are left out.

    Returns
    -------
    What meta.json holds: teachers with widths, logit scales and slices; settings; samples; library versions.

    Raises
    ------
    ValueError when no pair is kept; ModelError for a teacher that can't be made.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    manifest = shards.read_manifest(pairs)
    ensemble, described, start = [], [], 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in settings.ensemble:
        model, _, _, tokenizer = models.create(teachers[name], device=device)
        width = models.encode_texts(model, tokenizer, ["a"]).shape[1]
        described.append({"name": name, "model": teachers[name], "width": width,
                          "logit_scale": models.logit_scale(model), "slice": [start, start + width],
                          "sha256": models.weights_sha256(teachers[name])})
        ensemble.append((models.for_inference(model), tokenizer))
        start += width
    writer = None
    if settings.n_syn:
        writer = models.for_inference(models.create(captioner, device=device)[0])
    identity = {
        "settings": settings.model_dump(), "teachers": described, "ops": list(augment.OPS),
        "captioner": models.weights_sha256(captioner) if settings.n_syn else None,
        "kept": hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest(),
        "pairs": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest(),
        "versions": {p: version(p) for p in ("torch", "torchvision", "pillow", "open_clip_torch")},
    }
    _forget_others(out, identity)
    total, passes = 0, 2 if settings.n_syn else 1
    with bar(desc="reinforce", unit="pass", total=passes * len(kept)) as progress:
        for index in range(len(manifest["shards"])):
            if reinforced.paths(out, index)[0].exists():
                n = reinforced.count(out, index)
            else:
                samples = [s for s in shards.iter_samples(pairs, shards=[index]) if s.key in kept]
                shard = reinforce_samples(samples, settings, ensemble, writer, workers=workers, done=progress.update)
                reinforced.write_shard(out, index, shard)
                n = 0
                total += len(samples)
            progress.update(passes * n)
            total += n
    if not total:
        raise ValueError("reinforce: no pair is kept; is balance.threshold too large?")
    return _write_meta(out, {**identity, "samples": total, "complete": True})


def reinforce_samples(samples: Sequence[shards.Sample], settings: Reinforce, ensemble: Sequence[tuple], writer=None, *,
                      workers: int | None = None, done: Callable[[int], object] = lambda n: None) -> Shard:
    """Augmentations, captions and embeddings of some pairs, nothing written.

    Parameters
    ----------
    ensemble : (model, tokenizer) of each teacher.
    writer : the captioner; None: no synthetic captions, whatever the settings say.
    done : called with the number of passes since the last call: of a pair's views through the teachers, of its
        picture through the captioner.
    """
    device = next(ensemble[0][0].parameters()).device
    # batch_size counts pictures
    loader = DataLoader(_Views(samples, settings), batch_size=max(1, settings.batch_size // settings.n_aug),
                        num_workers=models.decoders(device, workers))
    encoders = [(models.image_encoder(m, settings.precision), models.image_size(m), *_normalisation(m))
                for m, _ in ensemble]
    plain, rows = [], []

    def views():
        for pictures, augmented, parameters in loader:
            plain.append(pictures)
            rows.append(parameters)
            yield augmented

    def embed(augmented: torch.Tensor) -> torch.Tensor:
        flat = augmented.flatten(0, 1).to(device)
        parts = [encode(augment.to_input(flat, *shape)) for encode, *shape in encoders]
        return torch.cat(parts, dim=-1).unflatten(0, augmented.shape[:2]).bfloat16()

    image_emb = []
    for part in models.side_by_side(embed, views(), device):
        image_emb.append(part)
        done(len(part))
    captions = [[] for _ in samples]
    if writer is not None and samples:
        from .captioner import generate

        seed = int.from_bytes(hashlib.sha256(f"{settings.seed}\0{samples[0].key}".encode()).digest()[:4], "big")
        shape = models.image_size(writer), *_normalisation(writer)
        captions = generate(writer, torch.cat(plain), n=settings.n_syn, top_p=settings.caption_top_p, seed=seed,
                            prepare=lambda pictures: augment.to_input(pictures, *shape), done=done)
    texts = [t for sample, syn in zip(samples, captions, strict=True) for t in (sample.caption, *syn)]
    text_emb = models.encode_texts_with_all(ensemble, texts, precision=settings.precision)
    width = sum(t.shape[-1] for t in text_emb) if samples else 0
    p = 4 + 2 * settings.randaugment_ops
    return Shard(
        keys=[s.key for s in samples],
        captions=[s.caption for s in samples],
        syn_text=captions,
        augment=torch.cat(rows).numpy() if rows else np.zeros((0, settings.n_aug, p), np.float32),
        image_emb=torch.cat(image_emb) if samples else torch.zeros(0, settings.n_aug, width, dtype=torch.bfloat16),
        text_emb=(torch.cat(text_emb, dim=-1).view(len(samples), len(texts) // len(samples), -1) if samples
                  else torch.zeros(0, 1 + settings.n_syn, width)).bfloat16(),
    )


def _normalisation(model: torch.nn.Module) -> tuple[tuple, tuple]:
    cfg = model.visual.preprocess_cfg
    return tuple(cfg["mean"]), tuple(cfg["std"])


def _forget_others(out: Path, identity: dict) -> None:
    """Drop shards that other settings, teachers or pairs made; keep those of this very run."""
    meta = out / "meta.json"
    known = json.loads(meta.read_text()) if meta.exists() else {}
    if {k: known.get(k) for k in identity} != json.loads(json.dumps(identity)):
        for file in out.glob("reinforced_*"):
            file.unlink()
    _write_meta(out, {**identity, "complete": False})


def _write_meta(out: Path, meta: dict) -> dict:
    write_json(out / "meta.json", meta)
    return meta
