"""The docstrings of the public names are whole and in numpydoc's form.

tests/test_examples.py runs their examples.
"""

import importlib
import inspect

import pytest
from numpydoc import validate

# packages that hand on their public names, and modules that README calls by their own
PUBLIC = [
    "mclip.balance",
    "mclip.balance.prune",
    "mclip.cluster",
    "mclip.data.stores.embeddings",
    "mclip.evaluate",
    "mclip.export",
    "mclip.losses",
    "mclip.models",
    "mclip.params",
]
# numpydoc's checks, https://numpydoc.readthedocs.io/en/latest/validation.html. Left out: an extended
# summary and See Also for everything (ES01, SA01), and style (GL01, GL02, SS05, RT02, SA03)
LOOKS = {"GL03", "GL05", "GL06", "GL07", "GL08", "GL10", "SS01", "SS02", "SS03", "SS04", "SS06"}
PARAMETERS = {f"PR{number:02d}" for number in range(1, 11)}
RETURNS = {"RT01", "RT03", "RT04", "RT05", "YD01"}
REST = {"SA02", "SA04", "EX01"}


def is_error(thing) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)


def public() -> list[str]:
    """The functions and classes to validate, by dotted name.

    Of `mclip.params` its functions and exceptions: its other classes are sections of params.yaml,
    whose keys are explained there.
    """
    found = []
    for name in PUBLIC:
        module = importlib.import_module(name)
        own = [
            key for key, value in vars(module).items() if getattr(value, "__module__", 0) == name
        ]
        for key in getattr(module, "__all__", [key for key in own if not key.startswith("_")]):
            thing = getattr(module, key)
            wanted = inspect.isfunction(thing) or inspect.isclass(thing)
            if name == "mclip.params" and inspect.isclass(thing) and not is_error(thing):
                wanted = False
            if wanted:
                found.append(f"{name}.{key}")
    return found


NAMES = public()


def test_the_names_are_found():
    assert {"mclip.balance.balance", "mclip.losses.clip_loss", "mclip.export.card"} <= set(NAMES)
    assert len(NAMES) > 50


@pytest.mark.parametrize("name", NAMES)
def test_docstring_is_whole(name):
    package, _, key = name.rpartition(".")
    looks = is_error(getattr(importlib.import_module(package), key))
    wanted = LOOKS if looks else LOOKS | PARAMETERS | RETURNS | REST
    wrong = [f"{code} {text}" for code, text in validate.validate(name)["errors"] if code in wanted]
    assert not wrong, "\n".join(wrong)
