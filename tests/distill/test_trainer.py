"""mclip.distill.trainer and mclip.distill: every recipe learns, resumes to the same bytes, and
splits without changing.
"""

import dataclasses
import math
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from mclip import balance, cluster, models
from mclip.distill import plan, terms, trainer
from mclip.distill.identity import identity
from mclip.distill.pairs import FOLDERS
from mclip.params import Recipe
from tests.world import PX, RECIPES, TRAIN


def make_run(student, training_set, tmp_path, name="clip", **changes) -> trainer.Run:
    recipe = RECIPES[name]
    spec = training_set(
        recipe.pairs,
        recipe.reinforced,
        teacher="large" if "teacher" in terms.needs(recipe.weight) else None,
        synthetic=recipe.synthetic,
        light_views=2,
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9},
        {"optimizer": "muon"},
        {"accumulate": 2},
        {"precision": "bf16", "grad_checkpoint": True},
    ],
    ids=["plain", "ema", "muon", "accumulate", "bf16-checkpoint"],
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


def planned(student, world, tmp_path, **folders):
    """A run that `plan` names, over the tiny world with some folders replaced."""
    data = {name: str(world / name) for name in FOLDERS} | {"image_px": PX} | folders
    (run,) = plan.runs_of(
        "clip-cid",
        RECIPES["clip-cid"],
        student,
        TRAIN.model_copy(update={"samples": 800}),
        [0],
        teacher="large",
        data=data,
        cache=tmp_path,
    )
    return run


