"""mclip.studies.epoch: parts add up, runs that are too short are told, the verdict follows the
numbers.

Real teachers and a captioner go through it in tests/pipeline/test_smoke.py.
"""

import pandas as pd
import pytest

from mclip import reinforce
from mclip.distill import plan
from mclip.params import Reinforce
from mclip.report import published
from mclip.studies import epoch
from tests.world import RECIPES, TRAIN

SETTINGS = Reinforce(
    ensemble=["base"],
    n_aug=2,
    n_syn=2,
    image_px=16,
    scale_min=0.5,
    randaugment_ops=0,
    randaugment_magnitude=9,
    caption_top_p=0.9,
    caption_candidates=2,
    batch_size=4,
    precision="fp32",
    seed=0,
)


@pytest.fixture
def runs(student, training_set, tmp_path):
    def make(samples):
        spec = training_set("kept", True)
        folders = {
            k: getattr(spec, k)
            for k in ("pairs", "balance", "clusters", "embeddings", "reinforced", "cache")
        }
        train = TRAIN.model_copy(update={"samples": samples, "batch_size": 8, "warmup_steps": 1})
        return [
            plan.runs_of(
                name,
                RECIPES[name],
                student,
                train,
                [0],
                teacher="large",
                data=folders,
                cache=tmp_path,
            )[0]
            for name in ("clip", "mobileclip")
        ]

    return make


@pytest.mark.slow
def test_what_is_online_is_added_to_the_reinforced_step(runs, student, monkeypatch, tmp_path):
    asked = []

    def reinforce_samples(samples, settings, ensemble, writer=None, **options):
        asked.append(
            (len(samples), settings.n_aug, settings.n_syn, len(ensemble), writer is not None)
        )

    monkeypatch.setattr(reinforce, "reinforce_samples", reinforce_samples)
    seconds = {"plain": 8, "reinforced": 16, "teachers": 80, "texts": 40, "everything": 400}

    def interleaved(calls, rounds, warm, wait):
        for call in calls.values():
            call()
        return {name: [seconds[name]] for name in calls}

    monkeypatch.setattr(epoch, "interleaved", interleaved)
    ms = epoch.per_sample(*runs(64), SETTINGS, {"base": student}, student, rounds=1)
    assert ms.to_dict() == {
        "plain": 1e3,
        "reinforced": 2e3,
        "teachers online": 17e3,
        "everything online": 52e3,
    }
    assert asked == [(8, 1, 1, 1, False), (8, 1, 1, 1, True)]
    assert not list(tmp_path.rglob("history.csv"))


def test_runs_that_are_too_short_are_told(runs, student):
    with pytest.raises(
        ValueError, match="are 3 steps, timing 3 rounds takes more than 5: raise samples"
    ):
        epoch.per_sample(*runs(24), SETTINGS, {"base": student}, student, rounds=3)


def test_a_table_and_what_it_says():
    ms = pd.Series(dict(zip(epoch.KINDS, (2.0, 3.0, 8.0, 40.0), strict=True)))
    table = epoch.table(ms, 60_000, published.EPOCH_HOURS)
    assert table["minutes an epoch of 60,000 pairs"].tolist() == [2, 3, 8, 40]
    assert table["times plain"].tolist() == [1, 1.5, 4, 20] and table[
        "the paper: hours"
    ].tolist() == [1.3, 1.3, 4.1, 21.1]
    said = epoch.verdict(ms, published.EPOCH_HOURS)
    assert (
        "reinforced set takes 1.50 times (1.00)" in said
        and "4.00 times (3.15)" in said
        and said.endswith("holds.")
    )
    assert epoch.verdict(ms.replace(40.0, 5.0), published.EPOCH_HOURS).endswith("does not hold.")
