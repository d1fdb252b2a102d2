"""Exposure against numeric sums and brute force."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from sdclr.errors import InputError
from sdclr.lr.exposure import implied_by_exponential_ramp, implied_by_linear_ramp, steps_for
from sdclr.lr.schedule import Group, Schedule, exponential_ramp, linear_ramp


def stretched(policy: str, cycles: float, **more: object) -> Callable[[int], Schedule]:
    """A schedule whose cycles stretch with the run."""
    return lambda steps: Schedule(policy, 1.0, steps, step_size=steps / (2 * cycles), **more)  # type: ignore[arg-type]


def fixed(policy: str, step_size: float, **more: object) -> Callable[[int], Schedule]:
    """A schedule whose cycles have a length of their own."""
    return lambda steps: Schedule(policy, 1.0, steps, step_size=step_size, **more)  # type: ignore[arg-type]


@cache
def collected(plan: Callable[[int], Schedule], steps: int) -> float:
    return sum(plan(steps)(step) for step in range(steps))


def best_length(target: float, plan: Callable[[int], Schedule], lengths: range) -> int:
    """The length whose exposure is nearest to the target by factor, found by trying all."""
    return min(lengths, key=lambda n: abs(np.log(max(collected(plan, n), 1e-300) / target)))


PLANS = {
    "constant": lambda steps: Schedule("constant", 1.0, steps),
    "constant with warm-up": lambda steps: Schedule("constant", 1.0, steps, warmup=30),
    "linear": lambda steps: Schedule("linear", 1.0, steps, base_lr=0.1),
    "triangular": stretched("triangular", 4),
    "triangular from the peak": stretched("triangular", 3.5, start="peak"),
    "triangular2": stretched("triangular2", 3),
    "exp_range": stretched("exp_range", 3, gamma=0.9999),
    "welch": stretched("welch", 5),
    "hann": stretched("hann", 2),
    "everydream": stretched("everydream", 2.5),
    "groups": stretched("triangular", 6.5, start="peak", groups=(Group(3), Group(2, 0.5), Group(1.5, 0.25))),
    "fixed cycles": fixed("triangular", 16),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("target", [30.3, 77.7])
def test_steps_for_finds_what_trying_every_length_finds(name: str, target: float) -> None:
    plan = PLANS[name]
    found, best = steps_for(target, plan), best_length(target, plan, range(1, 300))
    # A cycle that is no whole number of steps wobbles by a step or two; the exposures must then be as near as the best one's.
    assert abs(found - best) <= (0 if name in ("constant", "constant with warm-up", "linear", "fixed cycles") else 2)
    assert plan(found).rates().sum() == pytest.approx(target, rel=0.03)


@pytest.mark.parametrize("target", [30.3, 77.7, 4.0])
@pytest.mark.parametrize("start", ["low", "peak"])
def test_with_whole_cycles_steps_for_finds_the_best_run_that_ends_low(target: float, start: str) -> None:
    plan = fixed("triangular", 8, start=start)
    first = 16 if start == "low" else 8
    assert steps_for(target, plan, multiple=16, first=first) == best_length(target, plan, range(first, 300, 16))


def test_without_a_first_length_steps_for_counts_in_whole_multiples() -> None:
    assert steps_for(100.0, PLANS["constant"], multiple=16) == 96


def test_a_target_below_one_step_is_one_step() -> None:
    assert steps_for(1e-9, PLANS["constant"]) == 1


def test_an_exposure_that_a_decaying_schedule_never_collects_is_an_input_error() -> None:
    def plan(steps: int) -> Schedule:
        class Cheap(Schedule):
            def rates(self) -> np.ndarray:
                return np.array([2.0 - 2.0**-30])  # what gamma 1/2 collects, however long the run

        return Cheap("exp_range", 1.0, steps, step_size=4, gamma=0.5)

    with pytest.raises(InputError, match="more than 5,000,000 steps"):
        steps_for(3.0, plan)


def test_a_linear_ramps_implied_exposure_is_the_sum_of_its_rates_up_to_there() -> None:
    ramp = linear_ramp(0.0, 3e-6, 1063)
    summed = sum(ramp(step) for step in range(401))
    assert implied_by_linear_ramp(ramp(400), ramp(1) - ramp(0)) == pytest.approx(summed, rel=5e-3)


def test_the_published_minimum_at_1_13e_6_implies_an_exposure_of_2_26e_4() -> None:
    assert implied_by_linear_ramp(1.13e-6, 3e-6 / 1062) == pytest.approx(2.26e-4, rel=5e-3)


@pytest.mark.parametrize("factor", [1.01, 1.5, 10 ** (1 / 4)])
def test_an_exponential_ramps_implied_exposure_is_the_sum_of_all_rates_up_to_there(factor: float) -> None:
    ramp = exponential_ramp(
        1e-12, 1e-12 * factor**4000 if factor < 1.1 else 1e-12 * factor**60, 4001 if factor < 1.1 else 61
    )
    last = 3000 if factor < 1.1 else 55
    summed = sum(ramp(step) for step in range(last + 1))
    assert implied_by_exponential_ramp(ramp(last), factor) == pytest.approx(summed, rel=1e-6)
