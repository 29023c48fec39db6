"""mclip.evaluate and mclip.evaluate.metrics against plain loops, on a tiny set in CLIP_benchmark's
layout.
"""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import transforms

from mclip import evaluate
from mclip.data import evalsets
from mclip.evaluate import fewshot, metrics
from mclip.evaluate.tasks import classification, retrieval
from mclip.params import EvalSet

from .sets import png, unit, write_tar

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def write_set(folder, *, shards: int = 2, per_class: int = 4):
    """Three colours; both .cls and .txt, where pictures of a class share a caption."""
    for split in ("train", "test"):
        for shard in range(shards):
            files = {}
            for label, (name, colour) in enumerate(COLOURS.items()):
                for i in range(per_class):
                    key = f"{shard}_{name}_{i}"
                    files[f"{key}.png"] = png(
                        colour, noise=100 * shard + i + 50 * (split == "train")
                    )
                    files[f"{key}.cls"] = str(label).encode()
                    files[f"{key}.txt"] = f"{name}\na {name} square\n".encode()
            write_tar(folder / split / f"{shard}.tar", files)
        (folder / split / "nshards.txt").write_text(f"{shards}\n")
    (folder / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} square\n{c}\n")
    return folder


class ColourModel(torch.nn.Module):
    """Embeds a picture by its mean colour and a text by the colour it names."""

    def __init__(self, turn: float = 0.0):
        super().__init__()
        self.turn = torch.nn.Parameter(torch.tensor(turn))

    def encode_image(self, images, normalize=False):
        mean = images.mean((2, 3)) - 0.35
        return mean.roll(1, 1) if self.turn > 0 else mean

    def encode_text(self, tokens, normalize=False):
        return F.one_hot(tokens[:, 0], 3).float() + 0.01 * tokens[:, 1:]


def tokenize(texts) -> torch.Tensor:
    names = list(COLOURS)
    return torch.tensor([[next(i for i, n in enumerate(names) if n in t), len(t)] for t in texts])


PREPROCESS = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])


# ---------------------------------------------------------------- metrics against loops


def test_ranks_against_loops():
    rng = np.random.default_rng(0)
    queries, gallery = unit(rng, 23), unit(rng, 11)
    gallery[7] = gallery[2]  # a tie: the earlier one comes first
    pairs = np.unique(np.stack([rng.integers(0, 23, 40), rng.integers(0, 11, 40)], 1), axis=0)
    pairs = np.unique(np.concatenate([pairs, [[i, i % 11] for i in range(23)]]), axis=0)
    expected = []
    for q in range(23):
        right = {g for a, g in pairs if a == q}
        similarity = (queries[q] @ gallery.T).numpy()
        best = max(similarity[g] for g in right)
        first = min(g for g in right if similarity[g] == best)
        expected.append(
            sum(
                similarity[g] > best or (similarity[g] == best and g < first)
                for g in set(range(11)) - right
            )
        )
    for chunk in (1, 7, 23, 100):  # an uneven last chunk too
        assert (
            metrics.ranks(
                queries, gallery, pairs[rng.permutation(len(pairs))], chunk=chunk
            ).tolist()
            == expected
        )


def test_classification_against_loops():
    rng = np.random.default_rng(1)
    images, classes, labels = (
        unit(rng, 50),
        unit(rng, 9),
        rng.integers(0, 8, 50),
    )  # class 8 has no picture
    order = np.argsort(-(images @ classes.T).numpy(), axis=1)
    top1 = [order[i, 0] == labels[i] for i in range(50)]
    got = classification.accuracy(images, classes, labels.tolist())
    assert got["top1"] == pytest.approx(np.mean(top1))
    assert got["top5"] == pytest.approx(np.mean([labels[i] in order[i, :5] for i in range(50)]))
    per_class = [
        np.mean([t for t, y in zip(top1, labels, strict=True) if y == c]) for c in np.unique(labels)
    ]
    assert got["mean_per_class"] == pytest.approx(np.mean(per_class))


def test_retrieval_shared_captions_against_loops():
    rng = np.random.default_rng(2)
    captions = [[f"text {rng.integers(0, 6)}", f"text {rng.integers(0, 6)}"] for _ in range(30)]
    texts, pairs = retrieval.caption_pairs(captions)
    assert len(set(texts)) == len(texts)
    images, embedded = unit(rng, 30), unit(rng, len(texts))
    got = retrieval.recall(images, embedded, pairs, ks=(1, 3))
    similarity = (images @ embedded.T).numpy()
    for k in (1, 3):
        to_text = [
            any(texts[t] in captions[i] for t in np.argsort(-similarity[i])[:k])
            for i in range(len(captions))
        ]
        to_image = [
            any(text in captions[i] for i in np.argsort(-similarity[:, t])[:k])
            for t, text in enumerate(texts)
        ]
        assert got[f"i2t_r{k}"] == pytest.approx(np.mean(to_text))
        assert got[f"t2i_r{k}"] == pytest.approx(np.mean(to_image))


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen = max(
            self.seen, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0
        )
        return out


