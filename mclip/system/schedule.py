"""Learning rates over a training: a warm-up, then half a cosine."""

import math

RISES = ("linear", "scaled", "cosine")
FIRST = 25  # a cosine warm-up begins at this part of the peak, as torch's OneCycleLR does


def learning_rate(
    step: int,
    total: float,
    peak: float,
    *,
    minimum: float = 0.0,
    warmup: float = 0,
    rise: str = "linear",
) -> float:
    """The learning rate of a step.

    Parameters
    ----------
    step : from 0 on.
    total : the step at which the rate has come down to the minimum.
    peak : the highest rate.
    minimum : the lowest rate.
    warmup : steps until the peak.
    rise : how the rate gets there. "linear": from peak / warmup, then the cosine begins (the
        students). "scaled": the cosine begins at step 0, and is scaled up linearly during the
        warm-up (the teachers' heads). "cosine": half a cosine from peak / 25, then another one
        down, which is torch's OneCycleLR (the captioner).

    Raises
    ------
    ValueError : another rise.
    """
    if rise not in RISES:
        raise ValueError(f"rise: expected one of {', '.join(RISES)}, found {rise!r}")
    if rise == "scaled":
        scale = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return scale * _cosine(math.pi * step / total, peak, minimum)
    if rise == "linear" and step < warmup:
        return peak * (step + 1) / warmup
    if rise == "cosine" and step <= warmup:
        return _cosine(math.pi * (step / warmup), peak / FIRST, peak)
    return _cosine(math.pi * ((step - warmup) / max(1, total - warmup)), peak, minimum)


def _cosine(angle: float, start: float, end: float) -> float:
    """From `start` (angle 0) to `end` (angle pi)."""
    return end + (start - end) * 0.5 * (1 + math.cos(angle))
