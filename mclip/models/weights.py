"""Weights in files: which preprocessing they want, and one-line errors for those that don't fit."""

import contextlib
import difflib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mclip.system.files import LFS_POINTER, is_lfs_pointer

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


class WeightsError(ValueError):
    """A file holds something else than tensors by name."""


# an architecture that open_clip lacks, and one whose published weights have its preprocessing
LIKE = {"MobileCLIP-S0": "MobileCLIP-S1"}
APPLE = "image_encoder.model."  # how names begin in Apple's own checkpoints


def preprocessing(arch: str, file: Path) -> tuple[dict[str, Any], str | None]:
    """open_clip's arguments for the preprocessing of weights in a file.

    It follows from the model: neither the file's suffix nor its parameters' names say anything
    about it (MobileCLIP's and MobileCLIP2's are published in open_clip's naming as well as in
    Apple's, and only some of both were trained on pixels from 0 to 1).

    Parameters
    ----------
    arch : of open_clip, or of mclip/models/configs
    file : with the weights

    Returns
    -------
    arguments : image_mean, image_std, ...; {} where open_clip's own defaults hold
    assumption : what was assumed, to be said; None where open_clip_config.json beside the file says
        it, or the weights are those that Apple published

    Raises
    ------
    WeightsError : the file has something else than tensors, or is not whole
    """
    state = _names(file)
    if merged := next((name for name in state if "reparam_conv" in name), None):
        raise WeightsError(
            f"{file} has a model whose branches are merged for inference ({merged}): take the "
            "checkpoint before that, mclip.models.for_inference merges them"
        )
    config = file.parent / "open_clip_config.json"
    if config.is_file():
        try:
            stated = json.loads(config.read_text()).get("preprocess_cfg", {})
        except (ValueError, AttributeError) as err:
            raise WeightsError(f"{config}: not an open_clip configuration ({err})") from err
        return {f"image_{k}": v for k, v in stated.items() if k in PREPROCESSING}, None
    published = [
        open_clip.get_pretrained_cfg(LIKE.get(arch, arch), tag)
        for tag in open_clip.list_pretrained_tags_by_model(LIKE.get(arch, arch))
    ]
    all_of_them = [{f"image_{k}": p[k] for k in PREPROCESSING if p.get(k)} for p in published]
    if all_of_them and all(one == all_of_them[0] for one in all_of_them):
        found, whose = all_of_them[0], f"that of {arch}'s published weights"
    else:
        found, whose = {}, "CLIP's"
    if any(name.startswith(APPLE) for name in state):
        return found, None
    return found, (
        f"its preprocessing is assumed to be {whose}; open_clip_config.json beside the file, or "
        "local-dir:FOLDER, states another"
    )


def _names(file: Path) -> Iterable[str]:
    """The names of the tensors in a file."""
    with open(file, "rb") as start:
        if is_lfs_pointer(start.read(64)):
            raise WeightsError(f"{file} is {LFS_POINTER}")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return list(tensors.keys())
        with numbers_allowed():
            state = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, SafetensorError) as err:
        raise WeightsError(f"{file} is no file of weights alone ({_why(file, err)})") from err
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return [str(name) for name in state]


def numbers_allowed() -> contextlib.AbstractContextManager:
    """While it lasts, files may hold numpy's numbers beside tensors, as trainers' checkpoints do
    (a loss, a step): no code runs for them.
    """
    scalar, array = (x.__reduce__()[0] for x in (np.float64(0), np.zeros(1)))
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"}
    named: list[Any] = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for function in (scalar, array)
        for core in ("core", "_core")  # before and since numpy 2
    ]
    return torch.serialization.safe_globals([*named, np.ndarray, np.dtype, *kinds])


def _why(file: Path, err: Exception) -> str:
    """Why a file could not be read, in a few words."""
    if isinstance(err, pickle.UnpicklingError):
        with contextlib.suppress(Exception), numbers_allowed():
            others = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if others:
                return (
                    f"it holds {', '.join(others[:3])}, too: where you trust it, torch.load it "
                    "with weights_only=False and torch.save its state_dict"
                )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(err)).splitlines()
    return lines[0] if lines else type(err).__name__


def misfit(file: Path, arch: str, *, alternatives: bool, **overrides: Any) -> str | None:
    """How the parameters in a file differ from an architecture's; None if they don't.

    alternatives: where shapes differ, look among the models with names like it for one that the
    file fits.
    """
    with numbers_allowed():
        has = open_clip.factory.load_state_dict(str(file))
    found = _compare(arch, has, overrides)
    if found and alternatives and " has shape " in found:
        others = near_names(arch, (n for n in open_clip.list_models() if n != arch), 5)
        fits = next((other for other in others if not _compare(other, has, {})), None)
        found += f"; they fit {fits}" if fits else ""
    return found or None


def near_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names most like one, however upper and lower case, dashes and underscores are set."""
    plain = {n.lower().replace("_", "-"): n for n in known}
    return [
        plain[n] for n in difflib.get_close_matches(name.lower().replace("_", "-"), plain, count)
    ]


def _compare(arch: str, state: dict[str, Tensor], overrides: dict[str, Any]) -> str:
    """The first parameter of each kind of difference and how many there are; "" without any."""
    overrides = {k: v for k, v in overrides.items() if not k.startswith("image_")}
    with torch.device("meta"):
        model = open_clip.create_model(
            arch, load_weights=False, pretrained_text=False, device="meta", **overrides
        )
        scale = state.get("logit_scale")
        state = open_clip.convert.convert_state_dict(
            model, {"logit_scale": model.logit_scale, **state}
        )
    if scale is None:
        del state["logit_scale"]
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    expected = model.state_dict()
    missing = [k for k in expected if k not in state]
    other = [k for k in expected if k in state and state[k].numel() != expected[k].numel()]
    unknown = [k for k in state if k not in expected]
    said = []
    if other:
        had, wanted = (tuple(d[other[0]].shape) for d in (state, expected))
        said.append(f"{other[0]} has shape {had}, expected {wanted}" + _more(other))
    if missing:
        near = difflib.get_close_matches(missing[0], unknown or state, 1)
        said.append(
            f"{missing[0]} is missing"
            + _more(missing)
            + (f", nearest is {near[0]}" if near else "")
        )
    if unknown:
        said.append(f"{unknown[0]} is not expected" + _more(unknown))
    return "the weights do not fit: " + "; ".join(said) if said else ""


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
