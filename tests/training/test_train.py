"""mclip.distill.trainer and mclip.distill: every recipe learns, resumes to the same bytes, and
splits without changing.
"""

import dataclasses
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from mclip.distill import plan, trainer
from mclip.params import Recipe

from .conftest import RECIPES, TRAIN


def make_run(student, training_set, tmp_path, name="clip", **changes) -> trainer.Run:
    recipe = RECIPES[name]
    needs = recipe.weight.cluster or recipe.weight.instance
    spec = training_set(
        recipe.pairs, teacher="large" if needs else None, synthetic=recipe.synthetic, light_views=2
    )
    return trainer.Run(
        name=name,
        seed=0,
        student=student,
        train=TRAIN.model_copy(update=changes),
        recipe=recipe,
        data=spec,
        out=str(tmp_path / "out"),
        scratch=str(tmp_path / "scratch"),
    )


def weights(run: trainer.Run) -> bytes:
    return (Path(run.out) / "open_clip_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_and_the_loss_falls(name, student, training_set, tmp_path):
    run = make_run(student, training_set, tmp_path, name, samples=480, lr=3e-3)
    trainer.train(run)
    history = plan.history([run])
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    expected = {
        "clip": {"clip"},
        "clip-cid": {"clip", "cluster", "instance"},
        "mobileclip": {"affinity", "affinity_syn"},
        "combined": {"clip", "clip_syn", "cluster", "instance", "affinity", "affinity_syn"},
    }[name]
    assert (
        set(history.columns) - {"seed", "step", "samples", "lr", "logit_scale", "loss"} == expected
    )
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{run.out}")
    assert model.encode_text(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 7)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9},
        {"accumulate": 2},
        {"precision": "bf16", "grad_checkpoint": True},
    ],
    ids=["plain", "ema", "accumulate", "bf16-checkpoint"],
)
def test_same_seed_same_bytes_and_a_killed_run_resumes_to_them(
    changes, student, training_set, tmp_path, monkeypatch
):
    run = make_run(student, training_set, tmp_path / "a", "combined", samples=240, **changes)
    trainer.train(run)
    other = dataclasses.replace(run, out=str(tmp_path / "b"), scratch=str(tmp_path / "b-scratch"))
    step = trainer.backward
    calls = iter(range(100))

    def dies(*args):
        if next(calls) == 25:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer, "backward", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(other)
    assert not (tmp_path / "b").exists()  # nothing that looks whole
    monkeypatch.setattr(trainer, "backward", step)
    trainer.train(other)
    assert weights(other) == weights(run)
    assert (Path(other.out) / "history.csv").read_text() == (
        Path(run.out) / "history.csv"
    ).read_text()


def one_step(run, **options):
    """Gradients, terms, student and bytes kept for the backward pass after the first step of a run."""
    torch.manual_seed(0)
    model, _, _, tokenizer = trainer.models.create(run.student)
    model.train()
    if options.get("grad_checkpoint"):
        model.set_grad_checkpointing()
    run = dataclasses.replace(
        run, data=dataclasses.replace(run.data, image_px=trainer.models.image_size(model))
    )
    ensemble = trainer.reinforced.read_meta(run.data.reinforced)["teachers"]
    side, _ = trainer._side(run, model, tokenizer)
    loader = trainer._loader(run, tokenizer, ensemble, side, start=0, rank=0, world=1)
    objective = trainer._objective(run, model, ensemble)
    together = trainer.Together(model, objective)
    generator = torch.Generator().manual_seed(1)
    for p in objective.parameters():
        if p.shape != objective.cluster.weight.shape:
            p.data = torch.randn(p.shape, generator=generator)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.data_ptr(): t.numel() * t.element_size()}) or t, lambda t: t
    ):
        terms = trainer.backward(
            together,
            together,
            loader.batch(0),
            (0.5,) * 3,
            (0.5,) * 3,
            torch.float32,
            **({"accumulate": 1} | options),
        )
    return (
        {n: p.grad for n, p in together.named_parameters() if p.grad is not None},
        terms,
        model,
        sum(kept.values()),
    )


def test_accumulation_has_the_gradient_of_the_whole_batch(student, training_set, tmp_path):
    """Objective without random centre sampling, so that order within the batch doesn't matter."""
    run = make_run(student, training_set, tmp_path, "combined")
    recipe = Recipe.model_validate(
        run.recipe.model_dump(by_alias=True) | {"cluster": {"sample_rate": 1.0}}
    )
    run = dataclasses.replace(run, recipe=recipe)
    (whole, terms, *_), (parts, parts_terms, *_) = (one_step(run, accumulate=n) for n in (1, 4))
    assert whole.keys() == parts.keys()
    for name, g in whole.items():
        torch.testing.assert_close(parts[name], g, rtol=2e-4, atol=1e-6, msg=name)
    assert {k: float(v) for k, v in terms.items()} == pytest.approx(
        {k: float(v) for k, v in parts_terms.items()}, rel=1e-5
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("model", ["a transformer", "demo-student"])
def test_checkpointing_keeps_less_and_changes_nothing(
    model, accumulate, student, training_set, tmp_path
):
    """The same gradients to the bit, and batch norm (the default student has it) counts each
    picture once.
    """
    run = make_run(
        student if model == "a transformer" else model, training_set, tmp_path, "combined"
    )
    plain, terms, one, kept = one_step(run, accumulate=accumulate)
    again, same_terms, other, kept_less = one_step(run, accumulate=accumulate, grad_checkpoint=True)
    assert terms == same_terms and plain.keys() == again.keys()
    assert all(torch.equal(g, again[n]) for n, g in plain.items())
    assert kept_less < 0.7 * kept
    before, after = dict(one.named_buffers()), dict(other.named_buffers())
    assert all(torch.equal(v, after[n]) for n, v in before.items())
    counted = [v for n, v in before.items() if n.endswith("num_batches_tracked")]
    assert all(v == accumulate for v in counted) and bool(counted) == (model == "demo-student")


@pytest.mark.parametrize(
    "name, changes", [("combined", {}), ("clip", {"ema": 0.9})], ids=["two captions", "ema"]
)
def test_rows_that_no_caption_uses_are_trained_by_weight_decay_alone(
    name, changes, student, training_set, tmp_path, monkeypatch
):
    """A table cut to the captions' tokens ends as the whole table, trained, does."""
    run = make_run(
        student, training_set, tmp_path / "cut", name, samples=160, weight_decay=20.0, **changes
    )
    tables, cut = [], trainer.shrink

    def watched(model, captions):
        kept = cut(model, captions)
        tables.append(len(model.token_embedding.weight))
        return kept

    monkeypatch.setattr(trainer, "shrink", watched)
    trainer.train(run)
    monkeypatch.setattr(trainer, "shrink", lambda model, captions: None)
    whole = dataclasses.replace(
        run, out=str(tmp_path / "whole"), scratch=str(tmp_path / "whole-scratch")
    )
    trainer.train(whole)
    assert tables[0] < 50
    (one, *_), (other, *_) = (trainer.models.create(f"local-dir:{r.out}") for r in (run, whole))
    before = trainer.models.create(student)[0].token_embedding.weight
    assert (
        other.token_embedding.weight[1000:2000].norm() < 0.9 * before[1000:2000].norm()
    )  # it decayed
    for name, value in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, rtol=2e-4, atol=2e-6, msg=name)


def test_the_averaged_weights_are_those_that_are_kept(student, training_set, tmp_path, monkeypatch):
    monkeypatch.setattr(
        trainer, "shrink", lambda model, captions: None
    )  # what is averaged is what is kept
    seen = []
    update = trainer.AveragedModel.update_parameters
    monkeypatch.setattr(
        trainer.AveragedModel,
        "update_parameters",
        lambda self, m: (
            seen.append({k: v.double().clone() for k, v in m.state_dict().items()}),
            update(self, m),
        )[1],
    )
    run = make_run(student, training_set, tmp_path, samples=40, ema=0.8)
    trainer.train(run)
    assert len(seen) == 5
    expected = seen[0]
    for state in seen[1:]:
        expected = {k: 0.8 * expected[k] + 0.2 * v for k, v in state.items()}
    found = trainer.models.create(f"local-dir:{run.out}")[0].state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


def test_pictures_and_weights_are_channels_last_and_the_optimizer_fused(
    training_set, tmp_path, monkeypatch
):
    seen = {}
    step = trainer.backward

    def look(wrapped, together, *rest):
        def conv_sees(module, inputs):
            seen["input"] = inputs[0].is_contiguous(memory_format=torch.channels_last)
            seen["weight"] = module.weight.is_contiguous(memory_format=torch.channels_last)
            seen["dtype"] = (
                torch.get_autocast_dtype("cpu")
                if torch.is_autocast_enabled("cpu")
                else torch.float32
            )

        conv = next(
            m
            for m in together.student.visual.modules()
            if isinstance(m, torch.nn.Conv2d) and m.in_channels > 3
        )
        with conv.register_forward_pre_hook(conv_sees):
            return step(wrapped, together, *rest)

    made = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(trainer, "backward", look)
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *a, **k: made.append(adamw(*a, **k)) or made[-1]
    )
    run = make_run("demo-student", training_set, tmp_path, samples=8, precision="bf16")
    trainer.train(dataclasses.replace(run, data=dataclasses.replace(run.data, image_px=None)))
    assert seen == {"input": True, "weight": True, "dtype": torch.bfloat16}
    assert made[0].defaults["fused"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss_kernel": "tiled"}, {"accumulate": 2, "grad_checkpoint": True}],
    ids=["plain", "tiled", "in parts"],
)
def test_two_processes_train_like_one(changes, student, training_set, tmp_path):
    """torchrun with gloo, the global batch split over ranks: the same weights up to float32
    summation order.
    """
    outputs = []
    for processes in (1, 2):
        run = make_run(
            student,
            training_set,
            tmp_path / str(processes),
            "combined",
            samples=80,
            processes=processes,
            **{"loss_kernel": "plain"}
            | (changes if processes == 2 else changes | {"loss_kernel": "plain"}),
        )
        plan.run_recipe([run])
        model = trainer.models.create(f"local-dir:{run.out}")[0]
        with torch.no_grad():
            outputs.append(
                model.encode_image(torch.linspace(-1, 1, 5 * 3 * 16 * 16).view(5, 3, 16, 16))
            )
        assert not Path(run.scratch).exists()
    one, two = (
        plan.history([dataclasses.replace(run, out=str(tmp_path / p / "out"))]) for p in ("1", "2")
    )
    assert {"clip", "clip_syn", "affinity", "affinity_syn", "cluster", "instance"} < set(
        one.columns
    )
    for (
        column
    ) in one.columns:  # the mean of ten steps: also the gradients of the nine before the last agree
        assert one[column][0] == pytest.approx(two[column][0], rel=1e-5), column
    # not the weights: those without a gradient (the keys' biases) get AdamW's steps from rounding
    # errors alone
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)


def test_streamed_training_runs(student, training_set, tmp_path):
    run = make_run(student, training_set, tmp_path, "mobileclip", samples=80, cache_pixels=False)
    trainer.train(run)
    assert len(plan.history([run])) == 1


def test_a_loss_that_is_not_finite_stops_the_run(student, training_set, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "backward", lambda *a: {"clip": float("nan")})
    with pytest.raises(FloatingPointError, match="clip seed 0: the loss is nan at step 0"):
        trainer.train(make_run(student, training_set, tmp_path))


def test_a_failing_run_is_told_with_its_log(student, training_set, tmp_path):
    run = make_run("local-dir:/nowhere", training_set, tmp_path)
    with pytest.raises(
        plan.TrainingError, match=r"(?s)clip seed 0 ended with exit status 1.*log\.txt.*nowhere"
    ):
        plan.run_recipe([run])


def test_finished_seeds_are_not_trained_again(student, training_set, tmp_path):
    run = make_run(student, training_set, tmp_path)
    trainer.train(run)
    stamp = (Path(run.out) / "history.csv").stat().st_mtime_ns
    assert len(plan.run_recipe([run])) == 1
    assert (Path(run.out) / "history.csv").stat().st_mtime_ns == stamp


def test_planning_and_waiting_need_neither_torch_nor_open_clip():
    code = "import sys, mclip.distill; print([m for m in ('torch', 'open_clip', 'torchvision') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_learning_rate_warms_up_and_falls_to_its_floor():
    t = TRAIN.model_copy(update={"warmup_steps": 10, "lr_min": 1e-5})
    lr = [trainer.learning_rate(i, 100, t, 1e-3) for i in range(101)]
    assert (
        lr[0] == pytest.approx(1e-4)
        and lr[9] == pytest.approx(1e-3)
        and lr[100] == pytest.approx(1e-5)
    )
    assert all(a >= b for a, b in itertools.pairwise(lr[10:]))


def test_groups_name_every_parameter_once(student, training_set, tmp_path):
    run = make_run(student, training_set, tmp_path, "clip-cid")
    model, _, _, _ = trainer.models.create(student)
    objective = trainer._objective(run, model, [])
    together = trainer.Together(model, objective)
    groups = trainer.parameter_groups(together, TRAIN.model_copy(update={"lr_centres": 0.5}))
    assert sum(len(g["params"]) for g in groups) == len(list(together.parameters()))
    assert groups[-1]["params"] == [objective.cluster.weight] and groups[-1]["peak"] == 0.5
    shutil.rmtree(tmp_path, ignore_errors=True)
