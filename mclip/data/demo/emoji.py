"""Emoji as concepts: which exist, which are held out, and how a picture of one is captioned.

A base concept is an entry of emoji.json ("waving hand"); its skin-tone variants belong to it. Names
and keywords are the English ones of CLDR, in lower case plain text.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
# how a caption may speak of a style; OpenMoji, never trained on, has none
STYLE_PHRASES = {
    "noto": "a glossy emoji of {c}",
    "twemoji": "a flat icon of {c}",
    "fluent": "a 3d render of {c}",
}
# for zero-shot classification; {c} is CLIP_benchmark's placeholder
TEMPLATES = ["{c}", "an emoji of {c}"]


class Variant(NamedTuple):
    """One emoji: `code` is its code points, "1f44b-1f3fb" (no fe0f); `tone` its skin tone or ""."""

    code: str
    name: str
    keywords: tuple[str, ...]
    tone: str


class Concept(NamedTuple):
    """A base emoji and its skin-tone variants (the base first)."""

    name: str
    group: str
    subgroup: str
    variants: tuple[Variant, ...]

    @property
    def code(self) -> str:
        return self.variants[0].code


def concepts(
    emoji_json: list[dict[str, Any]],
    annotations: dict[str, dict[str, list[str]]],
    limit: int | None = None,
) -> list[Concept]:
    """All base concepts in code-point order; `limit`: so many, evenly spread over that order.

    Parameters
    ----------
    emoji_json : emoji-datasource's emoji.json
    annotations : CLDR's annotations and annotationsDerived together: {emoji: {"tts": [name],
        "default": [..]}}
    """
    named = {text.replace("\ufe0f", ""): entry for text, entry in annotations.items()}

    def variant(unified: str, tone: str) -> Variant:
        code = image_code(unified)
        entry = named["".join(chr(int(point, 16)) for point in code.split("-"))]
        return Variant(
            code, plain(entry["tts"][0]), tuple(k.lower() for k in entry.get("default", ())), tone
        )

    entries = sorted(emoji_json, key=lambda e: e["unified"])
    if limit is not None and limit < len(entries):
        entries = [entries[i * len(entries) // limit] for i in range(limit)]
    found = []
    for entry in entries:
        variants = [variant(entry["unified"], "")]
        for tones, skin in sorted(entry.get("skin_variations", {}).items()):
            words = " and ".join(dict.fromkeys(SKIN_TONES[t] for t in tones.split("-")))
            variants.append(variant(skin["unified"], f"{words} skin tone"))
        found.append(
            Concept(variants[0].name, entry["category"], entry["subcategory"], tuple(variants))
        )
    return found


def held_out(found: Sequence[Concept], every: int) -> tuple[list[Concept], list[Concept]]:
    """(trained, held out): every `every`-th base concept, from the first, is never trained on in
    any style.
    """
    return [c for i, c in enumerate(found) if i % every], list(found[::every])


def caption(key: str, variant: Variant, style: str, seed: int = 0) -> str:
    """One of several ways to say what the picture shows; the key and the seed decide which."""
    choice = digest(seed, key)
    # keywords that say more than the name already does, in an order of the key's own
    words = [k for k in variant.keywords if k not in variant.name]
    words.sort(key=lambda k: digest(seed, key, k))
    forms = [
        variant.name,
        variant.name,
        f"an emoji of {variant.name}",
        STYLE_PHRASES[style].format(c=variant.name),
        ", ".join([variant.name, *words[:1]]),
        ", ".join([variant.name, *words[:2]]),
    ]
    return forms[choice[0] % len(forms)]


def digest(*parts: object) -> bytes:
    """Eight bytes that depend on the parts only: a choice that no order or machine changes."""
    return hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()


def plain(tts: str) -> str:
    """CLDR's name as running text: "flag: Chad" -> "flag of chad", "foot: dark skin tone" -> "foot,
    dark ...".
    """
    text = tts.lower().translate({0x201C: None, 0x201D: None, 0x2019: "'"})
    head, colon, tail = text.partition(": ")
    if colon and head == "flag":
        return f"flag of {tail}"
    if colon and head == "keycap":
        return f"keycap {tail}"
    return text.replace(": ", ", ")


def subgroup_name(subgroup: str) -> str:
    """ "face-smiling" -> "face smiling"."""
    return subgroup.replace("-", " ")


def image_code(name: str) -> str:
    """A file name's code points without variation selectors: packages disagree about these."""
    return "-".join(point for point in name.lower().split("-") if point != "fe0f")
