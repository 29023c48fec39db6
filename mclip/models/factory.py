"""open_clip models by name, and back to open_clip's `local-dir` layout.

What is added to `open_clip.create_model_and_transforms`:

- errors of one line that say what is missing and what to do;
- a teacher folder works from any working directory: its text tower is configured by the folder's
  own config.json. open_clip alone takes `hf_model_name` literally (a path relative to the working
  directory), so it loads such a folder from the directory where the folder was written, i.e. the
  repository's root;
- tags trained with QuickGELU (`ViT-B-32/openai`) get it, where open_clip would only warn;
- an architecture with a smaller `vocab_size` than CLIP's gets CLIP's tokenizer cut to it, where
  open_clip would give it the whole one (mclip/models/vocabulary.py);
- a file of weights in place of a tag, in open_clip's naming or in Apple's (`image_encoder.*`,
  `text_encoder.*`), with the preprocessing of the architecture's published weights, where
  open_clip would take CLIP's; what is assumed is said in a warning. open_clip's and timm's
  converters rename the parameters; the names of MobileCLIP-S0's text encoder are in
  mclip/models/mct.py;
- a trainer's checkpoint may hold numpy's numbers beside its tensors.

    local-dir layout: open_clip_config.json (model_cfg, preprocess_cfg),
                      open_clip_model.safetensors, or any of the names that open_clip looks for:
                      open_clip_pytorch_model.bin, model.safetensors, ...,
                      a Hugging Face tokenizer's files (also those of a cut vocabulary),
                      and for Hugging Face text towers config.json
"""

import contextlib
import copy
import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file

from mclip.models import weights
from mclip.models.fastvit import avoid_crash
from mclip.models.inference import is_folded
from mclip.models.vocabulary import small_tokenizer
from mclip.system.files import LFS_POINTER, is_lfs_pointer, plain_path

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
LOCAL = "local-dir:"


