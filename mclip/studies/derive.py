"""Data of an ablation's variant: other kept pairs, other clusters, a part of the reinforced set.

Each is a folder under `cache`, in the format of the stage that writes the default one and named by
what it was made from: existing data are not made again, and other inputs or other code give another
name.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mclip import balance, cluster
from mclip.balance import prune
from mclip.data import shards
from mclip.data.shards import in_part
from mclip.data.stores import embeddings as embedding_store
from mclip.data.stores import reinforced
from mclip.data.stores.contents import fingerprint
from mclip.distill import terms
from mclip.params import Balance, Cluster, KeptPairs, Recipe, Selection, Variant
from mclip.system.files import digest, whole_folder
from mclip.system.source import code_digest

FOLDERS = {
    name: f"data/{name}" for name in ("pairs", "balance", "clusters", "embeddings", "reinforced")
}
WHOLE = Selection(
    n_aug=None, n_syn=None, ensemble=None, captions="true"
)  # of the stored reinforced set


def folders(
    variant: Variant,
    recipe: Recipe,
    kept: Balance,
    clusters: Cluster,
    *,
    cache: str | Path,
    data: dict[str, str] | None = None,
) -> tuple[dict[str, str], str | None]:
    """Where a variant's data lies and which teacher it has: overrides of TrainingSet, made where
    they aren't there.

    Parameters
    ----------
    recipe : the variant's own, with its changes.
    kept, clusters : the settings of the stages balance and cluster.
    data : folders of the default data; None: the stages'.
    """
    own, cache = FOLDERS | (data or {}), Path(cache)
    teacher = variant.teacher or clusters.teacher
    if variant.keep:
        own["balance"] = str(_kept(variant.keep, kept, clusters, own, cache))
    if "teacher" in terms.needs(recipe.weight) and (
        variant.keep or variant.clusters or variant.teacher
    ):
        k = variant.clusters or clusters.clusters
        own["clusters"] = str(
            _clusters(clusters.model_copy(update={"teacher": teacher, "clusters": k}), own, cache)
        )
    if variant.reinforced:
        own["reinforced"] = str(selected(variant.reinforced, own, cache))
    return own, teacher


def part(
    fraction: float,
    recipe: Recipe,
    clusters: Cluster,
    *,
    cache: str | Path,
    data: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Overrides of TrainingSet that cut every kind of pairs to a fraction of them, clusters
    included: as many pairs a cluster as in the whole, found without the others. Parameters as of
    `folders`.
    """
    own: dict[str, Any] = FOLDERS | (data or {})
    if fraction < 1:
        own["fraction"] = fraction
        if "teacher" in terms.needs(recipe.weight):
            fewer = clusters.model_copy(
                update={"clusters": max(1, round(fraction * clusters.clusters))}
            )
            own["clusters"] = str(_clusters(fewer, own, Path(cache), fraction))
    return own


def _kept(
    wanted: KeptPairs, settings: Balance, clusters: Cluster, data: dict[str, str], cache: Path
) -> Path:
    """A balance folder: by another threshold, or as many pairs as the default keeps by another
    method.
    """
    embeddings = Path(data["embeddings"]) / settings.teacher
    made_of: list[Any] = [wanted.model_dump(), settings.metric, fingerprint(embeddings)]
    if wanted.prune:
        made_of += [
            fingerprint(data["balance"]),
            clusters.clusters,
            clusters.iterations,
            clusters.seed,
        ]
    folder = _named(cache, "balance", made_of)
    if folder.exists():
        return folder
    table = embedding_store.index(embeddings)
    if wanted.threshold is not None:
        found = balance.balance(
            table.image,
            table.keys,
            threshold=wanted.threshold,
            metric=settings.metric,
            workers=settings.workers,
            backend=settings.backend,
            scratch=cache,
        )
    else:
        n, count = len(table.keys), int(balance.read(data["balance"]).keep.sum())
        k_means: dict[str, Any] = {
            "clusters": clusters.clusters,
            "iterations": clusters.iterations,
            "seed": clusters.seed,
        }
        method: Any = wanted.prune
        keep = {
            "semdedup": lambda: prune.semdedup(table.image, count, **k_means),
            "density": lambda: prune.density(table.image, count, **k_means),
            "random": lambda: prune.random(n, count, seed=clusters.seed),
        }[method]()
        # no sets, nor a threshold of ours: every pair is one of its own
        found = balance.Balance(np.arange(n), keep, np.zeros(n), table.keys, 0.0, method)
    with whole_folder(folder) as draft:
        balance.write(draft, found)
    return folder


