"""The evaluation sets that the papers name, and the default's own: metric, classes, where each
comes from.

    registry.get("pets")         # Entry(title="Oxford-IIIT Pet", metric="mean_per_class", ...)
    registry.SUITES["clip-cid"]  # the names of its 14 sets; also robustness, datacomp, demo
    mclip sets                   # all of them as a table, and which are here

Suites: `clip-cid`, the 14 sets of zero-shot and linear probe (arXiv 2408.09441, Tables 1, 2), and
`robustness` (Table 3); `datacomp`, the 38 that MobileCLIP averages over; `demo`, what the `data`
stage writes.

Copies in CLIP_benchmark's layout lie on the Hugging Face hub as data sets: its own,
`clip-benchmark/wds_*`, most with a train split, and DataComp's, `djghosh/wds_*_test`, test splits
only. Checked against

- mlfoundations/datacomp: tasklist.yml (sets, classes, sizes, main metrics), download_evalsets.py
  (names of the copies), wilds_eval.py and fairness_eval.py of eval_utils (metrics of groups; FMoW's
  region "Other" is to be left out by its name there, which the numbers in the copy do not have, so
  it counts), aggregate_scores.py (38: those with a metric);
- LAION-AI/CLIP_benchmark: README.md, benchmark/webdatasets.txt (names), and the pages of the copies
  (splits).

The metric is CLIP's own (arXiv 2103.00020, Table 9): the mean over classes for Aircraft, Pets,
Caltech101 and Flowers102, accuracy for the others of the 14; DataComp agrees. WILDS sets have its
metrics: macro F1, accuracy, accuracy of the worst region.

Where these copies differ from CLIP's splits, the paper's numbers are not quite comparable: SUN397
is all 108,754 pictures and has no train split; EuroSAT, Caltech101 and DTD are VTAB's splits.
Birdsnap has no copy.

Class names and templates are those in a set's own files, which are CLIP's. Where a copy of ImageNet
has none, they are open_clip's; both have the same 1,000 names and 80 templates.
"""

import difflib
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from mclip.system.files import plain_path

# where copies of the hub lie unless params.yaml says otherwise: a folder or a link to one
IN_DOMAIN = "in domain"  # the kind of a set whose like was trained on; any other kind is held out
ROOT = "data/sets"
MADE = "data/eval"  # the demo's, an output of the stage `data`


class Entry(NamedTuple):
    """What the registry knows of a set; its name is its key in `SETS`."""

    title: str
    suites: tuple[str, ...]
    source: str  # data set on the Hugging Face hub, or what else makes it
    classes: int | None  # None: retrieval; the demo's: in the default run
    size: int | None  # test pictures; None: depends on params.yaml
    metric: str | None = None  # None: the task's, see params.EvalSet
    kind: str = ""
    groups: int | None = None  # column of KEY.npy that the metric groups by
    captions: str = "each"
    # open_clip's ImageNet names and templates serve it where a copy has none
    imagenet: bool = False
    lacks: str = ""  # why it can't be evaluated here

    @property
    def task(self) -> str:
        return "classification" if self.classes else "retrieval"

    @property
    def folder(self) -> str:
        """Its folder below the root."""
        return self.source.rpartition("/")[2]

    def place(self, root: str | Path = ROOT) -> str:
        """Its path; `root` is where the hub's copies lie."""
        made = "/" not in self.source and not self.lacks
        return str(Path(MADE if made else root) / self.folder)

    @property
    def where(self) -> str:
        """How to get it, for a message."""
        if self.lacks:
            return self.lacks
        if "/" not in self.source:
            return "run `dvc repro data`"
        return f"hf download --repo-type dataset {self.source} --local-dir FOLDER"


CID, DC, ROBUST = ("clip-cid",), ("datacomp",), "robustness"
MEAN = "mean_per_class"


def _hub(name: str, *rest: Any, **more: Any) -> Entry:
    """A copy of CLIP_benchmark's."""
    title, suites, *values = rest
    return Entry(title, suites, f"clip-benchmark/wds_{name}", *values, **more)


