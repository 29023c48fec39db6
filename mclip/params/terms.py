"""Check a recipe's keys against the terms of its loss (mclip/distill/terms)."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic
from pydantic_core import InitErrorDetails, PydanticCustomError

from mclip.params.tree import nearest

# found by name, as studies are: the terms stand on a higher floor, and import nothing heavy
terms = importlib.import_module("mclip.distill.terms")


def weights(values: Mapping[str, float]) -> dict[str, float]:
    """A weight for every term, 0 where `values` has none.

    Raises
    ------
    pydantic.ValidationError
        If a name is no term's.
    """
    names = list(terms.every())
    errors = [_unknown(name, names, value) for name, value in values.items() if name not in names]
    if errors:
        raise pydantic.ValidationError.from_exception_data("weight", errors)
    return {name: values.get(name, 0.0) for name in names}


def options(values: Mapping[str, Any], others: Iterable[str]) -> dict[str, pydantic.BaseModel]:
    """The options of every term that has some, filled up.

    Parameters
    ----------
    values : mapping
        Term's name -> its options as params.yaml has them.
    others : iterable of str
        The recipe's other keys, for the message on an unknown one.

    Raises
    ------
    pydantic.ValidationError
        If a name is no term's with options, or the options do not fit its schema.
    """
    kinds = {name: term.options for name, term in terms.every().items() if term.options}
    errors = [_unknown(key, [*others, *kinds], v) for key, v in values.items() if key not in kinds]
    found = {}
    for name, kind in kinds.items():
        try:
            found[name] = kind.model_validate(values.get(name, {}))
        except pydantic.ValidationError as err:
            for e in err.errors():
                if e["type"] == "extra_forbidden":
                    errors.append(_unknown(str(e["loc"][-1]), kind.model_fields, e["input"], name))
                else:
                    said = PydanticCustomError(e["type"], e["msg"])
                    errors.append({"type": said, "loc": (name, *e["loc"]), "input": e["input"]})
    if errors:
        raise pydantic.ValidationError.from_exception_data("Recipe", errors)
    return found


def needed(weight: Mapping[str, float]) -> dict[str, list[str]]:
    """`terms.needs`, with the keys of the weights: {"ensemble": ["weight.affinity"]}."""
    return {
        need: [f"weight.{name}" for name in names] for need, names in terms.needs(weight).items()
    }


def _unknown(key: str, allowed: Iterable[str], value: Any, *above: str) -> InitErrorDetails:
    said = PydanticCustomError("value_error", f"unknown key{nearest(key, allowed)}")
    return InitErrorDetails(type=said, loc=(*above, key), input=value)
