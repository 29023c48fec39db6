"""The captions of a set of pairs and their tokens, each read and tokenised once for all runs.

Without a GPU there are many short runs: reading 12,000 captions from their tars and tokenising
14,000 in Python would take a quarter of a study's training. Both are kept below `cache`, under a
digest of everything they are made from.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch

from mclip.data import shards
from mclip.system.files import made_once

Tokenizer = Callable[[list[str]], torch.Tensor]
AT_ONCE = 4096  # texts a call of the tokenizer


def caption_id(caption: str) -> int:
    """A 63-bit id that equal captions share."""
    return int.from_bytes(hashlib.sha1(caption.encode()).digest()[:8], "big") >> 1


def read_captions(
    pairs: str, cache: str | Path, manifest: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Keys and captions of all pairs, in the manifest's order."""

    def build(draft: Path) -> None:
        rows = [(s.key, s.caption) for s in shards.iter_samples(pairs)]
        pd.DataFrame(rows, columns=["key", "caption"], dtype=str).to_parquet(draft, index=False)

    table = pd.read_parquet(made_once(cache, "captions", ".parquet", manifest, build))
    return table["key"].tolist(), table["caption"].tolist()


def tokenise(texts: list[str], tokenizer: Tokenizer, cache: str | Path | None) -> torch.Tensor:
    """(n, context) int32. Kept only of CLIP's own tokenizer: the others are fast, and their files
    are many.
    """
    identity = _identity(tokenizer)
    if cache is None or identity is None:
        return _tokenised(texts, tokenizer)

    def build(draft: Path) -> None:
        with open(draft, "wb") as file:  # numpy would add a suffix to a path
            np.save(file, _tokenised(texts, tokenizer).numpy(), allow_pickle=False)

    return torch.from_numpy(
        np.load(made_once(cache, "tokens", ".npy", [identity, texts], build), allow_pickle=False)
    )


def _tokenised(texts: list[str], tokenizer: Tokenizer) -> torch.Tensor:
    return torch.cat([tokenizer(texts[i : i + AT_ONCE]) for i in range(0, len(texts), AT_ONCE)]).to(
        torch.int32
    )


def _identity(tokenizer: Any) -> list | None:
    """What the output of CLIP's tokenizer depends on."""
    if type(tokenizer) is not open_clip.SimpleTokenizer or tokenizer.reduction_fn is not None:
        return None
    words = hashlib.sha256(json.dumps(tokenizer.encoder).encode()).hexdigest()
    return [open_clip.__version__, tokenizer.context_length, tokenizer.clean_fn.__name__, words]