@pytest.fixture(scope="module")
def killed(student, world, tmp_path_factory):
    """What is left of a run in a process of its own, ended by SIGKILL after its first checkpoint."""
    run = planned(student, world, tmp_path_factory.mktemp("killed"))
    scratch = Path(run.scratch)
    scratch.mkdir(parents=True)
    run.save(scratch / "run.json")
    command = [sys.executable, "-m", "mclip.distill.trainer", str(scratch / "run.json")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (scratch / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not Path(run.out).exists()
    return scratch


def changed(what, world, tmp_path) -> dict[str, str]:
    """The folder of one of the stages as a changed parameter would have left it."""
    if what is None:
        return {}
    folder = tmp_path / what
    if what == "clusters":
        before = cluster.read(world / "clusters")
        cluster.write(folder, dataclasses.replace(before, labels=before.labels[::-1].copy()))
    elif what == "balance":
        before = balance.read(world / "balance")
        keep = before.keep.copy()
        keep[::3] = False
        balance.write(folder, dataclasses.replace(before, keep=keep))
    else:
        shutil.copytree(world / "embeddings", folder)
        file = folder / "large" / "img_emb" / "img_emb_0000.npy"
        np.save(file, np.load(file)[::-1])
    return {what: str(folder)}


@pytest.mark.slow
@pytest.mark.parametrize("what", [None, "clusters", "balance", "embeddings"])
def test_a_killed_run_goes_on_with_the_same_data_and_starts_anew_with_other(
    what, killed, student, world, tmp_path
):
    run = planned(student, world, tmp_path, **changed(what, world, tmp_path))
    assert (Path(run.scratch).name == killed.name) == (what is None) and not plan.finished(run)
    shutil.copytree(killed, run.scratch)
    steps = list(trainer.steps(run))
    assert (steps[0] == 1) == (what is not None) and steps[-1] == 100 and plan.finished(run)
    fresh = dataclasses.replace(
        run, out=str(tmp_path / "fresh"), scratch=str(tmp_path / "fresh-scratch")
    )
    trainer.train(fresh)
    for name in ("open_clip_model.safetensors", "history.csv", "training.json"):
        assert (Path(run.out) / name).read_bytes() == (Path(fresh.out) / name).read_bytes()


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(student, world, tmp_path):
    run = planned(student, world, tmp_path)
    fresh = dataclasses.replace(run, out=str(tmp_path / "fresh"), scratch=str(tmp_path / "other"))
    trainer.train(fresh)
    scratch, wait = Path(run.scratch), random.Random(0)
    scratch.mkdir(parents=True)
    run.save(scratch / "run.json")
    checkpoint, kills = scratch / "checkpoint.pt", 0
    while not plan.finished(run):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        command = [sys.executable, "-m", "mclip.distill.trainer", str(scratch / "run.json")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                time.sleep(wait.uniform(0, 0.1))
                process.kill()
                break
            time.sleep(0.001)
        kills += process.wait() == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL)
    assert kills >= 3
    assert weights(run) == weights(fresh)


def test_a_student_goes_on_from_weights_with_their_scale_and_preprocessing(
    student, training_set, tmp_path
):
    torch.manual_seed(1)
    model, *_ = models.create(student)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(33))
    mine = model.visual.preprocess_cfg | {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
    folder = models.export(model, tmp_path / "mine", preprocess=mine)
    run = make_run(
        f"local-dir:{folder}",
        training_set,
        tmp_path,
        samples=8,
        lr=1e-12,
        lr_adamw=1e-12,
        logit_scale_init=None,
    )
    trainer.train(run)
    assert plan.history([run])["logit_scale"].tolist() == [pytest.approx(33)]
    trained, *_ = models.create(f"local-dir:{run.out}")
    assert torch.allclose(trained.visual.proj, model.visual.proj, atol=1e-9)
    assert list(trained.visual.preprocess_cfg["mean"]) == [0.1, 0.2, 0.3]
    assert trained.visual.preprocess_cfg["interpolation"] == "bilinear"
    assert identity(run) != identity(dataclasses.replace(run, student=student))
    again = run.train.model_copy(update={"logit_scale_init": 14.3})
    assert identity(run) != identity(dataclasses.replace(run, train=again))


@pytest.mark.slow
def test_a_finished_student_of_other_data_is_not_this_run(student, world, tmp_path):
    run = planned(student, world, tmp_path)
    trainer.train(run)
    other = planned(student, world, tmp_path, **changed("clusters", world, tmp_path))
    assert other.out != run.out
    other = dataclasses.replace(other, out=run.out)
    assert plan.finished(run) and not plan.finished(other)
    trainer.train(other)
    assert plan.finished(other) and not plan.finished(run)


def test_what_only_changes_how_a_run_goes_is_no_part_of_its_identity(student, world, tmp_path):
    run = planned(student, world, tmp_path)

    def same(**settings) -> bool:
        train = run.train.model_copy(update=settings)
        return identity(dataclasses.replace(run, train=train)) == run.identity

    assert same(parallel_runs=9, checkpoint_every=1, workers=5)
    assert not same(lr=0.5) and not same(threads=3) and not same(precision="bf16")
    stream = dataclasses.replace(run, train=run.train.model_copy(update={"cache_pixels": False}))
    more = dataclasses.replace(stream, train=stream.train.model_copy(update={"workers": 5}))
    assert identity(stream) != identity(more)  # its batches depend on who reads


def test_another_student_under_the_same_name_is_another_run(student, world, tmp_path):
    folder = shutil.copytree(student.removeprefix("local-dir:"), tmp_path / "student")
    before = planned(f"local-dir:{folder}", world, tmp_path)
    assert before.identity == planned(student, world, tmp_path).identity
    config = folder / "open_clip_config.json"
    config.write_text(config.read_text() + " ")
    assert planned(f"local-dir:{folder}", world, tmp_path).identity != before.identity


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
    pairs = trainer.open_pairs(run.data)
    side = trainer._side(run, pairs, tokenizer)
    loader = trainer._loader(run, pairs, tokenizer, side, start=0, rank=0, world=1)
    objective = trainer._objective(run, model, pairs.teachers)
    together = trainer.Together(model, objective)
    generator = torch.Generator().manual_seed(1)
    for p in objective.parameters():
        if p is not objective.learned.cluster.weight:
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_the_averaged_weights_are_those_that_are_kept(student, training_set, tmp_path, monkeypatch):
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
    optimizer = trainer.Muon
    monkeypatch.setattr(trainer, "backward", look)
    monkeypatch.setattr(
        trainer, "Muon", lambda *a, **k: made.append(optimizer(*a, **k)) or made[-1]
    )
    run = make_run("demo-student", training_set, tmp_path, samples=8, precision="bf16")
    trainer.train(dataclasses.replace(run, data=dataclasses.replace(run.data, image_px=None)))
    assert seen == {"input": True, "weight": True, "dtype": torch.bfloat16}
    assert made[0].defaults["fused"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"loss_kernel": "tiled", "accumulate": 2, "grad_checkpoint": True}],
    ids=["plain", "tiled in parts"],
)
def test_two_processes_train_like_one(changes, student, training_set, tmp_path):
    """Two ranks with gloo, the global batch split over them: the same weights up to float32
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
            **{"loss_kernel": "plain"} | (changes if processes == 2 else {}),
        )
        if processes == 1:
            trainer.train(run)
        else:
            plan.train_all([run])
            assert not Path(run.scratch).exists()
        model = trainer.models.create(f"local-dir:{run.out}")[0]
        with torch.no_grad():
            outputs.append(
                model.encode_image(torch.linspace(-1, 1, 5 * 3 * 16 * 16).view(5, 3, 16, 16))
            )
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


@pytest.mark.slow
def test_streamed_training_runs(student, training_set, tmp_path):
    run = make_run(student, training_set, tmp_path, "mobileclip", samples=80, cache_pixels=False)
    trainer.train(run)
    assert len(plan.history([run])) == 1


def test_a_loss_that_is_not_finite_stops_the_run(student, training_set, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "backward", lambda *a: {"clip": float("nan")})
    with pytest.raises(FloatingPointError, match="clip seed 0: the loss is nan at step 0"):
        trainer.train(make_run(student, training_set, tmp_path))


@pytest.mark.slow
def test_a_failing_run_is_told_with_its_log_and_the_others_are_stopped(
    student, training_set, tmp_path
):
    long = make_run(student, training_set, tmp_path / "long", samples=10**7)
    run = make_run("local-dir:/nowhere", training_set, tmp_path)
    with pytest.raises(
        plan.TrainingError, match=r"(?s)clip seed 0 ended with exit status 1.*log\.txt.*nowhere"
    ):
        plan.train_all([long, run], side_by_side=2)
    assert not multiprocessing.active_children() and not Path(long.out).exists()


@pytest.mark.slow
def test_a_killed_training_is_told(student, training_set, tmp_path):
    def kill():
        while not multiprocessing.active_children():
            time.sleep(0.05)
        multiprocessing.active_children()[0].kill()

    threading.Thread(target=kill).start()
    with pytest.raises(plan.TrainingError, match="clip seed 0 ended with exit status -9"):
        plan.train_all([make_run(student, training_set, tmp_path, samples=10**7)])


@pytest.mark.slow
def test_a_process_of_its_own_trains_the_same_bytes(student, training_set, tmp_path):
    """With processes below it that decode: two runs, each with a cache of its own."""
    runs = [
        make_run(student, training_set, tmp_path / name, "combined", workers=workers)
        for name, workers in (("a", 0), ("b", 2))
    ]
    runs[1] = dataclasses.replace(
        runs[1], data=dataclasses.replace(runs[1].data, cache=str(tmp_path / "cache"))
    )
    trainer.train(runs[0])
    plan.train_all(runs[1:])
    a, b = ({path.name: path.read_bytes() for path in Path(run.out).iterdir()} for run in runs)
    assert a == b


@pytest.mark.slow
def test_finished_seeds_are_not_trained_again(student, training_set, tmp_path):
    run = make_run(student, training_set, tmp_path)
    trainer.train(run)
    stamp = (Path(run.out) / "history.csv").stat().st_mtime_ns
    for _ in range(2):  # over what a stage before has left
        assert len(plan.run_recipe([run], folder=tmp_path / "students")) == 1
    assert (Path(run.out) / "history.csv").stat().st_mtime_ns == stamp
    own, copied = (
        {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        for folder in (run.out, tmp_path / "students" / run.name / f"seed{run.seed}")
    )
    assert own == copied and "history.csv" in own


@pytest.mark.slow
def test_planning_and_waiting_need_neither_torch_nor_open_clip():
    code = "import sys, mclip.distill.plan; print([m for m in ('torch', 'open_clip', 'torchvision') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_groups_name_every_parameter_once(student, training_set, tmp_path):
    run = make_run(student, training_set, tmp_path, "clip-cid")
    model, _, _, _ = trainer.models.create(student)
    objective = trainer._objective(run, model, [])
    together = trainer.Together(model, objective)
    groups = trainer.parameter_groups(together, TRAIN.model_copy(update={"lr_centres": 0.5}))
    assert sum(len(g["params"]) for g in groups) == len(list(together.parameters()))
    assert groups[-1]["params"] == [objective.learned.cluster.weight] and groups[-1]["peak"] == 0.5
    shutil.rmtree(tmp_path, ignore_errors=True)
