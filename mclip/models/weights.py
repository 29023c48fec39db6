"""Weights in files: MobileCLIP's published ones, and one-line errors for those that don't fit."""

import difflib
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor


class WeightsError(ValueError):
    """A file holds something else than tensors by name."""


def published_preprocessing(file: str | Path) -> dict[str, Any]:
    """open_clip's arguments for a file of MobileCLIP's published weights; {} for any other file.

    They were trained on pixels from 0 to 1, resized bilinearly. Only tensors are unpickled:
    WeightsError if there is more in the file.
    """
    if Path(file).suffix == ".safetensors":
        return {}
    try:
        state = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as err:
        raise WeightsError(
            f"{file} is no file of weights alone ({(str(err).splitlines() or [''])[0]})"
        ) from err
    if not (
        isinstance(state, dict) and any(str(k).startswith("image_encoder.model.") for k in state)
    ):
        return {}
    return {
        "image_mean": (0.0,) * 3,
        "image_std": (1.0,) * 3,
        "image_interpolation": "bilinear",
        "image_resize_mode": "shortest",
    }


def misfit(file: Path, arch: str, *, alternatives: bool, **overrides: Any) -> str | None:
    """How the parameters in a file differ from an architecture's; None if they don't.

    alternatives: where shapes differ, look among the models with names like it for one that the
    file fits.
    """
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
