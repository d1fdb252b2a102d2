"""Schedules against torch's and diffusers' own, against published numbers, and against sums done by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from hypothesis import given
from hypothesis import strategies as st

from sdclr.lr.schedule import Group, Schedule, exponential_ramp, linear_ramp

DECAYED = (Group(3, 1.0), Group(2, 0.5), Group(1.5, 0.25))


def optimizer(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates_of(
    make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], lr: float, steps: int
) -> list[float]:
    """What a torch scheduler gives each step."""
    opt = optimizer(lr)
    scheduler = make(opt)
    rates = []
    for _ in range(steps):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return rates


def everydream(max_lr: float, step_size: int, steps: int) -> Schedule:
    """As EveryDream2 sets it up when asked for no warm-up of one's own."""
    return Schedule("everydream", max_lr, steps, step_size=step_size, warmup=int(step_size / 50))


@pytest.mark.parametrize("policy", ["triangular", "triangular2", "exp_range"])
@pytest.mark.parametrize("step_size", [1, 4, 7, 40])
def test_agrees_with_torch_cyclic_lr_at_every_step_of_three_cycles(policy: str, step_size: int) -> None:
    gamma = 0.997 if policy == "exp_range" else 1.0
    steps = 6 * step_size + 1
    schedule = Schedule(policy, 3e-5, steps, base_lr=1e-6, step_size=step_size, gamma=gamma)
    expected = rates_of(
        lambda opt: torch.optim.lr_scheduler.CyclicLR(
            opt, base_lr=1e-6, max_lr=3e-5, step_size_up=step_size, mode=policy, gamma=gamma, cycle_momentum=False
        ),
        1e-6,
        steps,
    )  # fmt: skip
    assert schedule.rates() == pytest.approx(expected, rel=1e-12)


def test_triangular_climbs_and_falls_one_a_step() -> None:
    schedule = Schedule("triangular", 5.0, 9, base_lr=1.0, step_size=4)
    assert schedule.rates() == pytest.approx([1, 2, 3, 4, 5, 4, 3, 2, 1], rel=1e-12)


def test_triangular_from_the_peak_is_the_same_curve_half_a_cycle_later() -> None:
    low = Schedule("triangular", 5.0, 40, base_lr=1.0, step_size=4)
    peak = Schedule("triangular", 5.0, 40, base_lr=1.0, step_size=4, start="peak")
    assert peak.rates()[:36] == pytest.approx(low.rates()[4:], rel=1e-12)


def test_triangular2_from_the_peak_halves_at_its_first_trough() -> None:
    schedule = Schedule("triangular2", 4.0, 9, step_size=2, start="peak")
    assert schedule.rates() == pytest.approx([4, 2, 0, 1, 2, 1, 0, 0.5, 1], rel=1e-12)


@pytest.mark.parametrize(("step_size", "warmup"), [(50, 1), (40, 0), (8, 0), (20, 5)])
def test_everydream_agrees_with_diffusers_cosine_far_past_its_end(step_size: int, warmup: int) -> None:
    steps = 12 * step_size
    schedule = Schedule("everydream", 1.13e-6, steps, step_size=step_size, warmup=warmup)
    expected = rates_of(lambda opt: get_cosine_schedule_with_warmup(opt, warmup, step_size), 1.13e-6, steps)
    assert schedule.rates() == pytest.approx(expected, rel=1e-12, abs=1e-22)


def test_everydream_ends_the_published_run_of_550_steps_at_9_15e_8() -> None:
    last = everydream(1.13e-6, 50, 550)(549)
    assert last == pytest.approx(9.15e-8, rel=5e-3)
    assert last / 1.13e-6 == pytest.approx(0.081, abs=5e-4)


@pytest.mark.parametrize(
    ("step_size", "steps", "peaks"),
    # A warm-up of one step makes the half cycle 49: peaks at 1, 99, 197, 295, 393, 491. Without: at 0, 80, 160, ... and 0, 16, 32, ...
    [(50, 550, 6), (40, 800, 10), (8, 800, 50)],
)
def test_everydream_has_the_published_number_of_peaks(step_size: int, steps: int, peaks: int) -> None:
    rates = everydream(1.13e-6, step_size, steps).rates()
    assert int(np.sum(rates == rates.max())) == peaks


def test_everydream_with_cycles_of_a_broken_length_peaks_a_whole_cycle_apart() -> None:
    schedule = Schedule("everydream", 1.0, 100, step_size=12.5)
    assert [schedule(step) for step in (0, 25, 50, 75)] == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize(("policy", "mean"), [("triangular", 1 / 2), ("welch", 2 / 3), ("hann", 1 / 2)])
def test_a_windows_mean_is_its_integral(policy: str, mean: float) -> None:
    rates = Schedule(policy, 1.0, 20_000, step_size=10_000).rates()
    assert rates.mean() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("policy", ["triangular", "welch", "hann"])