def _datacomp(name: str, title: str, *values: Any, **more: Any) -> Entry:
    """A copy of DataComp's."""
    return Entry(title, DC, f"djghosh/wds_{name}_test", *values, **more)


def _robust(name: str, title: str, *values: Any, **more: Any) -> Entry:
    return _hub(name, title, (ROBUST, *DC), *values, kind="robustness", **more)


SETS: dict[str, Entry] = {
    "food101": _hub("food101", "Food-101", CID + DC, 101, 25_250),
    "cifar10": _hub("vtab-cifar10", "CIFAR-10", CID + DC + ("demo",), 10, 10_000),
    "cifar100": _hub("vtab-cifar100", "CIFAR-100", CID + DC, 100, 10_000),
    "birdsnap": Entry(
        "Birdsnap",
        CID,
        "birdsnap",
        500,
        2_149,
        lacks=(
            "no copy in this layout is known; write one by clip_benchmark.webdataset_builder "
            "and give its path"
        ),
    ),
    "sun397": _hub("sun397", "SUN397", CID + DC, 397, 108_754),
    "cars": _hub("cars", "Stanford Cars", CID + DC, 196, 8_041),
    "fgvc_aircraft": _hub("fgvc_aircraft", "FGVC Aircraft", CID + DC, 100, 3_333, MEAN),
    "dtd": _hub("vtab-dtd", "Describable Textures", CID + DC, 47, 1_880),
    "pets": _hub("vtab-pets", "Oxford-IIIT Pet", CID + DC, 37, 3_669, MEAN),
    "caltech101": _hub("vtab-caltech101", "Caltech-101", CID + DC, 102, 6_085, MEAN),
    "flowers": _hub("vtab-flowers", "Oxford Flowers-102", CID + DC, 102, 6_149, MEAN),
    "stl10": _hub("stl10", "STL-10", CID + DC, 10, 8_000),
    "eurosat": _hub("vtab-eurosat", "EuroSAT", CID + DC, 10, 5_400),
    "imagenet1k": _hub("imagenet1k", "ImageNet 1k", CID + DC, 1000, 50_000, imagenet=True),
    "imagenetv2": _robust("imagenetv2", "ImageNet v2", 1000, 10_000, imagenet=True),
    "imagenet-a": _robust("imagenet-a", "ImageNet-A", 200, 7_500),
    "imagenet-r": _robust("imagenet-r", "ImageNet-R", 200, 30_000),
    "imagenet_sketch": _robust("imagenet_sketch", "ImageNet Sketch", 1000, 50_889, imagenet=True),
    "objectnet": _robust("objectnet", "ObjectNet", 113, 18_574),
    "imagenet-o": _hub("imagenet-o", "ImageNet-O", DC, 200, 2_000),
    "clevr_count_all": _hub("vtab-clevr_count_all", "CLEVR Counts", DC, 8, 15_000),
    "clevr_closest_object_distance": _hub(
        "vtab-clevr_closest_object_distance", "CLEVR Distance", DC, 6, 15_000
    ),
    "country211": _hub("country211", "Country211", DC, 211, 21_100),
    "gtsrb": _hub("gtsrb", "GTSRB", DC, 43, 12_630),
    "kitti_closest_vehicle_distance": _hub(
        "vtab-kitti_closest_vehicle_distance", "KITTI Vehicle Distance", DC, 4, 711
    ),
    "mnist": _hub("mnist", "MNIST", DC, 10, 10_000),
    "voc2007": _hub("voc2007", "Pascal VOC 2007", DC, 20, 14_976),
    "pcam": _hub("vtab-pcam", "PatchCamelyon", DC, 2, 32_768),
    "renderedsst2": _hub("renderedsst2", "Rendered SST2", DC, 2, 1_821),
    "resisc45": _hub("vtab-resisc45", "RESISC45", DC, 45, 6_300),
    "svhn": _hub("vtab-svhn", "SVHN", DC, 10, 26_032),
    "flickr30k": _hub("flickr30k", "Flickr30k", DC, None, 1_000),
    "mscoco_captions": _hub("mscoco_captions", "MSCOCO", DC, None, 5_000),
    "winogavil": Entry(
        "WinoGAViL",
        DC,
        "winogavil",
        None,
        3_563,
        "jaccard",
        lacks=(
            "associations scored by the Jaccard index are a task of their own, which "
            "DataComp's evaluate.py has"
        ),
    ),
    "iwildcam": _datacomp("wilds-iwildcam", "iWildCam", 182, 42_791, "f1_macro"),
    "camelyon17": _datacomp("wilds-camelyon17", "Camelyon17", 2, 85_054),
    "fmow": _datacomp("wilds-fmow", "FMoW", 62, 22_108, "worst_group_top1", groups=0),
    "dollar_street": _datacomp(
        "dollar_street", "Dollar Street", 58, 3_503, "worst_group_top5", groups=0
    ),
    "geode": _datacomp("geode", "GeoDE", 40, 12_488, "worst_group_top1", groups=0),
    "emoji-unseen": Entry(
        "Unseen emoji",
        ("demo",),
        "emoji-unseen",
        None,
        None,
        kind="unseen concepts",
        captions="distinct",
    ),  # a concept's pictures share its caption
    "emoji-subgroup": Entry(
        "Unseen emoji by class",
        ("demo",),
        "emoji-subgroup",
        32,
        None,
        MEAN,
        kind="unseen concepts",
    ),  # 10 to 45 pictures a class: top1 is mostly the largest's
    "openmoji-color": Entry(
        "OpenMoji", ("demo",), "openmoji-color", 39, None, MEAN, kind="unseen style"
    ),
    "openmoji-black": Entry(
        "OpenMoji, black lines", ("demo",), "openmoji-black", 39, None, MEAN, kind="unseen style"
    ),
}

