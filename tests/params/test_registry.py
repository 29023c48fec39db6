"""mclip.params.registry, the sets of params.yaml by name, missing sets, and the command
`mclip evaluate`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mclip import cli, evaluate, models, params
from mclip.data.evalsets import read_split
from mclip.evaluate import suite, tasks
from mclip.evaluate.named import named_sets
from mclip.evaluate.tasks import classification
from mclip.params import EvalSet, ParamsError, registry
from tests.evaluate.sets import png, write_classification, write_split

ROOT = Path(__file__).parents[2]


def test_suites_are_as_large_as_the_papers_say():
    assert {suite: len(names) for suite, names in registry.SUITES.items()} == {
        "clip-cid": 14,
        "robustness": 5,
        "datacomp": 38,
        "demo": 5,
    }
    assert {
        n for n in registry.SUITES["clip-cid"] if registry.SETS[n].metric == "mean_per_class"
    } == {"fgvc_aircraft", "pets", "caltech101", "flowers"}
    assert set(registry.SUITES["robustness"]) < set(registry.SUITES["datacomp"])
    assert [
        n
        for n in registry.SUITES["datacomp"]
        if registry.SETS[n].task == "retrieval" and not registry.SETS[n].lacks
    ] == ["flickr30k", "mscoco_captions"]


@pytest.mark.parametrize("name", registry.SETS)
def test_every_entry_is_a_valid_set(name):
    spec = EvalSet(**registry.filled(name, None))
    entry = registry.SETS[name]
    assert spec.task == entry.task and (
        entry.lacks or spec.metric == (entry.metric or tasks.get(entry.task).MAIN)
    )
    assert spec.captions == ("distinct" if name == "emoji-unseen" else "each")
    assert entry.where and (entry.source.count("/") == 1 or entry.lacks or "demo" in entry.suites)


def test_params_take_a_name_a_path_or_both():
    tree = params.read_yaml(ROOT / "params.yaml")
    tree["ablations"] |= {"pca": None, "search": None}  # which name the default's sets
    tree["evaluate"]["sets"] = {
        "pets": None,
        "flowers": {"probe": True},
        "mine": "some/folder",
        "fmow": {"kind": "far"},
    }
    sets = params.check(tree).evaluate.sets
    assert (
        sets["pets"].path == "data/sets/wds_vtab-pets" and sets["pets"].metric == "mean_per_class"
    )
    assert (
        sets["flowers"].probe
        and sets["mine"].path == "some/folder"
        and sets["mine"].metric == "top1"
    )
    assert (sets["fmow"].metric, sets["fmow"].groups, sets["fmow"].kind) == (
        "worst_group_top1",
        0,
        "far",
    )
    values = params.check(tree).model_dump(by_alias=True, mode="json")
    picked = params.stage(params.pick(values, ["evaluate.sets"]))  # what the report's stage sees
    assert picked.evaluate.sets == sets
    for wrong, message in [
        ({"pet": None}, r"evaluate\.sets: pet: not in the registry .*did you mean 'pets'"),
        ({"x": {"path": "p", "metric": "mean_r1"}}, "metric: mean_r1 is none of classification"),
        ({"x": {"path": "p", "metric": "worst_group_top1"}}, "needs groups"),
        ({"x": {"path": "p", "task": "vqa"}}, "task: vqa is none of classification, retrieval"),
    ]:
        tree["evaluate"]["sets"] = wrong
        with pytest.raises(ParamsError, match=message):
            params.check(tree)


@pytest.mark.skipif(
    not (ROOT / "data/eval/cifar10").is_dir(), reason="the default data are not here"
)
def test_the_default_sets_lie_in_the_registrys_layout():
    for name, spec in params.load(ROOT / "params.yaml").evaluate.sets.items():
        split = read_split(ROOT / spec.path, tasks.get(spec.task).ANSWER)
        assert split.keys and not split.problems and name in registry.SUITES["demo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    models.export(models.create("demo-student")[0], folder)
    return f"local-dir:{folder}"


def sample(label, noise):
    return png(np.random.default_rng(label).integers(30, 226, 3), noise), label


def test_the_command_line(model, tmp_path, capsys):
    root = tmp_path / "sets"
    write_classification(
        root / "wds_vtab-pets",
        [sample(i % 37, i) for i in range(74)],
        [f"pet {i}" for i in range(37)],
        ["a {c}"],
    )
    write_classification(
        root / "mine", [sample(i % 3, i) for i in range(9)], ["a", "b", "c"], ["{c}"]
    )
    out = tmp_path / "scores.json"
    argv = [
        "evaluate",
        model,
        "--sets",
        "pets",
        str(root / "mine"),
        "winogavil",
        "food101",
        "--root",
        str(root),
        "--out",
        str(out),
    ]
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    assert (
        said.out.splitlines()[0].split()[:2] == ["pets", "mean_per_class"]
        and "mean of the main metric over 2" in said.out
    )
    assert (
        f"food101: {root}/wds_food101 is missing, not evaluated (hf download --repo-type dataset clip-benchmark/wds_food101"
        in said.err
    )
    assert "winogavil" in said.err and "Jaccard" in said.err
    tree = json.loads(out.read_text())
    assert set(tree["sets"]) == {"pets", "mine"} and len(tree["problems"]) == 2
    assert tree["sets"]["pets"]["mean_per_class"] == pytest.approx(
        tree["sets"]["pets"]["top1"]
    )  # two pictures each
    multilabel = tmp_path / "multilabel"
    multilabel.mkdir()
    (multilabel / "dataset_type.txt").write_text("multilabel\n")
    for wrong, message in [
        (
            [model, "--sets", "pest"],
            "error: --sets: pest: not in the registry (`mclip sets` lists it); did you mean 'pets'",
        ),
        (["ViT-B-33", "--sets", "demo"], "error: MODEL: ViT-B-33: "),
        ([model, "--sets", str(tmp_path)], "nshards.txt is missing"),
        (
            [model, "--sets", str(multilabel)],
            "dataset_type.txt: 'multilabel' is none of classification, retrieval",
        ),
    ]:
        assert cli.main(["evaluate", *wrong]) == 2
        said = capsys.readouterr()
        assert (
            message in said.err
            and said.err.strip().splitlines()[-1].startswith("mclip evaluate: error: ")
            and not said.out
        )


def test_the_demo_s_part_of_a_set_counts_where_there_is_no_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "openmoji-color"):
        (tmp_path / "data/eval" / name).mkdir(parents=True)
    sets = named_sets(["cifar10", "openmoji-color", "pets"])
    assert [s.path for s in sets.values()] == [
        "data/eval/cifar10",
        "data/eval/openmoji-color",
        "data/sets/wds_vtab-pets",
    ]
    (tmp_path / "data/sets/wds_vtab-cifar10").mkdir(parents=True)
    assert named_sets(["cifar10"])["cifar10"].path == "data/sets/wds_vtab-cifar10"


def test_imagenets_names_where_a_copy_has_none(tmp_path):
    write_split(
        tmp_path / "wds_imagenet1k" / "test",
        [{"png": sample(1, i)[0], "cls": str(i).encode()} for i in (0, 999)],
        1,
    )
    copy = tmp_path / "wds_imagenet1k"
    split = suite._named_classes("imagenet1k", read_split(copy, classification.ANSWER))
    assert (len(split.classes), split.classes[0], len(split.templates)) == (1000, "tench", 80)
    assert all(t.count("{c}") == 1 for t in split.templates)
    (copy / "classnames.txt").write_text("own\n")
    split = suite._named_classes("imagenet1k", read_split(copy, classification.ANSWER))
    assert split.classes == ["own"]


class Bright(torch.nn.Module):
    """Sees how bright a picture is; class 0 is dark, 1 is bright, others are never named."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def encode_image(self, images, normalize=False):
        mean = images.mean((1, 2, 3))
        return torch.stack([1 - mean, mean], 1)

    def encode_text(self, tokens, normalize=False):
        return tokens.float()


