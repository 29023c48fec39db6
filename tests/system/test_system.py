"""mclip.system: learning-rate schedules against torch's and the formulas, threads."""

import itertools
import math
import threading

import pytest
import torch

from mclip.system.schedule import FIRST, learning_rate
from mclip.system.threads import side_by_side


def of_torch(optimizer, schedule, steps):
    """The rates that a loop with torch's scheduler has in each step."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def sgd(lr):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_a_linear_warm_up_then_a_cosine_to_the_minimum():
    lr = [learning_rate(i, 100, 1e-3, minimum=1e-5, warmup=10) for i in range(101)]
    assert lr[0] == pytest.approx(1e-4) and lr[9] == pytest.approx(1e-3)
    assert lr[55] == pytest.approx((1e-3 + 1e-5) / 2) and lr[100] == pytest.approx(1e-5)
    assert all(a > b for a, b in itertools.pairwise(lr[10:]))
    assert learning_rate(0, 100, 1e-3) == 1e-3  # no warm-up


@pytest.mark.parametrize(("steps", "warmup", "peak", "low"), [(237, 20, 3e-3, 1e-5), (7, 0, 1, 0)])
def test_the_students_rates_to_the_last_bit(steps, warmup, peak, low):
    for step in range(steps):
        done = (step - warmup) / max(1, steps - warmup)
        expected = low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))
        if step < warmup:
            expected = peak * (step + 1) / warmup
        assert learning_rate(step, steps, peak, minimum=low, warmup=warmup) == expected


@pytest.mark.parametrize(("steps", "warmup", "peak"), [(400, 20, 3e-3), (31, 20, 3e-4), (3, 3, 1)])
def test_the_teachers_rates_to_the_last_bit(steps, warmup, peak):
    optimizer = sgd(peak)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * s / steps)),
    )
    parts = [learning_rate(s, steps, 1.0, warmup=warmup, rise="scaled") for s in range(steps)]
    assert [peak * part for part in parts] == of_torch(optimizer, schedule, steps)


@pytest.mark.parametrize(("steps", "peak"), [(240, 1e-3), (77, 3e-3), (2, 0.7)])
def test_the_captioners_rates_are_those_of_one_cycle_to_the_last_bit(steps, peak):
    optimizer = sgd(peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    shape = {"minimum": peak / FIRST / 1e4, "warmup": 0.1 * steps - 1, "rise": "cosine"}
    found = [learning_rate(s, steps - 1, peak, **shape) for s in range(steps)]
    assert found == of_torch(optimizer, schedule, steps)


def test_an_unknown_rise_is_refused():
    with pytest.raises(ValueError, match="rise: expected one of linear, scaled, cosine"):
        learning_rate(0, 10, 1.0, rise="stepwise")


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("ahead", [0, 2, None])
def test_results_come_in_order_and_without_gradients(threads, ahead):
    weight, seen = torch.ones(1, requires_grad=True), set()

    def work(i):
        seen.add(threading.current_thread())
        assert torch.get_num_threads() == 1
        return i * weight

    found = list(side_by_side(work, range(20), ahead=ahead))
    assert [int(x) for x in found] == list(range(20)) and not any(x.requires_grad for x in found)
    assert (threading.main_thread() in seen) == (threads == 1)
    assert torch.get_num_threads() == threads


def test_items_are_taken_as_they_are_needed(threads):
    taken = []
    results = side_by_side(lambda i: i, map(lambda i: taken.append(i) or i, range(100)), ahead=1)
    assert next(results) == 0 and len(taken) <= threads + 1
    results.close()
    assert torch.get_num_threads() == threads


def test_an_error_ends_the_rest(threads):
    done = []

    def work(i):
        if i == 0:
            raise RuntimeError("no")
        done.append(i)

    with pytest.raises(RuntimeError, match="no"):
        list(side_by_side(work, range(10_000), ahead=None))
    assert len(done) < 10_000 and torch.get_num_threads() == threads
