"""Image semantic balance (CLIP-CID, arXiv 2408.09441): drop images that repeat another.

    from mclip.balance import balance
    result = balance(embeddings, keys, threshold=0.07, metric="sql2")

    mclip balance EMBEDDINGS OUT --threshold 0.07 --metric sql2      # or --remove 0.4

What a set is and how it is found: `mclip.balance.sets`.
"""

from mclip.balance.sets import (
    balance,
    check_kept,
    removed_curve,
    representative_distance,
    spanning_forest,
    threshold_that_removes,
)
from mclip.data.stores.balance import METRICS, Balance, BalanceError, convert, read, write

__all__ = [
    "METRICS",
    "Balance",
    "BalanceError",
    "balance",
    "check_kept",
    "convert",
    "read",
    "removed_curve",
    "representative_distance",
    "spanning_forest",
    "threshold_that_removes",
    "write",
]
