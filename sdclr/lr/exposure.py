"""Exposure S = Σ lr: the clock of few-image fine-tuning.

With Adam on few images validation loss is a function of S and, up to a ceiling, not of the learning rate; so lengths are planned
and runs compared in S, and κ = S/S* says where on the way from faithful to "fried" a run stands.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sdclr.errors import InputError
from sdclr.lr.schedule import Schedule

MAX_STEPS = 5_000_000
"""Where the search for a length gives up: weeks of training, and some decaying schedules never collect more."""


def implied_by_linear_ramp(lr_at_minimum: float, slope: float) -> float:
    """S* that a linear ramp's minimum stands for: S = lr²/(2·slope), slope = lr per step."""
    return lr_at_minimum**2 / (2 * slope)


def implied_by_exponential_ramp(lr_at_minimum: float, factor: float) -> float:
    """S* that an exponential ramp's minimum stands for: the geometric sum lr/(1 − 1/factor), factor = lr's growth a step."""
    return lr_at_minimum / (1 - 1 / factor)


def steps_for(target: float, plan: Callable[[int], Schedule], multiple: float = 1.0, first: float | None = None) -> int:
    """The number of steps after which `plan(steps)` has collected the exposure `target`.

    `plan` builds the schedule of a run of that many steps; the answer is one of `first`, `first` + `multiple`, `first` + 2·`multiple`, ...
    (the first trough and a cycle, so that the run ends at a trough; `first` is `multiple` unless given). Exposure grows with the
    steps, so bisection finds it. Raises InputError when no run of at most MAX_STEPS collects it.
    """
    low, high = 1, 2
    start = multiple if first is None else first

    def length(units: int) -> int:
        return max(1, round(start + (units - 1) * multiple))

    def collected(units: int) -> float:
        return float(plan(length(units)).rates().sum())

    while collected(high) < target:
        low, high = high, high * 2
        if length(high) > MAX_STEPS:
            raise InputError(
                f"more than {MAX_STEPS:,} steps of this schedule are needed for an exposure of {target:.3g}",
                hint="a larger schedule.max_lr, a slower decay (schedule.gamma, or another policy), or a smaller train.kappa",
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if collected(middle) < target else (low, middle)
    nearest = min((low, high), key=lambda units: abs(np.log(max(collected(units), 1e-300) / target)))
    return length(nearest)
