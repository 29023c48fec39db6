"""The pairs that a run trains on, opened once for the whole run.

A recipe answers two questions: which pairs (`pairs: all | kept`, those that `balance` kept) and
whether captions, crops and ensemble embeddings come from the reinforced set (`reinforced`). The two
combine freely: MobileCLIP trains on every pair of the reinforced set, `combined` on those of it
that are kept, and both share its decoded pictures. Each possible answer is one class here, which
holds all that differs: the folders it reads, its keys and counts, captions, crops, and what its
decoded pictures depend on. No other module asks which it is.

`open_pairs` reads nothing yet, and planning a run needs neither torch nor a stage's tensors: slow
imports and reads are left until they are needed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mclip.data import shards
from mclip.data.shards import in_part
from mclip.data.stores import balance as balance_store
from mclip.data.stores import clusters as cluster_store
from mclip.data.stores import lookup

if TYPE_CHECKING:
    import torch

    from mclip.data.stores.reinforced import Shard


@dataclass(frozen=True)
class TrainingSet:
    """Which pairs, and where their parts are."""

    which: str  # all | kept
    use_reinforced: bool = False
    image_px: int | None = None  # side of the student's input; None: the trainer asks the student
    teacher: str | None = None  # a folder of `embeddings`; None where a recipe needs no teacher
    synthetic: bool = False
    light_scale_min: float = 0.9
    light_views: int = 4
    seed: int = 0  # of the light augmentations
    # of the pairs, the same ones for every recipe and seed; a smaller part lies in a larger one
    fraction: float = 1.0
    pictures_code: str = ""  # digest of the code that decodes and crops; names the decoded pictures
    pairs: str = "data/pairs"
    balance: str = "data/balance"
    clusters: str = "data/clusters"
    embeddings: str = "data/embeddings"
    reinforced: str = "data/reinforced"
    cache: str = "data/cache"


FOLDERS = ("pairs", "balance", "clusters", "embeddings", "reinforced", "cache")  # of a TrainingSet


@dataclass
class Side:
    """All but the pixels, of n samples; row[i] is sample i's row in the pixel cache.

    known : the captions of all pairs that these were picked from, the same for all such sets.
    """

    row: np.ndarray
    keys: list[str]
    captions: list[str]
    known: list[str]
    arrays: "dict[str, torch.Tensor]"
    syn_text: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def n_syn(self) -> int:
        """Synthetic captions a sample; 1 where there are none to draw."""
        return self.arrays["syn_tokens"].shape[1] if "syn_tokens" in self.arrays else 1

    def part(self, chosen: np.ndarray) -> "Side":
        """The chosen samples, (n,) bool; `known` stays."""
        if chosen.all():
            return self
        rows = np.flatnonzero(chosen)
        return Side(
            row=self.row[rows],
            keys=[self.keys[i] for i in rows],
            captions=[self.captions[i] for i in rows],
            known=self.known,
            arrays={name: values[rows] for name, values in self.arrays.items()},
            syn_text=self.syn_text and [self.syn_text[i] for i in rows],
        )


@dataclass(frozen=True)
class LightCrops:
    """CLIP's own augmentation, at least light_scale_min of the area, drawn from the key."""

    spec: TrainingSet

    def __contains__(self, key: str) -> bool:
        return True

    def rows(self, key: str, size: tuple[int, int], n: int | None = None) -> np.ndarray:
        """(n, 4 + 2 ops) float32 rows of `mclip.data.augment` of a picture, the first n of all.

        size : of the picture, pixels.
        """
        from mclip.data import augment  # it imports torchvision

        s = self.spec
        return augment.draw(
            key,
            size,
            s.light_views if n is None else n,
            image_px=s.image_px,
            seed=s.seed,
            scale_min=s.light_scale_min,
            ops=0,
        )


@dataclass(frozen=True)
class StoredCrops:
    """The crops that the reinforced set has of some pairs."""

    stored: dict[str, np.ndarray]

    def __contains__(self, key: str) -> bool:
        return key in self.stored

    def rows(self, key: str, size: tuple[int, int], n: int | None = None) -> np.ndarray:
        """As `LightCrops.rows`."""
        return self.stored[key][:n]


