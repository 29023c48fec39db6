"""How good synthetic captions are: real words, the right class, near the picture.

found = describe(settings, teachers, captioner, "cifar10", sets["cifar10"])
goals([found], words(true_captions))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from PIL.Image import Image

    from mclip.data.stores.reinforced import Shard
    from mclip.params import EvalSet, Reinforce

WORD = re.compile(r"[\w'’-]+")


class Described(NamedTuple):
    """Pictures of a set with their synthetic captions, reranked as those of the pairs are."""

    name: str
    pictures: list[Image]
    true: list[str]  # of a classification set the class, in the first template
    synthetic: list[str]  # the best of each picture
    similarity: np.ndarray  # (n, 2), of picture and true, synthetic caption: mean over the teachers
    named: np.ndarray | None  # (n,) does the caption name the right class, and no other?
    zero_shot: np.ndarray | None  # (n,) is the ensemble's own class right?


def words(captions: Iterable[str]) -> set[str]:
    """The distinct words of captions, in lower case.

    Examples
    --------
    >>> sorted(words(["A photo of the cat.", "woman's sandal"]))
    ['a', 'cat', 'of', 'photo', 'sandal', 'the', "woman's"]
    """
    return {word for caption in captions for word in WORD.findall(caption.lower())}


def known_words(captions: Iterable[str], vocabulary: set[str]) -> float:
    """The share of the captions' words, counted as often as they occur, that are in a vocabulary.

    Examples
    --------
    >>> known_words(["a photo of fple"], {"a", "photo", "of"})
    0.75
    """
    found = [word in vocabulary for caption in captions for word in WORD.findall(caption.lower())]
    return float(np.mean(found)) if found else float("nan")


def names_class(caption: str, classes: Sequence[str], right: int) -> bool:
    """Does a caption name the right class, and none of the others?

    Examples
    --------
    >>> names_class("a photo of a cat.", ["cat", "dog"], 0)
    True
    >>> names_class("a photo of a cattle dog.", ["cat", "dog"], 0)
    False
    """
    text = f" {' '.join(WORD.findall(caption.lower()))} "
    named = [
        i for i, name in enumerate(classes) if f" {' '.join(WORD.findall(name.lower()))} " in text
    ]
    return named == [right]


def similarities(shard: Shard, teachers: int) -> np.ndarray:
    """Of each picture and its captions, the true one first: cosine, mean over the teachers.

    Parameters
    ----------
    shard : mclip.data.stores.reinforced.Shard
        Of n pairs with t - 1 synthetic captions; a picture is the mean of its stored views.
    teachers : int
        How many teachers' embeddings lie side by side.

    Returns
    -------
    np.ndarray, shape (n, t)
    """
    views, texts = shard.image_emb.float(), shard.text_emb.float()
    return (views.mean(1)[:, None] * texts).sum(-1).numpy() / teachers


def describe(
    settings: Reinforce,
    teachers: Mapping[str, str],
    captioner: str,
    name: str,
    spec: EvalSet,
    *,
    pictures: int = 500,
) -> Described:
    """Caption pictures of an evaluation set, as `mclip.reinforce` captions those of the pairs.

    Parameters
    ----------
    settings : params.Reinforce
        The section `reinforce`; instead of its augmentations each picture has one view, the whole.
    teachers : mapping of str to str
        Name -> model string.
    captioner : str
        Its model string.
    name, spec : str, params.EvalSet
        Of a set of `evaluate.sets`: classification or retrieval.
    pictures : int, default 500
        At most so many, evenly spread over the set.

    Returns
    -------
    Described
    """
    import torch

    from mclip import evaluate, models, reinforce
    from mclip.data import evalsets, shards
    from mclip.evaluate import tasks

    split = evalsets.read_split(spec.path, tasks.get(spec.task).ANSWER)
    chosen = np.unique(np.linspace(0, len(split.keys) - 1, pictures).astype(int)).tolist()
    labels = [split.answers[i] for i in chosen]
    is_classes = spec.task == "classification"
    if is_classes:
        prompts = evaluate.prompts(split)
        step = len(prompts) // len(split.classes)
        true = [prompts[label * step] for label in labels]
    else:
        true = [answer[0] for answer in labels]
    samples = [
        shards.Sample(split.keys[i], evalsets.read_bytes(split.places[i]), "png", caption, {})
        for i, caption in zip(chosen, true, strict=True)
    ]
    whole = {"n_aug": 1, "n_syn": 1, "scale_min": 1.0, "randaugment_ops": 0}
    settings = settings.model_copy(update=whole)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    makers = reinforce.Makers.of(
        [teachers[teacher] for teacher in settings.ensemble], captioner, device
    )
    shard = reinforce.reinforce_samples(samples, settings, makers.ensemble, makers.writer)
    synthetic = [row[0] for row in shard.syn_text]
    named = zero_shot = None
    if is_classes:
        texts = models.encode_texts_with_all(makers.ensemble, prompts, precision=settings.precision)
        classes = torch.cat(
            [evaluate.class_features(rows, len(split.classes)) for rows in texts], dim=1
        )
        best = (shard.image_emb[:, 0].float() @ classes.T).argmax(1)
        zero_shot = best.numpy() == np.array(labels)
        named = np.array(
            [
                names_class(caption, split.classes, label)
                for caption, label in zip(synthetic, labels, strict=True)
            ]
        )
    return Described(
        name,
        [shards.decode(sample) for sample in samples],
        true,
        synthetic,
        similarities(shard, len(settings.ensemble)),
        named,
        zero_shot,
    )


def goals(described: Sequence[Described], vocabulary: set[str]) -> pd.DataFrame:
    """What the captions are measured by, a row per set, in percent and as cosines.

    Parameters
    ----------
    described : sequence of Described
    vocabulary : set of str
        The words of the captions that the captioner learned from.
    """
    return pd.DataFrame(
        {
            d.name: {
                "known words, %": 100 * known_words(d.synthetic, vocabulary),
                "names the class, %": np.nan if d.named is None else 100 * d.named.mean(),
                "teachers zero-shot, %": (
                    np.nan if d.zero_shot is None else 100 * d.zero_shot.mean()
                ),
                "similarity, true": d.similarity[:, 0].mean(),
                "similarity, synthetic": d.similarity[:, 1].mean(),
            }
            for d in described
        }
    ).T
