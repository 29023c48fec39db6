"""mclip.evaluate.tasks: one file a task, found by its name."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision import transforms

from mclip import evaluate
from mclip.data.evalsets import EvalError, read_split
from mclip.evaluate import tasks
from mclip.params import EvalSet, sections

from .sets import png, write_split

MULTILABEL = '''
"""Several classes are right for a picture."""

import torch

from mclip.data.evalsets import Answer, EvalError
from mclip.evaluate.tasks import Scores

TITLE, TEXTS, METRICS, MAIN, PROBE = "multi-label", "classes", ("any_top1",), "any_top1", False
ANSWER = Answer("labels", lambda text: [int(number) for number in text.split()])


def check(split, path):
    if max(map(max, split.answers)) >= len(split.classes):
        raise EvalError(f"{path}: no such class")


def gallery(split):
    return split.classes


def prompts(split, text):
    return [f"a {text} thing"]


def right(split):
    return [[split.classes[i] for i in own] for own in split.answers]


def score(split, spec, images, encode):
    texts = encode([prompts(split, text)[0] for text in split.classes])
    nearest = [(x @ y.T).argmax(1).tolist() for x, y in zip(images, texts)]
    hits = [[i in own for i, own in zip(rows, split.answers)] for rows in nearest]
    share = sum(len(own) for own in split.answers) / len(split.answers) / len(split.classes)
    metrics = [{"any_top1": sum(own) / len(own)} for own in hits]
    return Scores(split.classes, texts, metrics, {"any_top1": share})
'''
CHANNELS = ["red", "green", "blue"]


class MeanColour(torch.nn.Module):
    """A picture by its mean colour, a text by the channel that it names."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def encode_image(self, images, normalize=False):
        return images.mean((2, 3))

    def encode_text(self, tokens, normalize=False):
        return tokens.float()


def tokenizer(texts):
    return torch.tensor([[name in text for name in CHANNELS] for text in texts])


@pytest.fixture
def multilabel(tmp_path, monkeypatch):
    """The task as one file in a folder of its own."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "multilabel.py").write_text(MULTILABEL)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "tasks")])
    yield tasks.get("multilabel")
    del sys.modules["mclip.evaluate.tasks.multilabel"]
    del tasks.multilabel


def write(folder, answers):
    pictures = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 30, 30)]
    write_split(
        folder / "test",
        [
            {"png": png(colour, i), "labels": answer}
            for i, (colour, answer) in enumerate(zip(pictures, answers, strict=True))
        ],
    )
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in CHANNELS))
    return str(folder)


def test_a_task_is_one_file(multilabel, tmp_path):
    path = write(tmp_path / "set", [b"0 1\n", b"1", b"0 1", b" 2 0 "])
    sets = {"mine": EvalSet(path=path, task="multilabel", metric="any_top1", probe=True)}
    result = evaluate.evaluate_many([MeanColour()], transforms.ToTensor(), tokenizer, sets)
    assert result.metrics == [{"mine": {"any_top1": 0.75}}]
    assert result.chance["mine"]["any_top1"] == pytest.approx(7 / 4 / 3)
    assert result.gallery["mine"] == CHANNELS and not result.problems
    assert evaluate.headline(result.metrics[0], sets) == 0.75
    assert evaluate.predictions(result, "mine")[:, 0].tolist() == [0, 1, 2, 0]
    assert multilabel.right(result.splits["mine"])[3] == ["blue", "red"]


def test_what_a_set_of_a_new_task_must_say(multilabel, tmp_path):
    path = write(tmp_path / "set", [b"0 1\n", b"x", b"", b"7"])
    with pytest.raises(ValueError, match="metric: a set of the task multilabel needs one"):
        EvalSet(path=path, task="multilabel")
    for metric, message in [
        ("top1", "metric: top1 is none of multilabel, which has any_top1"),
        ("any_top1", "set: no such class"),
    ]:
        sets = {"mine": EvalSet(path=path, task="multilabel", metric=metric)}
        with pytest.raises(EvalError, match=rf"evaluate\.sets\.mine: .*{message}"):
            evaluate.evaluate_many([MeanColour()], transforms.ToTensor(), tokenizer, sets)
    split = read_split(path, multilabel.ANSWER)
    assert split.answers == [[0, 1], [7]]
    assert ".labels holds 'x', " in split.problems[0]
    assert "its .labels is missing or empty" in split.problems[1]


def test_a_task_goes_with_its_file():
    assert sections.eval_tasks() == tasks.names() == ["classification", "retrieval"]
    with pytest.raises(ValueError, match="task: multilabel is none of classification, retrieval"):
        EvalSet(path="p", task="multilabel", metric="any_top1")
    with pytest.raises(EvalError, match="'multilabel' is none of classification, retrieval"):
        tasks.get("multilabel")


@pytest.mark.slow
def test_params_know_the_tasks_without_torch():
    code = (
        "import sys; from mclip.params.sections import EvalSet, eval_tasks;"
        "EvalSet(path='p', task='retrieval');"
        "print(eval_tasks(), 'torch' in sys.modules, 'mclip.evaluate' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "['classification', 'retrieval'] False False\n"


@pytest.mark.parametrize("name", tasks.names())
def test_the_schemas_defaults_are_the_tasks_own(name):
    task = tasks.get(name)
    allowed = sections.EVAL_METRICS[name]
    assert allowed[0] == task.MAIN and set(allowed) <= set(task.METRICS)


@pytest.mark.parametrize("name", tasks.names())
def test_texts_of_a_split_are_its_right_ones_and_others(name, tmp_path):
    samples = [{"png": png((0, 0, 0)), "cls": b"2", "txt": b"a dog\n\na pet\n"}] * 2
    write_split(tmp_path / "test", samples)
    (tmp_path / "classnames.txt").write_text("cat\ncow\ndog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}\na {c}\n")
    task = tasks.get(name)
    split = read_split(tmp_path, task.ANSWER)
    texts, right, prompts = {
        "classification": (["cat", "cow", "dog"], ["dog"], ["dog", "a dog"]),
        "retrieval": (["a dog", "a pet"], ["a dog", "a pet"], ["dog"]),
    }[name]
    assert task.gallery(split) == texts and task.right(split) == [right] * 2
    assert task.prompts(split, "dog") == prompts
    unread = read_split(tmp_path, None)
    assert unread.places == split.places and unread.answers == []
    assert np.array_equal(split.keys, unread.keys)
