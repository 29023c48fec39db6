"""A model to take away: open_clip's folder, both towers as checked ONNX, and a model card.

    mclip export models/students/combined/seed0 OUT
    mclip export MobileCLIP-S0/checkpoints/mobileclip_s0.pt OUT --no-onnx

    OUT/open_clip_config.json, open_clip_model.safetensors
                        for `open_clip.create_model("local-dir:OUT")`; with branches, for training
    OUT/image.onnx      pixels (batch, 3, h, w) float32 -> image_embedding (batch, d), unit-norm
    OUT/text.onnx       tokens (batch, context) int64   -> text_embedding (batch, d), unit-norm
    OUT/README.md       the card: recipe, data, metrics, licences, as far as they are known

The ONNX towers are folded (`mclip.models.for_inference`) and run in onnxruntime on photographs and
captions before they get their names: a cosine below 0.9999 to torch's embeddings is an error.
Preprocessing is in open_clip_config.json.
"""

import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.push_to_hf_hub import generate_readme
from PIL import Image

from mclip import models
from mclip.data import evalsets
from mclip.data.shards import decode
from mclip.models.onnx import Tower, agreement, to_onnx
from mclip.system.files import whole, write_whole

COSINE = 0.9999
CAPTIONS = [
    "a photo of a cat",
    "two dogs that run on a beach",
    "red apple",
    "the flag of Norway, at night",
    "a diagram",
    "an aeroplane above the clouds",
    "smiling face with sunglasses",
    "Tower of London, 1890",
]
LICENCES = {
    "demo": [
        "Noto Emoji (Apache-2.0, OFL)",
        "Twemoji (CC-BY 4.0)",
        "Fluent Emoji (MIT)",
        "Unicode CLDR",
        "CIFAR-10",
        "teachers: EfficientNet-Lite and all-MiniLM-L6-v2 (Apache-2.0)",
    ],
    "published": [
        "published MobileCLIP weights: Apple's research licence for models, "
        "for research purposes only"
    ],
    "weights": [
        "the weights are others': the licence under which they were published holds for this "
        "copy, too"
    ],
}


class ExportError(RuntimeError):
    """An exported tower differs from the model; the message names the file."""

    exit_code = 1


class NoPictures(ValueError):
    """A folder without pictures to check on; the message names it."""