SUITES = {
    suite: [name for name, entry in SETS.items() if suite in entry.suites]
    for suite in ("clip-cid", "robustness", "datacomp", "demo")
}


class UnknownSet(ValueError):
    """A name that no set of the registry has; the message suggests the nearest."""


def get(name: str) -> Entry | None:
    return SETS.get(name)


def known(name: str) -> Entry:
    """The entry of a name; UnknownSet where there is none."""
    if name in SETS:
        return SETS[name]
    near = difflib.get_close_matches(name, SETS, 1)
    hint = f"; did you mean {near[0]!r}" if near else ""
    raise UnknownSet(
        f"{name}: not in the registry (`mclip sets` lists it){hint}; any other set needs a path"
    )


def members(names: Iterable[str]) -> list[str]:
    """Names with each suite replaced by its sets, each name once."""
    return list(dict.fromkeys(chain.from_iterable(SUITES.get(name, [name]) for name in names)))


def filled(
    name: str, values: Mapping[str, Any] | str | None, root: str | Path = ROOT
) -> dict[str, Any]:
    """A set's settings, filled up from the registry.

    Parameters
    ----------
    name : of the registry, or any where `values` has a path.
    values : of params.EvalSet, or a path, or None.
    root : where the hub's copies lie; the demo's are in `MADE`.

    Raises
    ------
    UnknownSet : neither a known name nor a path.
    """
    values = {"path": values} if isinstance(values, str) else dict(values or {})
    if isinstance(values.get("path"), str):
        values["path"] = plain_path(values["path"])
    if name not in SETS and "path" in values:
        return values
    entry = known(name)
    settings = {
        "path": entry.place(root),
        "task": entry.task,
        "metric": entry.metric,
        "kind": entry.kind,
        "groups": entry.groups,
        "captions": entry.captions,
    }
    if entry.metric == "jaccard":  # no metric of ours: evaluate lists the set as not evaluated
        del settings["metric"]
    return settings | values