Crops = LightCrops | StoredCrops


class AllPairs:
    """Every pair of the data stage, with its caption, seen in light crops."""

    reads: tuple[str, ...] = ("pairs",)  # fields of the TrainingSet: folders of the result
    pictures = "light"  # of the file of decoded pictures

    def __init__(self, spec: TrainingSet):
        self.spec = spec

    # --- what there is

    @property
    def folders(self) -> dict[str, str]:
        """The folders that a result depends on, by what they are."""
        found = {name: getattr(self.spec, name) for name in self.reads}
        if self.spec.teacher is not None:
            found["clusters"] = self.spec.clusters
            found["embeddings"] = f"{self.spec.embeddings}/{self.spec.teacher}"
        return found

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the shards."""
        return shards.read_manifest(self.spec.pairs)

    @property
    def shard_count(self) -> int:
        """How many shards there are."""
        return len(self.manifest["shards"])

    @property
    def teachers(self) -> list[dict[str, Any]]:
        """The ensemble whose embeddings are stored, as in `reinforced.read_meta`; [] for none."""
        return []

    def count(self) -> int:
        """How many pairs are trained on."""
        if self.spec.fraction < 1:
            return sum(in_part(key, self.spec.fraction) for key in self._keys())
        return self._count()

    def open_tables(self) -> None:
        """Make and map the tables in which shards find their keys: before processes share them."""
        if self.spec.teacher is not None:
            self._labels  # noqa: B018 - cached

    def labels(self, keys: Sequence[str]) -> np.ndarray:
        """(n,) int64: the cluster of each key, -1 where it has none."""
        return self._labels.find(keys)

    @cached_property
    def _labels(self) -> lookup.Lookup:
        return lookup.make(
            self.spec.cache,
            "labels",
            cluster_store.table(self.spec.clusters),
            lambda: cluster_store.labels(self.spec.clusters),
        )

    # --- keys and captions

    def side(self) -> Side:
        """Keys, captions and what is stored beside them, of all pairs that are trained on."""
        return self._chosen(*self._captions())

    def shard_side(self, index: int, samples: Sequence[shards.Sample]) -> tuple[Side, Crops]:
        """`side` and `crops` of one shard, given its samples; it may have no pair."""
        side = self._chosen([s.key for s in samples], [s.caption for s in samples])
        return side, self.crops(index)

    def _chosen(self, keys: list[str], captions: list[str]) -> Side:
        side = Side(np.arange(len(keys)), keys, captions, captions, {})
        return _fraction(side.part(self._trained_on(keys)), self.spec.fraction)

    def _captions(self) -> tuple[list[str], list[str]]:
        from mclip.distill.captions import read_captions  # it imports open_clip

        return read_captions(self.spec.pairs, self.spec.cache, self.manifest)

    def _count(self) -> int:
        return self.manifest["samples"]

    def _keys(self) -> Iterator[str]:
        """Of all pairs of this kind, whatever the fraction."""
        yield from self._captions()[0]

    def _trained_on(self, keys: list[str]) -> np.ndarray:
        """(n,) bool: which keys of the shards are of this kind."""
        return np.ones(len(keys), bool)

    # --- pictures

    @property
    def view_px(self) -> int:
        """The side at which crops are drawn, pixels."""
        return self.spec.image_px  # type: ignore[return-value]

    @property
    def n_views(self) -> int:
        """Crops a picture."""
        return self.spec.light_views

    def crops(self, index: int) -> Crops:
        """The crops of a shard's pictures."""
        return LightCrops(self.spec)

    def pictures_made_of(self) -> list:
        """What the crops of all pictures depend on besides libraries, as JSON."""
        s = self.spec
        return [
            self.manifest,
            s.pictures_code,
            s.image_px,
            s.light_scale_min,
            s.light_views,
            s.seed,
        ]

    def picture_count(self) -> int:
        """How many pairs have crops; more than are trained on where others share them."""
        return self.manifest["samples"]


