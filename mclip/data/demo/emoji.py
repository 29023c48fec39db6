"""Emoji as concepts: which exist, which belong together, and which are held out.

A base concept is an entry of emoji.json ("waving hand"); its skin-tone variants belong to it. Names
and keywords are the English ones of CLDR, in lower case plain text. Concepts that differ by gender,
hair or direction only form a family ("man cook", "woman cook", "cook"): a family is held out whole.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mclip.data.demo.classes import CLASSES

SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
# flags look alike, and swatches of skin tones are no things: trained on, never tested
UNTESTED_GROUPS = ("Flags", "Component")
PEOPLE = {"1f468", "1f469", "1f9d1"}  # man, woman, person
# of a joined sequence: female, male, rightwards, hair (red, curly, bald, white)
MODIFIERS = {"200d", "2640", "2642", "27a1", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}
GENDER_WORDS = {
    *("man", "woman", "men", "women", "man's", "woman's", "men's", "women's", "male", "female"),
    *("person", "people", "boy", "girl", "child", "adult", "santa", "mrs.", "mx", "and"),
}
# twins whose names share no word, by what `_name_key` makes of them
TWINS = {
    "princess": "prince",
    "with crown": "prince",
    "older": "old",
    "breast-feeding": "feeding baby",
}


class Variant(NamedTuple):
    """One emoji: `code` is its code points, "1f44b-1f3fb" (no fe0f); `tone` its skin tone or ""."""

    code: str
    name: str
    keywords: tuple[str, ...]
    tone: str
    unicode: str  # Unicode's name of the base emoji, in lower case
    shortcode: str  # without the outer colons: wave::skin-tone-2


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

    def variant(entry: dict[str, Any], unified: str, tones: Sequence[str] = ()) -> Variant:
        code = image_code(unified)
        texts = named["".join(chr(int(point, 16)) for point in code.split("-"))]
        words = " and ".join(dict.fromkeys(SKIN_TONES[t] for t in tones))
        # emoji-datasource counts tones from 2, as Fitzpatrick's scale does
        numbers = "".join(f"-{list(SKIN_TONES).index(t) + 2}" for t in tones)
        return Variant(
            code,
            plain(texts["tts"][0]),
            tuple(k.lower() for k in texts.get("default", ())),
            f"{words} skin tone" if tones else "",
            entry["name"].lower(),
            entry["short_name"] + (f"::skin-tone{numbers}" if tones else ""),
        )

    entries = sorted(emoji_json, key=lambda e: e["unified"])
    if limit is not None and limit < len(entries):
        entries = [entries[i * len(entries) // limit] for i in range(limit)]
    found = []
    for entry in entries:
        variants = [variant(entry, entry["unified"])]
        for tones, skin in sorted(entry.get("skin_variations", {}).items()):
            variants.append(variant(entry, skin["unified"], tones.split("-")))
        found.append(
            Concept(variants[0].name, entry["category"], entry["subcategory"], tuple(variants))
        )
    return found


def families(found: Sequence[Concept]) -> list[list[Concept]]:
    """Concepts that may be tested, in families, ordered by class and code point.

    Two concepts are of one family if their code points agree without signs of gender, hair and
    direction, or if their names (up to a comma) agree without the words for it.
    """
    family: dict[str, list[Concept]] = {}
    for concept in found:
        if concept.group in UNTESTED_GROUPS:
            continue
        keys = [_code_key(concept.code), _name_key(concept.name)]
        joined = {id(family[k]): family[k] for k in keys if k in family}
        members = [m for group in joined.values() for m in group] + [concept]
        for k in keys + [k for m in members for k in (_code_key(m.code), _name_key(m.name))]:
            family[k] = members
    distinct = {id(group): sorted(group, key=lambda c: c.code) for group in family.values()}
    return sorted(distinct.values(), key=lambda g: (CLASSES[g[0].subgroup], g[0].code))


def _code_key(code: str) -> str:
    points = code.split("-")
    if "200d" in points:
        points = [p for p in points if p not in MODIFIERS]
    return "-".join("person" if p in PEOPLE else p for p in points)


def _name_key(name: str) -> str:
    words = name.partition(",")[0].split()
    key = " ".join(w for w in words if w not in GENDER_WORDS)
    return TWINS.get(key, key) or "person"


def held_out(found: Sequence[Concept], every: int) -> tuple[list[Concept], list[Concept]]:
    """(trained, held out): every `every`-th family is never trained on in any style."""
    unseen = {c.code for family in families(found)[every - 1 :: every] for c in family}
    return [c for c in found if c.code not in unseen], [c for c in found if c.code in unseen]


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


def image_code(name: str) -> str:
    """A file name's code points without variation selectors: packages disagree about these."""
    return "-".join(point for point in name.lower().split("-") if point != "fe0f")
