"""A folder of pairs as a table, and single pictures of it, for the data notebook.

Web sets are too large to hold: `table` reads whole shards, evenly spread over the set, up to a
limit, and keeps no image; `pictures` and `described` read the shards again for the few that are
shown.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from mclip.data import shards


def table(folder: str | Path, limit: int = 50_000) -> pd.DataFrame:
    """One row a pair: key, shard, caption, words, part, concept, variant, alt, copy_of; about
    `limit` rows at most.

    `part` is the metadata's style ("all pairs" without one), `concept` its concept (without one the
    caption), `alt` its sort of alt text ("caption" without one), `copy_of` the key of the picture
    that this one shows at another size.
    """
    listed = shards.read_manifest(folder)["shards"]
    full = [i for i, shard in enumerate(listed) if shard["samples"]]
    mean = sum(shard["samples"] for shard in listed) / max(1, len(full))
    count = min(len(full), max(1, int(limit // max(1.0, mean))))
    chosen = [full[i] for i in np.linspace(0, len(full) - 1, count).round().astype(int)]
    rows = []
    for number in chosen:
        rows += [_row(s, number) for s in shards.iter_samples(folder, shards=[number])]
    return pd.DataFrame(rows)


def described(folder: str | Path, keys: Iterable[str], numbers: Iterable[int]) -> pd.DataFrame:
    """The rows of `table` of these pairs, in their order; of each key its shard's number is asked
    for.
    """
    wanted = pd.DataFrame({"key": keys, "shard": numbers})
    rows: dict[str, dict] = {}
    for number, part in wanted.groupby("shard"):
        own = set(part["key"])
        rows |= {
            s.key: _row(s, number)
            for s in shards.iter_samples(folder, shards=[number])
            if s.key in own
        }
    return pd.DataFrame([rows[key] for key in wanted["key"]])


def _row(s: shards.Sample, number: int) -> dict:
    return {
        "key": s.key,
        "shard": number,
        "caption": s.caption,
        "words": len(s.caption.split()),
        "part": str(s.meta.get("style") or "all pairs"),
        "concept": str(s.meta.get("concept") or s.caption),
        "variant": str(s.meta.get("variant") or ""),
        "alt": str(s.meta.get("alt") or "caption"),
        "copy_of": str(s.meta.get("copy_of") or ""),
    }


def pictures(folder: str | Path, rows: pd.DataFrame) -> list[Image.Image]:
    """The images of some rows of `table`, in their order."""
    found = {}
    for number, part in rows.groupby("shard"):
        keys = set(part["key"])
        for s in shards.iter_samples(folder, shards=[number]):
            if s.key in keys:
                found[s.key] = shards.decode(s)
    return [found[key] for key in rows["key"]]


def spread(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """`count` rows, evenly spread over all of them."""
    return rows.iloc[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]