def test_every_window_touches_both_bounds_and_stays_between(policy: str) -> None:
    schedule = Schedule(policy, 3.0, 400, base_lr=1.0, step_size=20)
    rates = schedule.rates()
    assert schedule(0) == pytest.approx(1.0)
    assert schedule(20) == pytest.approx(3.0)
    assert rates.min() >= 1.0 - 1e-12
    assert rates.max() <= 3.0 + 1e-12


def test_decayed_groups_from_the_peak_have_each_its_height_and_end_low() -> None:
    schedule = Schedule("triangular", 8.0, 130, step_size=10, start="peak", groups=DECAYED)
    at = {0: 8, 10: 0, 20: 8, 40: 8, 59: 7.2, 60: 4, 80: 4, 99: 3.6, 100: 2, 120: 2}
    assert [schedule(step) for step in at] == pytest.approx(list(at.values()))
    assert schedule.cycles == pytest.approx(6.5)
    assert schedule(129) == pytest.approx(2 * 0.1)
    assert not schedule.ends_near_peak
    assert schedule.troughs() == [10, 30, 50, 70, 90, 110, 130]


def test_the_last_groups_scale_lasts_past_the_groups() -> None:
    schedule = Schedule("triangular", 8.0, 400, step_size=10, groups=(Group(1, 1.0), Group(1, 0.5)))
    assert [schedule(10), schedule(30), schedule(50), schedule(390)] == pytest.approx([8, 4, 4, 4])


@pytest.mark.parametrize("steps", [7, 10, 97, 1000, 12_345])
@pytest.mark.parametrize("cycles", [1, 3, 7, 11])
def test_groups_change_exactly_between_cycles_that_are_no_whole_number_of_steps(steps: int, cycles: int) -> None:
    step_size = steps / (4 * cycles)
    schedule = Schedule("welch", 1.0, steps, step_size=step_size, groups=(Group(cycles, 1.0), Group(cycles, 0.5)))
    whole = Schedule("welch", 1.0, steps, step_size=step_size)
    scales = [schedule(step) / whole(step) for step in range(steps) if whole(step) > 1e-9]
    expected = [1.0 if 2 * step < steps else 0.5 for step in range(steps) if whole(step) > 1e-9]
    assert scales == pytest.approx(expected)


CYCLIC = ["triangular", "triangular2", "exp_range", "welch", "hann"]


@pytest.mark.parametrize("policy", CYCLIC)
@pytest.mark.parametrize(("start", "cycles"), [("low", 1), ("low", 4), ("peak", 0.5), ("peak", 3.5), ("peak", 6.5)])
def test_whole_cycles_from_low_and_half_cycles_from_the_peak_end_low(policy: str, start: str, cycles: float) -> None:
    steps = round(cycles * 40)
    schedule = Schedule(policy, 1.0, steps, step_size=20, start=start, gamma=0.999)
    assert schedule.cycles == pytest.approx(cycles)
    assert not schedule.ends_near_peak
    assert schedule(steps) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("policy", CYCLIC)
@pytest.mark.parametrize(("start", "cycles"), [("low", 0.5), ("low", 3.5), ("peak", 1), ("peak", 4)])
def test_half_cycles_from_low_and_whole_cycles_from_the_peak_end_near_the_peak(
    policy: str, start: str, cycles: float
) -> None:
    schedule = Schedule(policy, 1.0, round(cycles * 40), step_size=20, start=start)
    assert schedule.ends_near_peak


@pytest.mark.parametrize("policy", CYCLIC)
@pytest.mark.parametrize("start", ["low", "peak"])
def test_troughs_are_where_the_curve_is_lowest_and_the_end(policy: str, start: str) -> None:
    schedule = Schedule(policy, 1.0, 130, step_size=20, start=start)
    lowest = [step for step in range(1, 130) if schedule(step) < 1e-12]
    assert schedule.troughs() == [*lowest, 130]


@pytest.mark.parametrize(("step_size", "steps"), [(50, 550), (40, 800), (8, 100), (25, 240)])
def test_everydreams_troughs_are_where_its_curve_is_lowest_warm_up_or_not(step_size: int, steps: int) -> None:
    schedule = everydream(1.0, step_size, steps)
    lowest = [step for step in range(1, steps) if schedule(step) < 1e-12 and step >= schedule.warmup]
    assert schedule.troughs() == [*lowest, steps]


def test_everydreams_published_run_ends_low_and_its_two_shorter_ones_at_the_peak() -> None:
    assert not everydream(1.13e-6, 50, 550).ends_near_peak
    assert everydream(1.13e-6, 40, 800).ends_near_peak
    assert everydream(1.13e-6, 8, 800).ends_near_peak


