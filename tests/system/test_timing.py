"""mclip.system.timing: calls take turns, and only what was asked for counts."""

from mclip.system.timing import interleaved


def test_calls_take_turns_there_and_back():
    order, waits = [], []
    calls = {(name,): lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(calls, rounds=3, warm=1, wait=lambda: waits.append(len(order)))
    assert "".join(order) == "abccbaabccba" and all(len(t) == 3 for t in times.values())
    assert times.keys() == calls.keys()
    assert waits == [n for i in range(12) for n in (i, i + 1)]  # before and after each call


def test_seconds_are_those_of_the_clock():
    ticks = iter([0, 10, 14, 20, 23])  # the start of the warm-up; starts and ends of two rounds
    assert interleaved({"a": lambda: None}, 2, warm=1, clock=lambda: next(ticks)) == {"a": [4, 3]}


def test_calls_right_before_a_timed_one_do_not_count():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    ticks = iter([0, 3, 10, 14])
    assert interleaved(calls, 1, before=2, clock=lambda: next(ticks)) == {"a": [3], "b": [4]}
    assert "".join(order) == "aaabbb"
