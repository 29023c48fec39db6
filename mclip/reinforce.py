"""Reinforce the pairs once; training replays them and never loads a teacher (papers.md 2.1).

Stored for each pair, of all or of those that `balance` kept (`reinforce.pairs`): n_aug strong
augmentations as parameters, n_syn synthetic captions, and the ensemble's embeddings of each
augmented picture and of each caption, the true one first. The captioner writes caption_candidates
captions of a picture, reranked by the teachers: those that the ensemble finds most similar to the
stored views are kept (the paper keeps what CoCa samples). Work proceeds shard by shard: a shard
appears when it is whole, and a rerun with the same settings makes the missing ones, by one process
or by several.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mclip import models
from mclip.data import augment, shards
from mclip.data.stores import balance as balance_store
from mclip.data.stores import reinforced
from mclip.data.stores.reinforced import Shard
from mclip.params import Reinforce
from mclip.system.files import write_json
from mclip.system.progress import bar
from mclip.system.threads import side_by_side
from mclip.system.workers import decoding_processes, is_alone, run_tasks, worker_device


class _Views(Dataset):
    """The picture itself (at image_px) and its augmentations, uint8: ((3, s, s), (n_aug, 3, s, s),
    parameters).
    """

    def __init__(self, samples: Sequence[shards.Sample], settings: Reinforce):
        self.samples, self.settings = samples, settings

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int):
        s, sample = self.settings, self.samples[i]
        image = shards.decode(sample)
        rows = augment.draw(
            sample.key,
            image.size,
            s.n_aug,
            image_px=s.image_px,
            seed=s.seed,
            scale_min=s.scale_min,
            ops=s.randaugment_ops,
            magnitude=s.randaugment_magnitude,
        )
        plain = np.asarray([0, 0, image.height, image.width], dtype=np.float32)
        return (
            torch.from_numpy(augment.replay_all(image, [plain], s.image_px)[0]),
            torch.from_numpy(augment.replay_all(image, rows, s.image_px)),
            torch.from_numpy(rows),
        )


class Makers(NamedTuple):
    """What a shard is made with."""

    ensemble: list[tuple]  # (model, tokenizer) of each teacher
    writer: torch.nn.Module | None

    @classmethod
    def of(cls, teachers: Iterable[str], captioner: str | None, device: str) -> "Makers":
        found = [models.create(name, device=device) for name in teachers]
        return cls(
            [(models.for_inference(model), tokenizer) for model, _, _, tokenizer in found],
            models.for_inference(models.create(captioner, device=device)[0]) if captioner else None,
        )


_makers_once = functools.cache(Makers.of)  # by a worker, for all its shards


class _Job(NamedTuple):
    """What all shards have in common."""

    settings: Reinforce
    teachers: tuple[str, ...]
    captioner: str | None
    pairs: Path
    balance: Path
    fraction: float
    out: Path
    cache: Path
    decoders: int | None

    def make(self, index: int, makers: Makers, done: Callable[[int], object]) -> int:
        """Write a shard; how many pairs it has."""
        samples = list(shards.iter_samples(self.pairs, shards=[index]))
        if self.settings.pairs == "kept":
            kept = balance_store.lookup_kept(self.balance, self.cache)
            there = kept.find([s.key for s in samples]) >= 0
            samples = [s for s, found in zip(samples, there, strict=True) if found]
        samples = [s for s in samples if shards.in_part(s.key, self.fraction)]
        shard = reinforce_samples(
            samples,
            self.settings,
            makers.ensemble,
            makers.writer,
            decoders=self.decoders,
            done=done,
        )
        reinforced.write_shard(self.out, index, shard)
        return len(samples)

    def elsewhere(self, index: int) -> int:
        """A worker's task: `make` with models that it loads itself."""
        makers = _makers_once(self.teachers, self.captioner, worker_device())
        return self.make(index, makers, lambda passes: None)


def result_settings(settings: Reinforce) -> dict[str, Any]:
    """The settings that the result depends on: all but how the work is spread."""
    return settings.model_dump(exclude={"workers", "backend"})