def _clusters(settings: Cluster, data: dict[str, str], cache: Path, fraction: float = 1.0) -> Path:
    """A clusters folder of the kept pairs, or of a fraction of them, by the settings' teacher and
    number.
    """
    embeddings = Path(data["embeddings"]) / settings.teacher
    made_of = [
        settings.clusters,
        settings.iterations,
        settings.points_per_centre,
        settings.seed,
        fingerprint(embeddings),
        fingerprint(data["balance"]),
        fraction,
    ]
    folder = _named(cache, "clusters", made_of)
    if folder.exists():
        return folder
    table, balanced = embedding_store.index(embeddings), balance.read(data["balance"])
    kept = np.isin(table.keys, balanced.keys[balanced.keep].astype(str))
    if fraction < 1:
        kept &= [in_part(key, fraction) for key in table.keys]
    found = cluster.cluster(
        table.image,
        settings.clusters,
        iterations=settings.iterations,
        seed=settings.seed,
        keys=table.keys,
        chosen=kept,
        points=settings.points_per_centre,
    )
    with whole_folder(folder) as draft:
        cluster.write(draft, found)
    return folder


def selected(wanted: Selection, data: dict[str, str], cache: Path) -> Path:
    """A part of the reinforced set of `data`; without augmentations, with the embeddings of the
    plain pictures. The set itself where all of it is wanted.
    """
    if wanted == WHOLE:
        return Path(data["reinforced"])
    made_of = [wanted.model_dump(), fingerprint(data["reinforced"])]
    if wanted.n_aug == 0:
        names = wanted.ensemble or [
            t["name"] for t in reinforced.read_meta(data["reinforced"])["teachers"]
        ]
        made_of += [fingerprint(Path(data["embeddings"]) / name) for name in names]
    folder = _named(cache, "reinforced", made_of)
    if not folder.exists():
        plain = _plain_pictures(data) if wanted.n_aug == 0 else None
        with whole_folder(folder) as draft:
            reinforced.select(data["reinforced"], draft, plain=plain, **wanted.model_dump())
    return folder


def _plain_pictures(data: dict[str, str]) -> reinforced.Plain:
    sizes = {
        sample.key: shards.decode(sample).size for sample in shards.iter_samples(data["pairs"])
    }
    tables: dict[str, tuple[dict[str, int], np.ndarray]] = {}

    def plain(keys: list[str], names: list[str]) -> tuple[np.ndarray, torch.Tensor]:
        for name in [name for name in names if name not in tables]:
            table = embedding_store.load(Path(data["embeddings"]) / name)
            tables[name] = {key: i for i, key in enumerate(table.keys)}, table.image
        crops = np.array(
            [(0, 0, sizes[key][1], sizes[key][0]) for key in keys], np.float32
        ).reshape(-1, 4)
        parts = [
            torch.from_numpy(np.asarray(image[[row[key] for key in keys]], np.float32))
            for row, image in (tables[name] for name in names)
        ]
        return crops, torch.cat(parts, dim=1)

    return plain


def _named(cache: Path, kind: str, made_of: list) -> Path:
    return cache / "data" / f"{kind}-{digest([made_of, code_digest(__name__)])}"