@pytest.mark.slow
def test_similarities_are_never_held_all_at_once():
    rng = np.random.default_rng(6)
    n = 4200  # n x n is more than AT_ONCE
    queries, gallery = unit(rng, n, 2), unit(rng, n, 2)
    pairs = np.stack([np.arange(n)] * 2, 1)
    with Largest() as largest:
        rank, row = metrics.ranks(queries, gallery, pairs), metrics.nearest(queries, gallery)
    assert 0 < largest.seen <= metrics.AT_ONCE < n * n
    last = queries[-1:] @ gallery.T  # of the uneven last chunk
    assert rank[-1] == (last > last[0, -1]).sum() and row[-1] == last.argmax()


def test_collapsed_model_scores_chance():
    same = F.normalize(torch.ones(6, 4), dim=-1)
    assert classification.accuracy(same, same, list(range(6)))["top1"] == 1 / 6
    assert retrieval.recall(same, same, np.stack([np.arange(6)] * 2, 1), ks=(1, 5))[
        "i2t_r5"
    ] == pytest.approx(5 / 6)


def test_chance_is_what_random_features_score():
    rng = np.random.default_rng(3)
    captions = [[f"t{i % 40}"] for i in range(120)]
    _, pairs = retrieval.caption_pairs(captions)
    chance = retrieval.chance(pairs)
    assert chance["i2t_r1"] == pytest.approx(1 / 40)
    assert chance["t2i_r1"] == pytest.approx(3 / 120)
    runs = [retrieval.recall(unit(rng, 120, 64), unit(rng, 40, 64), pairs) for _ in range(60)]
    for name, value in chance.items():
        assert np.mean([r[name] for r in runs]) == pytest.approx(value, abs=0.035)
    assert classification.chance(10)["top5"] == 0.5
    assert "top5" not in classification.chance(5)
    assert retrieval.chance(np.array([[0, 0], [1, 1]]))["i2t_r10"] == 1  # more draws than captions


# ---------------------------------------------------------------- sets


def test_evaluate_many_on_a_tiny_set(tmp_path):
    folder = write_set(tmp_path / "colours")
    sets = {
        "colours": EvalSet(path=str(folder), task="classification", probe=True, kind="in domain"),
        "captions": EvalSet(path=str(folder), task="retrieval", captions="distinct", kind="unseen"),
    }
    result = evaluate.evaluate_many(
        [ColourModel(), ColourModel(turn=1.0)],
        PREPROCESS,
        tokenize,
        sets,
        batch_size=7,
        probe_c=[1.0],
    )
    right, wrong = result.metrics
    assert right["colours"] == {"top1": 1.0, "mean_per_class": 1.0, "probe_top1": 1.0}
    assert wrong["colours"]["top1"] == 0.0 and wrong["colours"]["probe_top1"] == 1.0
    assert right["captions"]["i2t_r1"] == right["captions"]["t2i_r1"] == 1.0
    assert wrong["captions"]["i2t_r1"] == 0.0
    assert result.problems == []
    assert result.chance["colours"] == pytest.approx(
        {"top1": 1 / 3, "mean_per_class": 1 / 3, "probe_top1": 1 / 3}
    )
    assert result.chance["captions"]["i2t_r1"] == pytest.approx(2 / 6)  # two right captions of six
    assert [tuple(x.shape) for x in result.images["colours"]] == [(24, 3)] * 2
    assert result.scale == [100.0, 100.0] and result.gallery["colours"] == list(COLOURS)
    shots = fewshot.curves(
        result, shots=(1, 2)
    )  # the second model's texts are wrong, its pictures are not
    assert shots.groupby(["model", "method"])["shots"].apply(list).to_dict() == {
        (i, m): k
        for i in (0, 1)
        for m, k in (("zero-shot", [0]), ("Tip-Adapter", [1, 2]), ("APE", [1, 2]))
    }
    assert set(shots["set"]) == {"colours"} and (shots.loc[shots["model"] == 0, "value"] == 1).all()
    assert shots.loc[(shots["model"] == 1) & (shots["shots"] == 0), "value"].item() == 0
    single = evaluate.evaluate(
        ColourModel(), PREPROCESS, tokenize, sets, batch_size=100, probe_c=[1.0]
    )
    assert single == right  # one process or two, any batch size


