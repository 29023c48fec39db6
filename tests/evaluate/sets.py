"""Small evaluation sets in CLIP_benchmark's webdataset layout, and embeddings, for the tests."""

import io
import tarfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def unit(rng: np.random.Generator, n: int, d: int = 8) -> torch.Tensor:
    """(n, d) random unit-norm embeddings."""
    return F.normalize(torch.tensor(rng.normal(size=(n, d)), dtype=torch.float32), dim=-1)


def png(colour, noise: int = 0, size: int = 8, image: bool = False):
    """A noisy square of a colour as PNG bytes, or as the picture itself."""
    rng = np.random.default_rng(noise)
    pixels = np.clip(np.array(colour) + rng.integers(-25, 26, (size, size, 3)), 0, 255).astype(
        np.uint8
    )
    if image:
        return Image.fromarray(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_split(folder, samples: list[dict[str, bytes]], shards: int = 2) -> None:
    """Samples {extension: bytes} in a split's tars, in order."""
    for number, part in enumerate(np.array_split(np.arange(len(samples)), shards)):
        write_tar(
            folder / f"{number}.tar",
            {f"s{i:04d}.{ext}": data for i in part for ext, data in samples[i].items()},
        )
    (folder / "nshards.txt").write_text(f"{shards}\n")


def write_classification(folder, samples, classes, templates, split: str = "test"):
    """samples: (PNG bytes, class number)."""
    write_split(folder / split, [{"cls": str(int(y)).encode(), "png": data} for data, y in samples])
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
    (folder / "zeroshot_classification_templates.txt").write_text(
        "".join(f"{t}\n" for t in templates)
    )
    return folder


def write_retrieval(folder, samples, split: str = "test"):
    """samples: (PNG bytes, captions)."""
    write_split(
        folder / split, [{"png": data, "txt": "\n".join(texts).encode()} for data, texts in samples]
    )
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder
