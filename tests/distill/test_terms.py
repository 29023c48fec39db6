"""The terms of a recipe's loss: a file in mclip/distill/terms is all that a new one takes."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from mclip.distill import plan, terms, trainer
from mclip.params import Recipe
from tests.world import TRAIN

TOY = '''
"""How far the student's picture is from a point that it learns."""

from mclip.distill import terms


class Options(terms.Options):
    power: int = 2


class Toy(terms.Term):
    title = "a toy"
    options = Options
    needs = frozenset({"teacher", "label"})

    def build(self):
        import torch

        point = torch.nn.Module()
        point.at = torch.nn.Parameter(torch.zeros(self.given.student_dim))
        return point

    def learning_rates(self, train):
        return {"at": 3 * train.lr}

    def loss(self, batch, logit_scale):
        assert batch["teacher_image"].shape == (len(batch["image"]), 5)
        return (batch["image"] - self.learned.at).abs().pow(self.chosen.power).mean()
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A file terms/toy.py, beside those of the package."""
    (tmp_path / "terms").mkdir()
    (tmp_path / "terms" / "toy.py").write_text(TOY)
    monkeypatch.setattr(terms, "__path__", [*terms.__path__, str(tmp_path / "terms")])
    yield
    sys.modules.pop("mclip.distill.terms.toy", None)
    vars(terms).pop("toy", None)


def test_a_new_loss_is_a_file_and_its_keys(toy, student, training_set, tmp_path):
    recipe = Recipe.model_validate(
        {"title": "toy", "pairs": "kept", "weight": {"clip": 1.0, "toy": 0.5}, "toy": {"power": 4}}
    )
    assert recipe.weight["toy"] == 0.5 and recipe.weight["cluster"] == 0 and recipe.toy.power == 4
    assert Recipe.model_validate(recipe.model_dump(by_alias=True)) == recipe
    data = {name: getattr(training_set("kept"), name) for name in ("pairs", "balance", "clusters")}
    data |= {name: getattr(training_set("kept"), name) for name in ("embeddings", "cache")}
    (run,) = plan.runs_of(
        "toy",
        recipe,
        student,
        TRAIN.model_copy(update={"samples": 8}),
        [0],
        teacher="large",
        data=data,
        cache=tmp_path,
    )
    assert run.data.teacher == "large"  # because the term needs it
    model = trainer.models.create(student)[0]
    together = trainer.Together(model, trainer._objective(run, model, []))
    *_, own = trainer.parameter_groups(together, TRAIN)
    assert own["peak"] == 3 * TRAIN.lr and own["weight_decay"] == 0 and len(own["params"]) == 1
    trainer.train(run)
    (row,) = plan.history([run]).to_dict("records")
    assert row["toy"] > 0 and row["loss"] == pytest.approx(row["clip"] + row["toy"], rel=1e-4)


def test_its_names_and_options_are_checked(toy):
    recipe = {"title": "toy", "pairs": "kept", "weight": {"toy": 1.0}}
    assert Recipe.model_validate(recipe).toy.power == 2
    with pytest.raises(ValidationError, match=r"weight\.tyo\n  unknown key; did you mean 'toy'"):
        Recipe.model_validate(recipe | {"weight": {"tyo": 1.0}})
    with pytest.raises(ValidationError, match=r"toy\.pwoer\n  unknown key; did you mean 'power'"):
        Recipe.model_validate(recipe | {"toy": {"pwoer": 1}})
    with pytest.raises(ValidationError, match=r"^1 validation(?s:.*)tyo\n  unknown key; did you"):
        Recipe.model_validate(recipe | {"tyo": {}})
    with pytest.raises(ValidationError, match=r"pairs: kept is needed for weight\.toy"):
        Recipe.model_validate(recipe | {"pairs": "all"})


@pytest.mark.slow
def test_terms_say_what_they_are_without_torch():
    code = "import sys; from mclip import params; from mclip.distill import terms; params.load()"
    code += "; assert len(terms.every()) >= 4; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_term_says_all_about_itself():
    for name, term in terms.every().items():
        assert Path(sys.modules[term.__module__].__file__).stem == name
        assert term.title and sys.modules[term.__module__].__doc__
        assert term.needs <= {"teacher", "label", "ensemble"}
        assert term.options is None or term.options()  # every key has a default


@pytest.mark.parametrize("mixed", [0.0, 0.3, 1.0])
def test_lambda_mixes_clip_and_affinity(mixed):
    weight = {"clip": 2.0, "affinity": 3.0}
    recipe = {"title": "-", "pairs": "kept", "reinforced": True, "weight": weight, "lambda": mixed}
    from mclip.distill.objective import Objective

    want = {"clip": 2 * (1 - mixed), "affinity": 3 * mixed}
    found = Objective(Recipe.model_validate(recipe), 4).weights
    assert found == pytest.approx({name: w for name, w in want.items() if w})
    recipe["weight"] = {"clip": 2.0}
    assert Objective(Recipe.model_validate(recipe), 4).weights == {"clip": 2.0}


def test_weights_are_those_of_the_terms():
    weight = Recipe(title="-", pairs="kept", reinforced=True, weight={"affinity": 1.0}).weight
    assert list(weight) == [
        "clip",
        "cluster",
        "instance",
        "affinity",
        "feature",
    ]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(None, (10.0, 20.0)), (60, (60.0, 60.0)), ({"large": 70}, (10.0, 70.0))],
)
def test_affinity_by_the_teachers_scales(scale, expected):
    import torch

    from mclip.distill.terms.affinity import Affinity, Options
    from mclip.losses import affinity_loss
    from tests.world import unit

    teachers = [
        {"name": "base", "slice": [0, 6], "logit_scale": 10.0},
        {"name": "large", "slice": [6, 11], "logit_scale": 20.0},
    ]
    given = terms.Given(7, teachers, None, 0, "plain", None)
    image, text = (unit(4, 7, seed=i).double() for i in (0, 1))
    rows = [[unit(4, w, seed=w + i).double() for w in (6, 5)] for i in (2, 3)]
    batch = {"image": image, "text": text}
    batch |= {"ensemble_image": torch.cat(rows[0], 1), "ensemble_text": torch.cat(rows[1], 1)}
    want = affinity_loss(image, text, list(zip(*rows, expected, strict=True)), 14.0)
    found = Affinity(Options(scale=scale), given).loss(batch, 14.0)
    assert found == pytest.approx(want.item(), rel=1e-12)


def of_teacher(width: int, clusters: int = 3) -> tuple[terms.Given, dict]:
    """What a run and a batch of four have for a term that needs a teacher; the student has 7."""
    import torch

    from tests.world import unit

    given = terms.Given(7, [], torch.zeros(clusters, width), 0, "plain", None)
    widths = {"image": 7, "text": 7, "teacher_image": width, "teacher_text": width}
    batch = {name: unit(4, w, seed=i).double() for i, (name, w) in enumerate(widths.items())}
    return given, batch | {"ids": None}


@pytest.mark.parametrize("width", [7, 5])
def test_feature_term_maps_the_student_to_the_teachers_width(width):
    from torch.nn import functional as F

    from mclip.distill.terms.feature import Feature
    from mclip.losses import feature_loss

    given, batch = of_teacher(width)
    term = Feature(None, given)
    rows = [batch["image"], batch["text"]]
    if width == 7:
        assert term.learned is None
    else:
        maps = term.learned.double()
        rows = [F.normalize(maps[f"to_{name}"](batch[name]), dim=1) for name in ("image", "text")]
    want = feature_loss(*rows, batch["teacher_image"], batch["teacher_text"])
    assert term.loss(batch, 14.0).item() == pytest.approx(want.item(), rel=1e-12)
    assert terms.needs(Recipe(title="-", pairs="all", weight={"feature": 2000.0}).weight) == {
        "teacher": ["feature"]
    }


@pytest.mark.parametrize(("scale", "expected"), [(None, 14.0), (30.0, 30.0)])
def test_instance_by_a_temperature_of_its_own(scale, expected):
    from mclip.distill.terms.instance import Instance, Options
    from mclip.losses import instance_loss

    given, batch = of_teacher(7)
    rows = [batch[name] for name in ("image", "text", "teacher_image", "teacher_text")]
    found = Instance(Options(scale=scale), given).loss(batch, 14.0)
    assert found == pytest.approx(instance_loss(*rows, expected).item(), rel=1e-12)