def test_everydreams_end_is_judged_by_the_half_cycle_that_its_warm_up_leaves() -> None:
    # 20 steps of warm-up leave half cycles of 30: troughs at 50, 110, 170; a half cycle of 50 would have them at 50, 150, 250.
    schedule = Schedule("everydream", 1.0, 170, step_size=50, warmup=20)
    assert schedule.troughs() == [50, 110, 170]
    assert not schedule.ends_near_peak
    assert Schedule("everydream", 1.0, 140, step_size=50, warmup=20).ends_near_peak


def test_a_run_shorter_than_its_first_cycle_has_one_trough_its_end() -> None:
    assert Schedule("triangular", 1.0, 5, step_size=20).troughs() == [5]


@pytest.mark.parametrize("policy", ["constant", "linear"])
def test_a_schedule_without_cycles_has_one_trough_its_end_and_never_ends_near_a_peak(policy: str) -> None:
    schedule = Schedule(policy, 1.0, 30)
    assert schedule.troughs() == [30]
    assert not schedule.ends_near_peak


def test_constant_is_constant() -> None:
    assert Schedule("constant", 2e-6, 4).rates().tolist() == [2e-6] * 4


def test_warm_up_rises_in_equal_parts_and_never_starts_at_nothing() -> None:
    assert Schedule("constant", 4.0, 6, warmup=3).rates() == pytest.approx([1, 2, 3, 4, 4, 4])


def test_linear_falls_in_equal_parts_from_its_maximum_towards_its_base() -> None:
    assert Schedule("linear", 5.0, 4, base_lr=1.0).rates() == pytest.approx([5, 4, 3, 2])


def test_linear_with_warm_up_is_the_product_of_rise_and_fall() -> None:
    assert Schedule("linear", 8.0, 4, warmup=1).rates() == pytest.approx([8 * 0.5, 8 * 0.75, 8 * 0.5, 8 * 0.25])


def test_an_exponential_ramp_multiplies_by_one_factor_from_bound_to_bound() -> None:
    ramp = exponential_ramp(1e-6, 1e-2, 5)
    assert [ramp(step) for step in range(5)] == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])


def test_a_linear_ramp_adds_one_difference_from_bound_to_bound() -> None:
    ramp = linear_ramp(1.0, 3.0, 5)
    assert [ramp(step) for step in range(5)] == pytest.approx([1, 1.5, 2, 2.5, 3])


@given(
    policy=st.sampled_from([*CYCLIC, "everydream", "constant", "linear"]),
    start=st.sampled_from(["low", "peak"]),
    steps=st.integers(1, 500),
    cycles=st.floats(0.25, 40),
    base=st.floats(0, 0.5),
    warmup=st.integers(0, 20),
)
def test_no_schedule_ever_leaves_its_bounds(
    policy: str, start: str, steps: int, cycles: float, base: float, warmup: int
) -> None:
    base = 0.0 if policy == "everydream" else base
    schedule = Schedule(policy, 1.0, steps, base, steps / (2 * cycles), start, 0.99, (), warmup)
    rates = schedule.rates()
    assert rates.max() <= 1 + 1e-12
    # A warm-up starts below the base: it is there to start from almost nothing.
    assert rates.min() >= (0.0 if policy in ("constant", "linear") and warmup else base) - 1e-12


@given(
    policy=st.sampled_from([*CYCLIC, "everydream"]),
    steps=st.integers(1, 400),
    cycles=st.floats(0.25, 30),
    start=st.sampled_from(["low", "peak"]),
)
def test_troughs_rise_within_the_run_and_end_it(policy: str, steps: int, cycles: float, start: str) -> None:
    troughs = Schedule(policy, 1.0, steps, step_size=steps / (2 * cycles), start=start).troughs()
    assert troughs == sorted(set(troughs))
    assert troughs[0] >= 1
    assert troughs[-1] == steps


def test_a_schedule_is_a_function_of_the_step_alone() -> None:
    schedule = Schedule("hann", 1.0, 100, step_size=7.3)
    forwards = [schedule(step) for step in range(100)]
    backwards = [schedule(step) for step in reversed(range(100))]
    assert forwards == backwards[::-1]
    assert not any(math.isnan(rate) for rate in forwards)


@pytest.mark.parametrize(
    ("policy", "heights"), [("triangular2", [1.0, 0.5, 0.1 / 4]), ("exp_range", [0.9**10, 0.9**30, 0.1 * 0.9**50])]
)
def test_groups_scale_what_a_policy_makes_of_its_cycles(policy: str, heights: list[float]) -> None:
    groups = (Group(2, 1.0), Group(1, 0.1))
    schedule = Schedule(policy, 1.0, 60, step_size=10, gamma=0.9 if policy == "exp_range" else 1.0, groups=groups)
    assert [schedule(step) for step in (10, 30, 50)] == pytest.approx(heights)
