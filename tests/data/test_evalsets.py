"""Evaluation sets as people have them: read, or left out with a line that says why."""

import gzip
import tarfile

import pytest
import torch

from mclip import evaluate
from mclip.data import evalsets
from mclip.data.evalsets import EvalError, read_split, task_of
from mclip.evaluate.named import named_sets
from mclip.evaluate.tasks import classification, retrieval
from mclip.params import EvalSet, registry
from tests.evaluate.sets import png, write_classification, write_retrieval, write_tar
from tests.evaluate.test_evaluate import COLOURS, PREPROCESS, ColourModel, tokenize, write_set


def read(folder):
    return read_split(folder, classification.ANSWER)


def test_pictures_of_equal_names_in_class_folders(tmp_path):
    files, colours = {}, list(COLOURS.values())
    for label, name in enumerate(COLOURS):
        for i in range(4):
            files[f"./{name}/{i}.PNG"] = png(colours[label], noise=i)
            files[f"./{name}/{i}.cls"] = str(label).encode()
        files[f"{name}/._0.png"] = b"a fork that macOS's tar leaves"
    write_set(folder := tmp_path / "set", shards=1)
    write_tar(folder / "test" / "0.tar", files)
    split = read(folder)
    assert len(split.keys) == 12 and not split.problems
    assert split.keys[4] == "./green/0" and split.answers == [0] * 4 + [1] * 4 + [2] * 4
    scores = evaluate.evaluate(
        ColourModel(), PREPROCESS, tokenize, {"s": EvalSet(path=str(folder))}
    )
    assert scores["s"]["top1"] == 1


def test_a_file_that_comes_again_is_named(tmp_path):
    write_set(folder := tmp_path / "set", shards=1)
    with tarfile.open(folder / "test/0.tar", "a") as tar:
        first = tar.getmember("0_red_0.png")
        again = tarfile.TarInfo(first.name)
        tar.addfile(again)
    split = read(folder)
    assert split.problems == [f"{folder}/test/0.tar: 0_red_0.png: again, the first counts"]
    assert split.places[0][1] == first.offset_data


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_gzipped_tars(tmp_path, ending):
    write_set(tmp_path / "plain")
    write_set(folder := tmp_path / "packed")
    for file in (folder / "test").glob("*.tar"):
        data = file.read_bytes()
        file.unlink()
        (file.parent / f"{file.stem}{ending}").write_bytes(gzip.compress(data))
    plain, packed = read(tmp_path / "plain"), read(folder)
    assert packed.answers == plain.answers and not packed.problems
    for i in (3, 0, 20, 5, 23):  # back and forth
        one, other = (evalsets.read_image(split.places[i]) for split in (plain, packed))
        assert one.tobytes() == other.tobytes()
    assert evalsets.same_pictures(plain, packed)
    batches = list(evalsets.batches(packed, PREPROCESS, batch_size=5))
    assert torch.cat([x for _, x, _ in batches]).shape[0] == 24
    broken = folder / "test" / f"1{ending}"
    broken.write_bytes(broken.read_bytes()[:-300])
    problem = read(folder).problems[0]
    assert problem.startswith(f"{broken}: ") and "read " in problem


@pytest.mark.slow
def test_gzipped_tars_from_several_processes(tmp_path):
    write_set(folder := tmp_path / "packed")
    for file in (folder / "test").glob("*.tar"):
        file.write_bytes(gzip.compress(file.read_bytes()))
    split = read(folder)
    evalsets.read_image(split.places[7])  # this process has it open when it forks
    alone = [x for _, x, _ in evalsets.batches(split, PREPROCESS, batch_size=5)]
    forked = [x for _, x, _ in evalsets.batches(split, PREPROCESS, batch_size=5, workers=2)]
    assert all(map(torch.equal, alone, forked))