def run(
    settings: Reinforce,
    teachers: dict[str, str],
    captioner: str,
    *,
    pairs: str | Path = "data/pairs",
    balance: str | Path = "data/balance",
    fraction: float = 1.0,
    out: str | Path = "data/reinforced",
    cache: str | Path = "data/cache",
    decoders: int | None = None,
) -> dict:
    """Write the reinforced set: of all pairs, or of those that are kept (settings.pairs).

    Parameters
    ----------
    settings : params.yaml's reinforce section; its workers and backend change nothing of what is
        written.
    teachers : name -> open_clip model string; settings.ensemble picks and orders them.
    captioner : model string of an open_clip CoCa; not loaded when n_syn is 0.
    balance : folder of `mclip.balance`: which pairs are kept; read where settings.pairs is kept.
    fraction : of these pairs, by a hash of the key (`shards.in_part`).
    cache : folder for the table in which shards find their keys.
    decoders : processes that augment; None: see mclip.system.workers.decoding_processes.

    Returns
    -------
    What meta.json holds: teachers with widths, logit scales and slices; settings; samples;
    library versions.

    Raises
    ------
    ValueError when there is no pair; BalanceError where `balance` has none; ModelError for a
    teacher that can't be made.
    """
    manifest = shards.read_manifest(pairs)
    chosen_pairs = _chosen(settings, manifest, pairs, balance, fraction)
    chosen = tuple(teachers[name] for name in settings.ensemble)
    job = _Job(
        settings,
        chosen,
        captioner if settings.n_syn else None,
        Path(pairs),
        Path(balance),
        fraction,
        Path(out),
        Path(cache),
        decoders,
    )
    job.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = is_alone(settings.workers, settings.backend)
    makers = Makers.of(chosen, job.captioner if alone else None, device if alone else "cpu")
    identity = {
        "settings": result_settings(settings),
        "teachers": _described(settings.ensemble, chosen, makers.ensemble),
        "ops": list(augment.OPS),
        "captioner": models.weights_sha256(captioner) if settings.n_syn else None,
        "kept": chosen_pairs.digest,
        "pairs": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest(),
        "versions": {p: version(p) for p in ("torch", "torchvision", "pillow", "open_clip_torch")},
    }
    _forget_others(job.out, identity)
    todo = [i for i in range(len(manifest["shards"])) if not reinforced.paths(out, i)[0].exists()]
    passes = 2 if settings.n_syn else 1
    with bar(desc="reinforce", unit="pass", total=passes * chosen_pairs.pairs) as progress:
        for index in set(range(len(manifest["shards"]))).difference(todo):
            progress.update(passes * reinforced.count(out, index))
        if alone:
            for index in todo:
                job.make(index, makers, progress.update)
        else:
            tasks = [(index,) for index in todo]
            for count in run_tasks(
                job.elsewhere,
                tasks,
                workers=settings.workers,
                backend=settings.backend,
                gpu=device == "cuda",
            ):
                progress.update(passes * count)
    total = sum(reinforced.count(out, index) for index in range(len(manifest["shards"])))
    if not total:
        why = "kept; is balance.threshold too large?" if settings.pairs == "kept" else "there"
        raise ValueError(f"reinforce: no pair is {why}")
    return _write_meta(job.out, {**identity, "samples": total, "complete": True})


class _Chosen(NamedTuple):
    digest: str
    pairs: int


def _chosen(
    settings: Reinforce,
    manifest: dict[str, Any],
    pairs: str | Path,
    balance: str | Path,
    fraction: float,
) -> _Chosen:
    """Which pairs are reinforced, as a digest, and how many; no more than a piece of their keys is
    held.
    """
    if settings.pairs == "all" and fraction == 1:
        return _Chosen("all", manifest["samples"])  # the manifest says which; no shard is read
    pieces: Iterable[Iterable[str]]
    if settings.pairs == "all":
        pieces = ([sample.key] for sample in shards.iter_samples(pairs))
    else:
        pieces = (map(str, piece.tolist()) for piece in balance_store.kept(balance))
    found, count = hashlib.sha256(), 0
    for piece in pieces:
        keys = [key for key in piece if shards.in_part(key, fraction)]
        found.update("".join(f"{key}\n" for key in keys).encode())
        count += len(keys)
    return _Chosen(found.hexdigest(), count)


def _described(
    names: Sequence[str], strings: Sequence[str], ensemble: Sequence[tuple]
) -> list[dict[str, Any]]:
    """meta.json's teachers: width, logit scale, weights, and which columns are theirs."""
    described, start = [], 0
    for name, string, (model, tokenizer) in zip(names, strings, ensemble, strict=True):
        width = _width(model, tokenizer)
        described.append(
            {
                "name": name,
                "model": string,
                "width": width,
                "logit_scale": models.logit_scale(model),
                "slice": [start, start + width],
                "sha256": models.weights_sha256(string),
            }
        )
        start += width
    return described


def _width(model: torch.nn.Module, tokenizer: Any) -> int:
    """Of a teacher's embeddings; no attribute tells it for every kind of tower."""
    return models.encode_texts(model, tokenizer, ["a"]).shape[1]


