"""Captions: clean English, and the alt text that a web page would have in its place.

    texts = of_emoji("noto-1f44b", variant, "noto", "1f44b", seed=0)   # {sort: text}
    sort, text = drawn("noto-1f44b", texts, {"name": 0.5, "file": 0.5}, seed=0)

A pair's key and the seed decide each choice, so that no order or machine changes one.
"""

import hashlib
from collections.abc import Mapping

from mclip.data.demo.emoji import Variant

NAME = "name"  # the sort that every picture has: clean English
# how a caption may speak of a style; OpenMoji, never trained on, has none
STYLE_PHRASES = {
    "noto": "a glossy emoji of {c}",
    "twemoji": "a flat icon of {c}",
    "fluent": "a 3d render of {c}",
}
CIFAR_CLASSES = {  # class: the emoji whose CLDR keywords it borrows
    "airplane": "\N{AIRPLANE}",
    "automobile": "\N{AUTOMOBILE}",
    "bird": "\N{BIRD}",
    "cat": "\N{CAT}",
    "deer": "\N{DEER}",
    "dog": "\N{DOG}",
    "frog": "\N{FROG FACE}",
    "horse": "\N{HORSE}",
    "ship": "\N{SHIP}",
    "truck": "\N{DELIVERY TRUCK}",
}
CIFAR_TEMPLATES = [  # CLIP's own for CIFAR-10
    f"a {look}photo of {article} {size}{{c}}."
    for article in ("a", "the")
    for look, size in [
        ("", ""),
        ("blurry ", ""),
        ("black and white ", ""),
        ("low contrast ", ""),
        ("high contrast ", ""),
        ("bad ", ""),
        ("good ", ""),
        ("", "small "),
        ("", "big "),
    ]
]


def drawn(
    key: str, texts: Mapping[str, str], shares: Mapping[str, float], seed: int
) -> tuple[str, str]:
    """(sort, text): one of a picture's texts by the sorts' shares.

    The share of a sort that the picture lacks goes to the others, in proportion.

    Examples
    --------
    >>> drawn("a", {"name": "a cat", "file": "1f408"}, {"name": 0, "unicode": 1, "file": 1}, seed=0)
    ('file', '1f408')
    """
    there = [sort for sort in shares if sort in texts and shares[sort] > 0]
    point = fraction(seed, key, "sort") * sum(shares[sort] for sort in there)
    for sort in there:
        point -= shares[sort]
        if point < 0:
            return sort, texts[sort]
    sort = there[-1] if there else NAME
    return sort, texts[sort]


def of_emoji(key: str, variant: Variant, style: str, file: str, seed: int) -> dict[str, str]:
    """{sort: text} of an emoji; `file` is the stem of its file in the package."""
    choice = digest(seed, key, "alt")
    texts = {
        NAME: clean_emoji(key, variant, style, seed),
        "unicode": variant.unicode,
        "shortcode": f":{variant.shortcode}:" if choice[0] % 2 else variant.shortcode,
        "file": file,
    }
    if words := _shuffled(seed, key, [k for k in variant.keywords if k != variant.name]):
        texts["keywords"] = ", ".join(words[: 2 + choice[1] % 4])
    return texts


def of_photo(
    key: str, name: str, file: str, annotations: Mapping[str, Mapping[str, list[str]]], seed: int
) -> dict[str, str]:
    """{sort: text} of a CIFAR-10 picture of class `name`; annotations: CLDR's, by emoji."""
    words = annotations[CIFAR_CLASSES[name]]["default"]
    words = _shuffled(seed, key, [k.lower() for k in words if k.lower() != name])
    count = digest(seed, key, "alt")[0] % 4
    return {
        NAME: clean_photo(key, name, seed),
        "keywords": ", ".join([name, *words[:count]]),
        "file": file,
    }


def clean_emoji(key: str, variant: Variant, style: str, seed: int) -> str:
    """One of several ways to say what the picture shows."""
    choice = digest(seed, key)
    # keywords that say more than the name already does
    words = _shuffled(seed, key, [k for k in variant.keywords if k not in variant.name])
    forms = [
        variant.name,
        variant.name,
        f"an emoji of {variant.name}",
        STYLE_PHRASES[style].format(c=variant.name),
        ", ".join([variant.name, *words[:1]]),
        ", ".join([variant.name, *words[:2]]),
    ]
    return forms[choice[0] % len(forms)]


def clean_photo(key: str, name: str, seed: int) -> str:
    """One of CLIP's templates for CIFAR-10."""
    return CIFAR_TEMPLATES[digest(seed, key)[0] % len(CIFAR_TEMPLATES)].format(c=name)


def _shuffled(seed: int, key: str, words: list[str]) -> list[str]:
    return sorted(words, key=lambda k: digest(seed, key, k))


def fraction(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts only."""
    return int.from_bytes(digest(*parts)[:6], "big") / 2**48


def digest(*parts: object) -> bytes:
    """Eight bytes that depend on the parts only."""
    return hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