class KeptPairs(AllPairs):
    """The pairs that `balance` kept; their crops are those of all pairs, so both share them."""

    reads: tuple[str, ...] = ("pairs", "balance")

    def open_tables(self) -> None:
        super().open_tables()
        self._kept  # noqa: B018 - cached

    @cached_property
    def _kept(self) -> lookup.Lookup:
        return balance_store.lookup_kept(self.spec.balance, self.spec.cache)

    def _count(self) -> int:
        return balance_store.count_kept(self.spec.balance)

    def _keys(self) -> Iterator[str]:
        for keys in balance_store.kept(self.spec.balance):
            yield from map(str, keys)

    def _trained_on(self, keys: list[str]) -> np.ndarray:
        return self._kept.find(keys) >= 0


class ReinforcedPairs(AllPairs):
    """Every pair of the reinforced set: stored crops, captions, embeddings."""

    reads: tuple[str, ...] = ("pairs", "reinforced")
    pictures = "reinforced"

    @cached_property
    def _store(self) -> Any:
        from mclip.data.stores import reinforced  # it imports torch

        return reinforced

    @cached_property
    def meta(self) -> dict[str, Any]:
        """meta.json of the reinforced set."""
        return self._store.read_meta(self.spec.reinforced)

    @property
    def teachers(self) -> list[dict[str, Any]]:
        return self.meta["teachers"]

    def side(self) -> Side:
        return self._of(
            [self._store.read_shard(self.spec.reinforced, i) for i in range(self.shard_count)]
        )

    def shard_side(self, index: int, samples: Sequence[shards.Sample]) -> tuple[Side, Crops]:
        stored = self._store.read_shard(self.spec.reinforced, index)
        return self._of([stored]), _stored_crops(stored)

    def _of(self, parts: "list[Shard]") -> Side:
        import torch

        keys = [key for part in parts for key in part.keys]
        captions = [caption for part in parts for caption in part.captions]
        arrays = {
            "ensemble_image": torch.cat([part.image_emb for part in parts]),
            "ensemble_texts": torch.cat([part.text_emb for part in parts]),
        }
        syn_text = [texts for part in parts for texts in part.syn_text]
        side = Side(np.arange(len(keys)), keys, captions, captions, arrays, syn_text)
        return _fraction(side.part(self._trained_on(keys)), self.spec.fraction)

    def _count(self) -> int:
        return self.meta["samples"]

    def _keys(self) -> Iterator[str]:
        for index in range(self.shard_count):
            yield from self._store.read_keys(self.spec.reinforced, index)

    @property
    def view_px(self) -> int:
        return self.meta["settings"]["image_px"]

    @property
    def n_views(self) -> int:
        return self.meta["settings"]["n_aug"]

    def crops(self, index: int) -> Crops:
        return _stored_crops(self._store.read_shard(self.spec.reinforced, index))

    def pictures_made_of(self) -> list:
        s = self.spec
        return [self.manifest, s.pictures_code, s.image_px, self._store.pictures(self.meta)]

    def picture_count(self) -> int:
        return sum(self._store.count(self.spec.reinforced, i) for i in range(self.shard_count))


class KeptReinforcedPairs(ReinforcedPairs, KeptPairs):
    """The pairs of the reinforced set that `balance` kept; they share its decoded pictures."""

    reads = ("pairs", "balance", "reinforced")

    def _count(self) -> int:
        if self.meta["settings"].get("pairs") == "kept":
            return self.meta["samples"]
        return KeptPairs._count(self)

    def _keys(self) -> Iterator[str]:
        keys = list(super()._keys())
        for key, there in zip(keys, self._trained_on(keys), strict=True):
            if there:
                yield key


# (recipe.pairs, recipe.reinforced)
KINDS = {
    ("all", False): AllPairs,
    ("kept", False): KeptPairs,
    ("all", True): ReinforcedPairs,
    ("kept", True): KeptReinforcedPairs,
}


def open_pairs(spec: TrainingSet) -> AllPairs:
    """The pairs of a run; whoever needs them later in the run is handed this."""
    return KINDS[spec.which, spec.use_reinforced](spec)


def _fraction(side: Side, fraction: float) -> Side:
    if fraction == 1:
        return side
    return side.part(np.array([in_part(key, fraction) for key in side.keys], bool))


def _stored_crops(stored: "Shard") -> StoredCrops:
    return StoredCrops(dict(zip(stored.keys, stored.augment, strict=True)))