def reinforce_samples(
    samples: Sequence[shards.Sample],
    settings: Reinforce,
    ensemble: Sequence[tuple],
    writer=None,
    *,
    decoders: int | None = None,
    done: Callable[[int], object] = lambda n: None,
) -> Shard:
    """Augmentations, captions and embeddings of some pairs, nothing written.

    Parameters
    ----------
    ensemble : (model, tokenizer) of each teacher.
    writer : the captioner; None: no synthetic captions, whatever the settings say.
    done : called with the number of passes since the last call: of a pair's views through the
        teachers, of its picture through the captioner.
    """
    if not samples:
        return _nothing(settings, ensemble)
    device = next(ensemble[0][0].parameters()).device
    # batch_size counts pictures
    loader = DataLoader(
        _Views(samples, settings),
        batch_size=max(1, settings.batch_size // settings.n_aug),
        num_workers=decoding_processes(device, decoders),
    )
    encoders: list[tuple] = [
        (models.image_encoder(m, settings.precision), models.image_size(m), *_normalisation(m))
        for m, _ in ensemble
    ]
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
    for part in side_by_side(embed, views(), device):
        image_emb.append(part)
        done(len(part))
    pictures = torch.cat(image_emb)
    true = [s.caption for s in samples]
    candidates: list[list[str]] = [[] for _ in samples]
    if writer is not None and settings.n_syn:
        candidates = _candidates(writer, torch.cat(plain), settings, samples[0].key, done)
    texts = [text for pair in zip(true, candidates, strict=True) for text in (pair[0], *pair[1])]
    encoded = torch.cat(
        models.encode_texts_with_all(ensemble, texts, precision=settings.precision), dim=-1
    ).unflatten(0, (len(samples), -1))
    count = settings.n_syn if candidates[0] else 0
    chosen = best_captions(candidates, pictures.float().mean(1), encoded[:, 1:], count)
    columns = torch.tensor([[0, *(1 + i for i in row)] for row in chosen])
    text_emb = encoded.gather(1, columns[:, :, None].expand(-1, -1, encoded.shape[-1]))
    return Shard(
        keys=[s.key for s in samples],
        captions=true,
        syn_text=[
            [written[i] for i in row] for written, row in zip(candidates, chosen, strict=True)
        ],
        augment=torch.cat(rows).numpy(),
        image_emb=pictures,
        text_emb=text_emb.bfloat16(),
    )


def _candidates(
    writer: torch.nn.Module,
    pictures: torch.Tensor,
    settings: Reinforce,
    key: str,
    done: Callable[[int], object],
) -> list[list[str]]:
    """What the captioner writes of a shard's pictures; seeded by the shard's first key."""
    from mclip.teachers.captioner import generate

    seed = int.from_bytes(hashlib.sha256(f"{settings.seed}\0{key}".encode()).digest()[:4], "big")
    shape = models.image_size(writer), *_normalisation(writer)
    return generate(
        writer,
        pictures,
        n=max(settings.n_syn, settings.caption_candidates),
        top_p=settings.caption_top_p,
        seed=seed,
        precision=settings.precision,
        prepare=lambda pictures: augment.to_input(pictures, *shape),
        done=done,
    )


def best_captions(
    candidates: Sequence[Sequence[str]], pictures: torch.Tensor, texts: torch.Tensor, n: int
) -> list[list[int]]:
    """Rerank captions by the teachers: the distinct ones that are most similar to their picture.

    Parameters
    ----------
    candidates : sequence of b sequences of k str
        What the captioner wrote of each picture.
    pictures : Tensor, shape (b, d)
        Of each picture the mean of its stored embeddings, all teachers side by side.
    texts : Tensor, shape (b, k, d)
        The teachers' embeddings of the candidates.
    n : int
        Captions to choose per picture, at most k.

    Returns
    -------
    list of b lists of n int
        Columns of `candidates`, best first. Where fewer than n are distinct, they repeat.

    Examples
    --------
    >>> texts = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    >>> best_captions([["a dog", "a cat", "a dog"]], torch.tensor([[0.9, 0.4]]), texts, 2)
    [[1, 0]]
    """
    ranked = torch.einsum("bd,bkd->bk", pictures, texts).argsort(
        dim=1, descending=True, stable=True
    )
    chosen = []
    for written, order in zip(candidates, ranked.tolist(), strict=True):
        first: dict[str, int] = {}
        for i in order:
            first.setdefault(written[i], i)
        distinct = list(first.values())
        chosen.append([distinct[j % len(distinct)] for j in range(n)])
    return chosen


def _nothing(settings: Reinforce, ensemble: Sequence[tuple]) -> Shard:
    """A shard of which no pair is kept, as wide as the others."""
    width = sum(_width(*teacher) for teacher in ensemble)
    parameters = 4 + 2 * settings.randaugment_ops
    return Shard(
        [],
        [],
        [],
        np.zeros((0, settings.n_aug, parameters), np.float32),
        torch.zeros(0, settings.n_aug, width, dtype=torch.bfloat16),
        torch.zeros(0, 1 + settings.n_syn, width, dtype=torch.bfloat16),
    )


def _normalisation(model: torch.nn.Module) -> tuple[tuple, tuple]:
    cfg: Any = model.get_submodule("visual").preprocess_cfg
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