def photographs(count: int = 8) -> list[Image.Image]:
    """Cut pictures from the two photographs that come with scikit-learn.

    Parameters
    ----------
    count : int, default 8
        How many.

    Returns
    -------
    list of PIL.Image.Image
        Square, 260 pixels a side and more.

    Examples
    --------
    >>> from mclip import export
    >>> [picture.size for picture in export.photographs(2)]
    [(260, 260), (260, 260)]
    """
    from sklearn.datasets import load_sample_images

    out = []
    for i in range(count):
        photo = Image.fromarray(load_sample_images().images[i % 2])
        side, at = 260 + 20 * (i // 2), 40 * (i // 2)
        out.append(photo.crop((at, at // 2, at + side, at // 2 + side)))
    return out


def read_pictures(folder: Path, limit: int = 64) -> list[Image.Image]:
    """Read pictures of a folder, evenly spread over it.

    Parameters
    ----------
    folder : pathlib.Path
        With .png, .jpg or .webp files at any depth, or an evaluation set in CLIP_benchmark's
        layout.
    limit : int, default 64
        Most that are read.

    Returns
    -------
    list of PIL.Image.Image
        In the order of their names.

    Raises
    ------
    NoPictures
        If there is none.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from mclip import export
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (40, 30)).save(folder / "a.png")
    >>> [picture.size for picture in export.read_pictures(folder)]
    [(40, 30)]
    """
    found: list[Any]
    read: Any
    if (folder / "test" / "nshards.txt").is_file():
        found, read = evalsets.read_split(folder, answer=None).places, evalsets.read_image
    else:
        found = sorted(
            f for f in folder.rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
        )
        read = _read_picture
    if not found:
        raise NoPictures(
            f"{folder}: no picture in it (.png, .jpg, .webp, or an evaluation set's tars)"
        )
    return [read(f) for f in found[:: -(-len(found) // limit)]]


def _read_picture(file: Path) -> Image.Image:
    return decode(file.read_bytes())


def run(
    name: str,
    out: str | Path,
    *,
    onnx: bool = True,
    pictures: Sequence[Image.Image] | None = None,
    opset: int | None = None,
) -> dict[str, float]:
    """Export a model by its name: open_clip's folder, ONNX towers, a model card.

    Parameters
    ----------
    name : str
        What `mclip.models.create` takes, or a folder.
    out : path
        Folder to write.
    onnx : bool, default True
        Write image.onnx and text.onnx, too.
    pictures : sequence of PIL.Image.Image, optional
        What the image tower is checked on; by default `photographs`.
    opset : int, optional
        Of ONNX; by default torch's.

    Returns
    -------
    dict of str to float
        "image" and "text" -> the lowest cosine of an ONNX tower's embeddings to torch's; empty
        without ONNX.

    Raises
    ------
    ExportError
        If a cosine is below 0.9999.
    ModelError
        If there is no such model.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from mclip import export
    >>> out = tempfile.mkdtemp()
    >>> export.run("demo-student", out, onnx=False)
    {}
    >>> sorted(file.name for file in Path(out).glob("*") if "token" not in file.name)
    ['README.md', 'open_clip_config.json', 'open_clip_model.safetensors']
    """
    model, _, preprocess, tokenizer = models.create(_named(name))
    out = models.export(model, out)
    found: dict[str, float] = {}
    if onnx:
        fast = models.for_inference(model)
        pixels = torch.stack([preprocess(p.convert("RGB")) for p in pictures or photographs()])
        for kind, x in (("image", pixels), ("text", tokenizer(CAPTIONS))):
            path = out / f"{kind}.onnx"
            with whole(path) as draft:
                found[kind] = agreement(
                    to_onnx(Tower(fast, kind), draft, opset=opset), Tower(model, kind), x
                )
                if found[kind] < COSINE:
                    raise ExportError(
                        f"{path}: cosine {found[kind]:.6f} to torch's embeddings, expected {COSINE}"
                    )
    write_whole(out / "README.md", generate_readme(card(_named(name), found), out.resolve().name))
    return found


def card(name: str, cosines: dict[str, float] | None = None) -> dict[str, Any]:
    """Describe a model, as the `model_card` of open_clip's `push_to_hf_hub`.

    Recipe, data and metrics are those of params.yaml, of training.json beside the weights and of
    reports/metrics, where the model is a student of this repository (models/students/RECIPE/SEED)
    and these files exist.

    Parameters
    ----------
    name : str
        What `mclip.models.create` takes, or a folder.
    cosines : dict of str to float, optional
        What `run` returned.

    Returns
    -------
    dict
        With the keys tags, license, details, description and usage.

    Examples
    --------
    >>> from mclip import export
    >>> export.card("demo-student")["details"]["Exported from"]
    'demo-student'
    """
    name = _named(name)
    folder = Path(name.removeprefix("local-dir:"))
    shown = (
        folder.name if folder.is_dir() else str(Path(name).parts[0])
    )  # no path of the machine that exports
    details: dict[str, Any] = {"Exported from": shown}
    with_weights = models.factory.weights_file(name) is not None
    student = folder.parent.name if (folder / "training.json").is_file() else None
    licences = LICENCES["weights"] if with_weights and not folder.is_dir() else []
    if "MobileCLIP" in name and with_weights:
        licences = LICENCES["published"]
    if student:
        details |= {"Exported from": f"{student}/{folder.name}", **_training(student, folder)}
        licences = (
            LICENCES["demo"]
            if details.get("Data", "").startswith("demo")
            else ["those of the training data"]
        )
    if cosines:
        details["ONNX"] = {
            f"{kind}.onnx": f"folded, cosine to torch at least {value:.6f}"
            for kind, value in cosines.items()
        }
    details["Licences"] = ["code: MIT", *(licences or ["weights: no training is known of"])]
    return {
        "tags": ["clip", "zero-shot-image-classification"],
        "license": "other",
        "details": details,
        "description": "An image-text model, exported by mclip (`mclip export`), which trains by "
        "the recipes of CLIP-CID (arXiv 2408.09441) and MobileCLIP (arXiv 2311.17049).",
        "usage": _usage(),
    }


def _training(recipe: str, folder: Path) -> dict[str, Any]:
    """Recipe, data and metrics of a student, from the files that the stages wrote."""
    out: dict[str, Any] = {}
    facts = json.loads((folder / "training.json").read_text())
    if Path("params.yaml").is_file():
        from mclip import params

        p = params.load()
        if recipe in p.distill.recipes:
            one, train = p.distill.recipes[recipe], p.distill.train
            weights = ", ".join(f"{k} x {v:g}" for k, v in one.weight.items() if v)
            out["Recipe"] = {
                "name": f"{recipe} ({one.title})",
                "losses": weights,
                "pairs": one.pairs,
                "reinforced": one.reinforced,
                "student": p.distill.student,
                "samples seen": train.samples,
                "batch": train.batch_size,
                "lr": train.lr,
                "weight decay": train.weight_decay,
                "betas": list(train.betas),
                "teachers": ", ".join(p.teachers.models.values()),
            }
            out["Data"] = (
                f"{p.data.source}: emoji in three styles and captioned CIFAR-10"
                if p.data.source == "demo"
                else f"{p.data.source}: {', '.join(p.data.shards)}"
            )
    out["Training"] = facts
    file = Path("reports/metrics") / f"{recipe}.json"
    if file.is_file():
        sets = json.loads(file.read_text()).get(recipe, {})
        out["Metrics, mean over seeds"] = {
            name: ", ".join(
                f"{metric} {100 * value['mean']:.1f} %"
                for metric, value in found.items()
                if isinstance(value, dict) and "mean" in value
            )
            for name, found in sets.items()
            if name != "mean"
        }
    return out


def _usage() -> str:
    needs = "import mclip.models  # tells open_clip and timm of the towers that they lack\n"
    return (
        f"```python\nimport open_clip\n{needs}"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")\n```\n'
    )


def _named(name: str) -> str:
    """A folder may be given without its `local-dir:`."""
    return f"local-dir:{name}" if (Path(name) / "open_clip_config.json").is_file() else name


if __name__ == "__main__":  # `python -m mclip.export` is `mclip export`
    sys.argv[1:1] = ["export"]
    runpy.run_module("mclip", run_name="__main__", alter_sys=True)