class ModelError(ValueError):
    """A model can't be made, loaded or saved; the message names the model string or the file."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep log lines of open_clip and transformers out of notebooks; `create` raises problems."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def create(
    name: str, *, device: str | torch.device = "cpu"
) -> tuple[torch.nn.Module, Any, Any, Any]:
    """Make a model from its name.

    Parameters
    ----------
    name : str
        `ARCH/TAG` (downloaded), `ARCH/FILE` (weights, .pt or .safetensors), `local-dir:FOLDER`,
        `hf-hub:ORG/REPO`, or `ARCH` alone: an architecture of open_clip or of mclip/models/configs
        with random weights (seed torch before).
    device : str or torch.device, default "cpu"
        Where the model goes.

    Returns
    -------
    model : torch.nn.Module
        In eval mode, unlike open_clip's: in training mode batch norm and dropout would change the
        embeddings. `model.mclip` keeps the name, the configuration and the tokenizer for `export`.
    preprocess_train, preprocess_eval : callable
        PIL image -> (3, h, w) Tensor of float32.
    tokenizer : callable
        List of str -> (n, context) Tensor of int64.

    Raises
    ------
    ModelError
        In one line: the name is unknown (with the nearest known ones), a file is missing, or
        weights do not fit the architecture (with the models that they fit).

    See Also
    --------
    open_clip.create_model_and_transforms : What makes the model.
    export : Write it as a folder.

    Examples
    --------
    >>> import torch
    >>> from mclip import models
    >>> model, _, preprocess, tokenizer = models.create("demo-student")
    >>> model.encode_text(tokenizer(["a red apple", "a pear"])).shape
    torch.Size([2, 256])
    >>> models.create("demo-studnet")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    mclip.models.factory.ModelError: demo-studnet: ... did you mean demo-student or demo-vit? ...
    """
    if name.startswith(LOCAL):
        config, overrides = _local_config(name)
        arch, tag = f"{LOCAL}{_folder(name)}", None
    elif name.startswith("hf-hub:"):
        config, overrides, arch, tag = None, {}, name, None
    else:
        arch, tag = _split(name)
        config, overrides = open_clip.get_model_config(arch), _from_file(name, arch, tag)
    try:
        with quiet(), weights.numbers_allowed():
            model, train, evaluate = open_clip.create_model_and_transforms(
                arch,
                tag,
                device=device,
                pretrained_text=False,
                force_quick_gelu=_wants_quick_gelu(arch, tag),
                **overrides,
            )
            tokenizer = open_clip.get_tokenizer(arch)
            if config is None:
                config = open_clip.get_model_config(arch)
            text = config["text_cfg"]
            if (
                type(tokenizer) is open_clip.SimpleTokenizer
                and text.get("vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size
            ):
                tokenizer = small_tokenizer(text["vocab_size"], tokenizer.context_length)
    except (RuntimeError, OSError, ValueError, TypeError, AssertionError, KeyError) as err:
        raise ModelError(
            f"{name}: {_misfit(name, arch, tag, overrides) or _first_line(err)}"
        ) from err
    avoid_crash(model)
    model.mclip = {"name": name, "config": config, "tokenizer": tokenizer}
    return model.eval(), train, evaluate, tokenizer


def export(
    model: torch.nn.Module,
    folder: str | Path,
    *,
    config: dict[str, Any] | None = None,
    preprocess: dict[str, Any] | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write a model in open_clip's local-dir layout; other files of the folder stay.

    Parameters
    ----------
    model : torch.nn.Module
        Of `create`, which knows the rest; or any open_clip model, with `config`.
    folder : path
        Made if it is missing.
    config : dict, optional
        The `model_cfg` of open_clip: embed_dim, vision_cfg, text_cfg.
    preprocess : dict, optional
        With mean, std, interpolation and resize_mode; by default the model's own.
    tokenizer : callable, optional
        Of open_clip; a Hugging Face one is saved beside the weights. By default the model's own.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    ModelError
        If the configuration is not known, or the model is folded for inference, which open_clip
        can't build.

    Examples
    --------
    >>> import tempfile
    >>> from mclip import models
    >>> folder = models.export(models.create("demo-student")[0], tempfile.mkdtemp())
    >>> sorted(file.name for file in folder.glob("open_clip_*"))
    ['open_clip_config.json', 'open_clip_model.safetensors']
    >>> model, *_ = models.create(f"local-dir:{folder}")
    """
    known = getattr(model, "mclip", {})
    config = copy.deepcopy(config if config is not None else known.get("config"))
    if config is None:
        raise ModelError(f"export to {folder}: the model has no known configuration; give config=")
    tokenizer = tokenizer if tokenizer is not None else known.get("tokenizer")
    if is_folded(model):
        raise ModelError(
            f"export to {folder}: the model is folded for inference, which open_clip can't build; "
            "export the one that for_inference was given"
        )
    folder = Path(folder)
    text = config["text_cfg"]
    if "hf_model_name" in text:
        text |= {"hf_model_name": folder.as_posix(), "hf_model_pretrained": False}
    if hasattr(tokenizer, "save_pretrained"):
        text["hf_tokenizer_name"] = folder.as_posix()
    config.get("vision_cfg", {}).pop(
        "timm_model_pretrained", None
    )  # set by open_clip while loading
    preprocess = {**getattr(model.visual, "preprocess_cfg", {}), **(preprocess or {})}
    preprocess = {k: preprocess[k] for k in weights.PREPROCESSING if k in preprocess}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        part = Path(temporary)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(part)
        if "hf_model_name" in text:
            model.text.config.save_pretrained(part)
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        save_file(tensors, part / WEIGHTS_FILE)
        (part / CONFIG_FILE).write_text(
            json.dumps(
                {"model_cfg": config, "preprocess_cfg": preprocess}, indent=2, sort_keys=True
            )
            + "\n"
        )
        # the configuration goes first and comes back last: a folder that has one is whole
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for file in sorted(part.iterdir(), key=lambda f: f.name == CONFIG_FILE):
            if file.is_dir():
                shutil.rmtree(folder / file.name, ignore_errors=True)
            else:
                file.chmod(0o644)  # safetensors makes files that only their owner reads
            os.replace(file, folder / file.name)
    return folder


def image_size(model: torch.nn.Module) -> int:
    """Look up the side of a model's (square) input image.

    Parameters
    ----------
    model : torch.nn.Module
        Of `create`.

    Returns
    -------
    int
        Pixels.

    Examples
    --------
    >>> from mclip import models
    >>> models.image_size(models.create("demo-student")[0])
    32
    """
    size = model.visual.image_size
    return int(size[0] if isinstance(size, (tuple, list)) else size)


def logit_scale(model: torch.nn.Module) -> float:
    """Look up a model's own logit scale.

    Parameters
    ----------
    model : torch.nn.Module
        Of `create`.

    Returns
    -------
    float
        1 / temperature, exponentiated already.

    Examples
    --------
    >>> from mclip import models
    >>> round(models.logit_scale(models.create("demo-student")[0]), 2)
    14.29
    """
    return float(model.logit_scale.detach().float().exp())


def weights_sha256(name: str) -> str:
    """Digest the weights file that `create` loads for a name.

    Parameters
    ----------
    name : str
        As `create` takes it. Weights of a hub are taken from open_clip's cache.

    Returns
    -------
    str
        The sha256, 64 hex digits.

    Raises
    ------
    ModelError
        If the name has no weights, or is unknown.

    Examples
    --------
    >>> from mclip import models
    >>> models.weights_sha256("demo-student")
    Traceback (most recent call last):
    mclip.models.factory.ModelError: demo-student: random initialisation, there is no weights file
    """
    file = weights_file(name)
    if file is None:
        raise ModelError(f"{name}: random initialisation, there is no weights file")
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_file(name: str) -> Path | None:
    """The weights file behind a model string; None for an architecture without a tag."""
    if name.startswith(LOCAL):
        _local_config(name)
        return _weights_in(_folder(name))
    with quiet():
        if name.startswith("hf-hub:"):
            return Path(open_clip.download_pretrained_from_hf(name.removeprefix("hf-hub:")))
        arch, tag = _split(name)
        if not tag or Path(tag).is_file():
            return Path(tag) if tag else None
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(arch, tag)))