def test_a_git_lfs_pointer_says_so(tmp_path):
    write_set(folder := tmp_path / "set")
    (folder / "test/1.tar").write_text("version https://git-lfs.github.com/spec/v1\noid ...\n")
    split = read(folder)
    assert len(split.keys) == 12
    assert "1.tar: a Git LFS pointer" in split.problems[0]
    assert "run `git lfs pull`" in split.problems[0]


def test_templates_with_other_places_for_the_name(tmp_path):
    write_set(folder := tmp_path / "set")
    file = folder / "zeroshot_classification_templates.txt"
    file.write_text("a {c}\n\na {} square\n{classname}.\na photo\n")
    split = read(folder)
    assert split.templates == ["a {c}", "a {c} square", "{c}."]
    assert split.problems == [
        f"{file}: 'a photo' has no {{c}}, where the class name goes: left out"
    ]
    assert not read_split(folder, classification.ANSWER, "train").problems  # said once
    file.write_text("a photo of a %s\n")
    with pytest.raises(EvalError, match=r"templates.txt: no line has {c}"):
        read(folder)
    file.write_text("")
    assert read(folder).templates == []


def test_how_a_key_is_made(tmp_path):
    write_set(folder := tmp_path / "set", shards=1)
    red = png(COLOURS["red"])
    write_tar(
        folder / "test/0.tar",
        {"a.png": red, "a.cls": b"0", "b.input.png": red, "b.cls": b"0", "c.cls": b"0"},
    )
    split = read(folder)
    assert split.keys == ["a"]
    assert ".input.png is none: a key ends at the first dot" in split.problems[0]
    assert split.problems[1].endswith("c: no picture (png, jpg, jpeg, webp)")


def test_a_set_of_another_task_says_which(tmp_path):
    samples = [(png((9, 9, 9), i), [f"picture {i}"]) for i in range(3)]
    write_retrieval(folder := tmp_path / "pairs", samples)
    with pytest.raises(EvalError, match=r"no sample has a \.cls, they have \.png, \.txt; task: re"):
        read(folder)
    write_classification(other := tmp_path / "classes", [(png((9, 9, 9)), 0)], ["a"], ["{c}"])
    with pytest.raises(EvalError, match=r"has a \.txt, they have \.cls, \.png; task: classificat"):
        read_split(other, retrieval.ANSWER)


def test_the_task_of_a_folder_without_dataset_type(tmp_path):
    samples = [(png((9, 9, 9), i), [f"picture {i}"]) for i in range(3)]
    write_retrieval(pairs := tmp_path / "pairs", samples)
    (pairs / "dataset_type.txt").unlink()
    write_set(both := tmp_path / "both")  # .cls and .txt
    write_tar(tmp_path / "voc/test/0.tar", {"a.jpg": b"", "a.npy": b""})
    assert [task_of(f) for f in (pairs, both, tmp_path / "voc", tmp_path)] == [
        "retrieval",
        "classification",
        "multilabel",
        "classification",
    ]
    assert named_sets([str(pairs)])["pairs"].task == "retrieval"
    with pytest.raises(EvalError, match="voc: its samples say 'multilabel', which is none of cl"):
        named_sets([str(tmp_path / "voc")])


def test_two_sets_of_one_folder_name_are_two(tmp_path):
    folders = [write_set(tmp_path / side / "colours") for side in ("a", "b")]
    names = [str(folder) for folder in folders]
    sets = named_sets([*names, f"{names[0]}/."])
    assert {name: spec.path for name, spec in sets.items()} == {
        "colours": names[0],
        names[1]: names[1],
    }
    scores = evaluate.evaluate(ColourModel(), PREPROCESS, tokenize, sets)
    assert scores["colours"]["top1"] == scores[names[1]]["top1"] == 1


def test_a_home_and_a_file_url_are_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert registry.filled("mine", "~/sets/mine")["path"] == "/home/me/sets/mine"
    assert registry.filled("pets", {"path": "file:///sets/pets"})["path"] == "/sets/pets"