def test_pictures_that_two_sets_share_are_encoded_once_and_score_as_alone(tmp_path, monkeypatch):
    """Two folders with the same pictures, one of them broken; a third differs in one byte of one
    picture.
    """
    for name in ("one", "two", "three"):
        folder = write_set(tmp_path / name)
        path = folder / "test" / "1.tar"
        data, size = path.read_bytes(), len(png(COLOURS["blue"], noise=102))
        at = evalsets.read_split(folder, classification.ANSWER).places[-2][1]
        assert size == evalsets.read_split(folder, classification.ANSWER).places[-2][2]
        path.write_bytes(data[:at] + b"-" * size + data[at + size :])
        if name == "three":
            path.write_bytes(data)
    sets = {
        "one": EvalSet(path=str(tmp_path / "one"), probe=True),
        "two": EvalSet(path=str(tmp_path / "two"), task="retrieval", captions="distinct"),
        "three": EvalSet(path=str(tmp_path / "three")),
    }
    model, seen = ColourModel(), []
    encode, split_up = model.encode_image, []
    monkeypatch.setattr(
        model, "encode_image", lambda images: (seen.append(len(images)), encode(images))[1]
    )
    options = {"batch_size": 9, "probe_c": [1.0]}
    result = evaluate.evaluate_many(
        [model, ColourModel(1.0)],
        PREPROCESS,
        lambda texts: (split_up.append(texts), tokenize(texts))[1],
        sets,
        **options,
    )
    assert (
        sum(seen) == 23 + 24 + 24 and len(split_up) == 1
    )  # one, its train split, three; texts for both models
    for name, spec in sets.items():
        alone = evaluate.evaluate_many(
            [ColourModel(), ColourModel(1.0)], PREPROCESS, tokenize, {name: spec}, **options
        )
        assert [m[name] for m in result.metrics] == [m[name] for m in alone.metrics]
        assert result.splits[name] == alone.splits[name]
        assert all(map(torch.equal, result.images[name], alone.images[name]))
        assert [line for line in result.problems if line.startswith(f"{name}:")] == alone.problems
    assert [len(result.splits[name].keys) for name in sets] == [23, 23, 24]
    assert [
        f"{tmp_path / name}/test/1.tar" in line
        for name, line in zip(("one", "two"), result.problems, strict=True)
    ] == [True, True]


def test_prompt_ensemble_is_the_mean_of_unit_norm_prompts():
    model = ColourModel()
    split = evalsets.Split([], [], [], ["red", "blue"], ["{c}", "a {c} square"], [], [])
    texts = evaluate.prompts(split)
    assert texts == ["red", "a red square", "blue", "a blue square"]
    got = evaluate.class_features(F.normalize(model.encode_text(tokenize(texts)), dim=-1), 2)
    for row, name in zip(got, ["red", "blue"], strict=True):
        prompts = F.normalize(model.encode_text(tokenize([name, f"a {name} square"])), dim=-1)
        assert torch.allclose(row, F.normalize(prompts.mean(0), dim=-1).detach(), atol=1e-6)