def preprocessing(size: int, preprocess_cfg: dict[str, Any], *, train: bool = False) -> Any:
    """open_clip's transform for a preprocess_cfg at an image size (PIL image -> (3, size, size)
    float).
    """
    return image_transform_v2(PreprocessCfg(**{**preprocess_cfg, "size": size}), is_train=train)


def _split(name: str) -> tuple[str, str | None]:
    """`ARCH/TAG` or `ARCH/FILE` -> both, checked against what open_clip and mclip/models/configs
    know.
    """
    for file in sorted((Path(__file__).parent / "configs").glob("*.json")):
        if file.stem not in open_clip.list_models():
            open_clip.add_model_config(file)
    known = open_clip.list_models()
    parts = name.split("/")
    for k in range(len(parts), 0, -1):  # an architecture may be written with a slash, too: ViT-B/32
        arch, tag = "-".join(parts[:k]), "/".join(parts[k:])
        if arch in known:
            break
    else:
        near = weights.near_names(parts[0], known)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(
            f"{name}: open_clip and mclip/models/configs have no model {parts[0]!r}{hint} "
            "(a folder is written local-dir:FOLDER)"
        )
    if tag and not open_clip.get_pretrained_cfg(arch, tag) and not Path(tag).is_file():
        if "/" in tag or Path(tag).suffix in (".pt", ".pth", ".bin", ".safetensors"):
            raise ModelError(f"{name}: there is no file {tag}")
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise ModelError(f"{name}: {arch} has no weights {tag!r}; open_clip knows {tags}")
    return arch, tag or None


def _from_file(name: str, arch: str, file: str | None) -> dict[str, Any]:
    """What weights from a file override: the preprocessing; what is assumed of it is a warning."""
    if not file or not Path(file).is_file():
        return {}
    try:
        overrides, assumption = weights.preprocessing(arch, Path(file))
    except weights.WeightsError as err:
        raise ModelError(f"{name}: {err}") from err
    if assumption:
        warnings.warn(f"{name}: {assumption}", stacklevel=3)
    return overrides


def _misfit(name: str, arch: str, tag: str | None, overrides: dict[str, Any]) -> str | None:
    """What is wrong with weights that could not be loaded, in one line; None when it isn't their
    names or shapes.
    """
    with contextlib.suppress(Exception), quiet():  # the error that there was is the one to tell
        file = weights_file(name)
        return weights.misfit(file, arch, alternatives=bool(tag), **overrides) if file else None
    return None


def _wants_quick_gelu(arch: str, tag: str | None) -> bool:
    return bool(tag and (open_clip.get_pretrained_cfg(arch, tag) or {}).get("quick_gelu"))


def _local_config(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model_cfg of a local-dir folder, and what to override so that it loads from any
    directory.
    """
    folder = _folder(name)
    file = folder / CONFIG_FILE
    if not file.is_file():
        stage = (
            "teachers"
            if folder.parts[:1] == ("models",) and "students" not in folder.parts
            else None
        )
        stage = "distill" if "students" in folder.parts else stage
        todo = f": run `dvc repro {stage}` first" if stage else ""
        raise ModelError(f"{file} is missing{todo}")
    found = _weights_in(folder)
    if not found.is_file():
        raise ModelError(f"{found} is missing")
    with open(found, "rb") as start:
        if is_lfs_pointer(start.read(64)):
            raise ModelError(f"{found} is {LFS_POINTER}")
    try:
        config = json.loads(file.read_text())["model_cfg"]
        text = dict(config["text_cfg"])
    except (json.JSONDecodeError, KeyError, TypeError) as err:
        raise ModelError(f"{file}: not an open_clip configuration ({_first_line(err)})") from err
    if "hf_model_name" not in text:
        return config, {}
    if (folder / "config.json").is_file():
        text["hf_model_name"] = str(folder.resolve())
    return config, {"text_cfg": {**text, "hf_model_pretrained": False}}


def _folder(name: str) -> Path:
    """The folder of a local-dir name."""
    return Path(plain_path(name.removeprefix(LOCAL)))


def _weights_in(folder: Path) -> Path:
    """The weights that open_clip loads from a folder; those that `export` writes if there are
    none.
    """
    return Path(open_clip.factory._find_checkpoint_in_dir(folder) or folder / WEIGHTS_FILE)


def _first_line(err: BaseException) -> str:
    return str(err).strip().split("\n")[0] or type(err).__name__