def test_groups_f1_and_a_missing_train_split(tmp_path):
    def npy(*values):
        import io

        buffer = io.BytesIO()
        np.save(buffer, np.array(values))
        return buffer.getvalue()

    # region 7: 3 of 4 right; region 2: 1 of 3; region 5: all of 2
    samples = [
        (0, 0, 7),
        (0, 0, 7),
        (1, 1, 7),
        (1, 0, 7),
        (0, 1, 2),
        (1, 0, 2),
        (1, 1, 2),
        (0, 0, 5),
        (1, 1, 5),
    ]
    files = [
        {"png": png([220 * seen + 15] * 3, i), "cls": str(label).encode(), "npy": npy(9, region)}
        for i, (label, seen, region) in enumerate(samples)
    ]
    files.append({"png": png([0, 0, 0]), "cls": b"0", "npy": npy(1)})
    folder = tmp_path / "set"
    write_split(folder / "test", files)
    (folder / "classnames.txt").write_text("dark\nbright\n")
    from torchvision import transforms

    def tokenizer(texts):
        return torch.tensor([[1, 0] if "dark" in t else [0, 1] for t in texts])

    sets = {
        "a": EvalSet(path=str(folder), metric="worst_group_top1", groups=1, probe=True),
        "b": EvalSet(path=str(folder), metric="f1_macro"),
    }
    result = evaluate.evaluate_many([Bright()], transforms.ToTensor(), tokenizer, sets)
    found = result.metrics[0]
    assert found["a"]["worst_group_top1"] == pytest.approx(1 / 3) and found["a"][
        "top1"
    ] == pytest.approx(6 / 9)
    assert any("no .npy with a column 1" in p for p in result.problems)
    assert f"a: {folder}/train is missing: no linear probe" in result.problems
    # with the tenth, dark and seen as dark: dark 4 of 5 named 6 times, bright 3 of 5 named 4 times
    assert found["b"]["f1_macro"] == pytest.approx((2 * 4 / (5 + 6) + 2 * 3 / (5 + 4)) / 2)
    assert evaluate.headline(found, sets) == pytest.approx((1 / 3 + found["b"]["f1_macro"]) / 2)
    evaluate.write("r", result, sets, [0], tmp_path)
    from mclip.data.stores import metrics
    from mclip.report import compare

    main = compare.main_metric(metrics.read_seeds(["r"], tmp_path)[0]).set_index("set")["value"]
    assert main["a"] == pytest.approx(1 / 3, abs=1e-5) and main["b"] == pytest.approx(
        found["b"]["f1_macro"], abs=1e-5
    )