def test_problems_are_named_and_nothing_else_is_lost(tmp_path):
    folder = write_set(tmp_path / "bad", shards=1)
    good = {"a.png": png((220, 30, 30)), "a.cls": b"0"}
    files = good | {"b.png": b"no picture", "b.cls": b"1", "c.png": png((0, 0, 0)), "d.cls": b"1"}
    files |= {
        "e.png": png((0, 0, 0)),
        "e.cls": b"cat",
        "f.png": png((0, 0, 0)),
        "f.cls": "²".encode(),
        "g.png": png((0, 0, 0)),
        "g.cls": b"\xff",
        "h.png": png((0, 0, 0)),
        "h.cls": b" \n",
    }
    write_tar(folder / "test" / "1.tar", files)
    data = (folder / "test" / "0.tar").read_bytes()
    (folder / "test" / "2.tar").write_bytes(data[: len(data) // 2 + 100])
    (folder / "test" / "nshards.txt").write_text("4")
    sets = {
        "bad": EvalSet(path=str(folder), task="classification"),
        "gone": EvalSet(path=str(tmp_path / "nowhere"), task="retrieval"),
    }
    result = evaluate.evaluate_many([ColourModel()], PREPROCESS, tokenize, sets)
    text = "\n".join(result.problems)
    for part in (
        "b: picture can't be read",
        "c: its .cls is missing or empty",
        "h: its .cls is missing or empty",
        "g: its .cls is not UTF-8",
        "f: .cls holds '²', not a class number",
        "d: no picture",
        "e: .cls holds 'cat'",
        "2.tar: ",
        "3.tar: missing",
        "gone: ",
        "nowhere is missing",
    ):
        assert part in text, part
    assert result.metrics[0]["gone"] == {} and result.metrics[0]["bad"]["top1"] == 1.0
    assert len(result.splits["bad"].keys) >= 13  # all of shard 0, the good one of shard 1
    with pytest.warns(UserWarning, match="nowhere is missing"):
        evaluate.evaluate(ColourModel(), PREPROCESS, tokenize, {"gone": sets["gone"]})


def test_unusable_sets_say_what_to_mend(tmp_path):
    folder = write_set(tmp_path / "set", shards=1)
    (folder / "classnames.txt").write_text("red\n")
    spec = EvalSet(path=str(folder), task="classification")
    with pytest.raises(
        evalsets.EvalError, match=r"evaluate.sets.x: .*classnames.txt: 1 classes.* up to 2"
    ):
        evaluate.evaluate(ColourModel(), PREPROCESS, tokenize, {"x": spec})
    (folder / "classnames.txt").write_bytes(b"red\nvert fonc\xe9\n")
    with pytest.raises(evalsets.EvalError, match=r"evaluate.sets.x: .*classnames.txt: not UTF-8"):
        evaluate.evaluate(ColourModel(), PREPROCESS, tokenize, {"x": spec})
    (folder / "classnames.txt").write_text("\nred\nblue\n\n")
    assert evalsets.read_split(folder, classification.ANSWER).classes == [
        "",
        "red",
        "blue",
    ]  # the first has no name
    (folder / "test" / "nshards.txt").write_text("one\n")
    with pytest.raises(
        evalsets.EvalError, match=r"nshards.txt: expected a number of shards, found 'one'"
    ):
        evaluate.evaluate(ColourModel(), PREPROCESS, tokenize, {"x": spec})
    (folder / "test" / "nshards.txt").unlink()
    with pytest.raises(evalsets.EvalError, match=r"nshards.txt is missing"):
        evaluate.evaluate(ColourModel(), PREPROCESS, tokenize, {"x": spec})


def test_what_is_shown_of_sets_that_are_not_here(tmp_path, capsys):
    write_set(tmp_path / "b")
    write_set(tmp_path / "c")
    sets = {
        name: EvalSet(path=str(tmp_path / name), task=task)
        for name, task in (
            ("a", "retrieval"),
            ("b", "classification"),
            ("c", "retrieval"),
            ("d", "classification"),
        )
    }
    assert evalsets.at_hand("c", sets) == "c" and not capsys.readouterr().out
    assert evalsets.at_hand("a", sets) == "c"
    assert capsys.readouterr().out == f"a is not here ({tmp_path / 'a'}), c takes its place\n"
    assert evalsets.at_hand("a", sets, "classification") == "b"
    del sets["c"]
    assert evalsets.at_hand("a", sets) == "b"  # of another task, where no other set is here
    with pytest.raises(
        evalsets.EvalError,
        match=r"a is not here .*, nor is any other retrieval set.*mclip sets",
    ):
        evalsets.at_hand("a", sets, "retrieval")


def test_transparent_pictures_lie_on_white_in_the_order_of_the_tar(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(buffer, "PNG")
    write_tar(
        tmp_path / "test" / "0.tar",
        {"k.png": buffer.getvalue(), "k.txt": b"x", "l.png": png((0, 0, 0)), "l.txt": b"y"},
    )
    (tmp_path / "test" / "nshards.txt").write_text("1")
    split = evalsets.read_split(tmp_path, retrieval.ANSWER)
    assert split.keys == ["k", "l"] and split.answers == [["x"], ["y"]]
    ((indices, pictures, broken),) = evalsets.batches(split, PREPROCESS)
    assert indices == [0, 1] and not broken
    assert pictures[0].min() == 1.0 and pictures[1].max() < 0.2


def test_summary_and_headline():
    sets = {
        "home": EvalSet(path="a", task="classification", kind="in domain"),
        "away": EvalSet(path="b", task="classification", kind="unseen"),
        "pairs": EvalSet(path="c", task="retrieval", kind="unseen"),
        "gone": EvalSet(path="d", task="retrieval", kind="unseen"),
    }
    runs = [
        {
            "home": {"top1": 0.9},
            "away": {"top1": 0.2 + x},
            "pairs": {"mean_r1": 0.4},
            "gone": {},
        }
        for x in (0.0, 0.2)
    ]
    assert evaluate.headline(runs[0], sets) == pytest.approx((0.2 + 0.4) / 2)
    out = evaluate.summary(runs, sets)
    assert out["mean"] == {"mean": 0.35, "std": pytest.approx(0.07071, abs=1e-5), "sets": 2}
    assert out["away"]["top1"] == {"mean": 0.3, "std": pytest.approx(0.14142, abs=1e-5)}
    assert "gone" not in out
    json.dumps(out)
