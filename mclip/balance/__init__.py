"""Image semantic balance (CLIP-CID, arXiv 2408.09441): drop images that repeat another.

    from mclip.balance import balance
    result = balance(embeddings, keys, threshold=0.07, metric="sql2")

    mclip balance EMBEDDINGS OUT --threshold 0.07 --metric sql2

What a set is and how it is found: `mclip.balance.sets`.
"""

from mclip.balance.sets import balance, removed_curve, representative_distance, spanning_forest
from mclip.data.stores.balance import METRICS, Balance, BalanceError, convert, read, write

__all__ = [
    "METRICS",
    "Balance",
    "BalanceError",
    "balance",
    "convert",
    "read",
    "removed_curve",
    "representative_distance",
    "spanning_forest",
    "write",
]
