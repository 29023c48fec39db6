"""Write the pairs that were kept as tars, which open_clip's trainer and img2dataset's readers take.

manifest = write_kept(shards.iter_samples("data/pairs"), result, "out/pairs")
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from mclip.data.shards import Sample, ShardError, write_shards
from mclip.data.stores.balance import Balance
from mclip.system.files import write_json

NAMES = ("uid", "key")  # of a sample's .json, where the embeddings name it by something else


def write_kept(
    samples: Iterable[Sample], result: Balance, folder: str | Path, *, shard_size: int = 10_000
) -> dict:
    """Write the kept pairs as shards, a manifest, and the sizes that open_clip's trainer reads.

    Parameters
    ----------
    samples : iterable of Sample
        All pairs, such as `mclip.data.shards.iter_samples` yields. A pair is known by its key or,
        where `result` has another name for it, by `uid` or `key` of its .json.
    result : Balance
        What `mclip.balance.balance` returned.
    folder : path
        Is replaced: pairs-000000.tar, ..., manifest.json, sizes.json.
    shard_size : int, default 10_000
        Pairs a shard.

    Returns
    -------
    dict
        The manifest; its key "missing" counts the kept images that no sample is of.

    Raises
    ------
    ShardError
        If no kept image is among the samples.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from mclip.balance import balance, kept
    >>> from mclip.data.shards import Sample
    >>> result = balance(np.array([[1.0, 0.0], [1.0, 0.0]]), ["a", "b"], threshold=0.1, metric="l2")
    >>> samples = [Sample(key, b"a picture", "png", "a caption", {}) for key in "ab"]
    >>> kept.write_kept(samples, result, tempfile.mkdtemp() + "/pairs")["samples"]
    1
    """
    kept = {str(key) for key in result.keys[result.keep].tolist()}
    wanted = len(kept)

    def chosen() -> Iterator[Sample]:
        for sample in samples:
            names = [sample.key, *(str(sample.meta.get(name, "")) for name in NAMES)]
            name = next((name for name in names if name in kept), None)
            if name is not None:
                kept.discard(name)  # a pair once
                yield sample
        if len(kept) == wanted:
            raise ShardError(
                f"none of the {wanted:,} kept images is in these shards: is it their embeddings? "
                f"(one of them is called {min(kept)})"
            )

    manifest = write_shards(chosen(), folder, shard_size=shard_size)
    sizes = {shard["file"]: shard["samples"] for shard in manifest["shards"]}
    write_json(Path(folder) / "sizes.json", sizes)
    return manifest | {"missing": len(kept)}
