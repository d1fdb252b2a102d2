"""The method of `sdclr range-test` on a model that follows a formula, so that the right answer is known exactly."""

from __future__ import annotations

import numpy as np
import pytest

from sdclr.commands import range_test
from sdclr.config.schema import RangeTestSection
from sdclr.engine.pool import Pool
from sdclr.lr.bounds import analyse
from sdclr.lr.measured import Measured


class Formula:
    """Arms whose losses follow a formula: every rate walks one curve of exposure, and loses a share of the gain in proportion."""

    best, ceiling, gain, config = 0.3, 1e-3, 0.4, None

    def __init__(self):
        self.steps = 0
        self.finished = {}

    def losses(self, exposure: float, lr: float) -> np.ndarray:
        x = exposure / self.best
        walked = 2 * x / (1 + x * x)  # 1 at the best exposure
        images = np.linspace(0.08, 0.12, 5)[:, None]
        return np.repeat(images * (1 - self.gain * walked * (1 - 0.1 * lr / self.ceiling)), 2, axis=1)

    def base(self) -> np.ndarray:
        return self.losses(0.0, 0.0)

    def arm(self, name, lr, lr_at, next_point):
        none = np.empty(0)
        arm = Measured(name, lr, none, none, np.empty((0, 5, 2)), none, self.base())
        while (wanted := next_point(arm)) is not None:
            rates = np.array([lr_at(step) for step in range(wanted)])
            self.steps += wanted - len(arm.rates)
            steps, exposures = np.append(arm.steps, wanted), np.append(arm.exposure, rates.sum())
            losses = np.concatenate([arm.losses, self.losses(exposures[-1], rates[-1])[None]])
            arm = Measured(name, lr, steps, exposures, losses, rates, self.base())
        return arm


WITHIN_2_PERCENT = (1 - np.sqrt(1 - 0.98**2)) / 0.98
"""Of the highest gain, as a share of the best exposure: 2x / (1 + x²) = 0.98."""


def bounds_of(found):
    arms = [arm.arm() for arm in found.arms]
    return analyse(found.base.mean(axis=1), found.reference.arm(), arms, longest=found.longest.arm())


def test_the_ceiling_of_a_model_that_follows_a_formula():
    bench = Formula()
    found = range_test.measure(bench, RangeTestSection())
    bounds = bounds_of(found)
    # e(lr) − e(r) = 0.1 of what the reference gains: lr = ceiling + 0.9 r
    expected = bench.ceiling + 0.9 * found.reference.lr
    assert bounds.conclusive
    assert bounds.ceiling.value == pytest.approx(expected, rel=0.05)
    assert bounds.best_exposure.value == pytest.approx(WITHIN_2_PERCENT * bench.best, rel=0.05)


def test_a_reference_that_is_itself_too_fast_is_replaced_by_a_slower_one():
    bench = Formula()
    bench.ceiling = 1e-5  # the screen, which breaks far above, places the first reference higher
    found = range_test.measure(bench, RangeTestSection())
    assert found.reference.lr < bench.ceiling / 2
    faster = [arm.lr for arm in found.arms if arm.name.startswith("reference")]
    assert faster and faster[0] == pytest.approx(found.reference.lr * 10 ** (len(faster) / 2))
    assert bounds_of(found).ceiling.value == pytest.approx(bench.ceiling + 0.9 * found.reference.lr, rel=0.1)


def test_a_slower_reference_goes_no_further_than_arms_do_where_the_faster_one_stands_up_to_it():
    bench = Formula()
    found = range_test.measure(bench, RangeTestSection())
    assert found.longest.lr == pytest.approx(found.reference.lr * 10**0.5)
    assert found.longest.exposure[-1] > 1.4 * bench.best * WITHIN_2_PERCENT
    target = 0.5 * WITHIN_2_PERCENT * bench.best
    assert target * 0.95 < found.reference.exposure[-1] < 1.35 * target


def test_a_reference_is_not_taken_in_by_what_its_first_steps_do():
    class Wavering(Formula):
        def losses(self, exposure, lr):
            early = 0.02 * (0.004 < exposure < 0.012)  # as a few batches of one picture may
            return super().losses(exposure, lr) + early

    found = range_test.measure(Wavering(), RangeTestSection())
    assert len(found.longest.rates) >= 200
    assert bounds_of(found).best_exposure.value == pytest.approx(WITHIN_2_PERCENT * Formula.best, rel=0.05)


def test_a_reference_that_does_not_stand_up_to_a_slower_one_does_not_show_the_best_exposure():
    bench = Formula()
    bench.ceiling = 1e-5  # the first references lose everything that others gain
    found = range_test.measure(bench, RangeTestSection())
    assert found.longest.lr < 2 * bench.ceiling
    assert bounds_of(found).best_exposure.value == pytest.approx(WITHIN_2_PERCENT * bench.best, rel=0.05)


@pytest.mark.parametrize("layout", [lambda a, b: [[a], [b]], lambda a, b: [[a, b]]], ids=["two splits", "two seeds"])
def test_a_slower_reference_is_judged_on_all_splits_and_seeds_together(layout):
    benches = Formula(), Formula()
    benches[0].gain, benches[1].gain = 0.36, 0.44
    found = range_test.measure(Pool(layout(*benches)), RangeTestSection())
    assert found.longest.lr > found.reference.lr
    expected = Formula.ceiling + 0.9 * found.reference.lr
    assert bounds_of(found).ceiling.value == pytest.approx(expected, rel=0.1)
    assert bounds_of(found).best_exposure.value == pytest.approx(WITHIN_2_PERCENT * Formula.best, rel=0.05)


def test_a_slower_reference_that_cannot_go_so_far_shortens_the_comparison():
    class Short(Formula):
        def arm(self, name, lr, lr_at, next_point):
            most = 60 if name.count("-") > 2 else 10_000

            def sooner(arm):
                wanted = next_point(arm)
                return None if wanted is None or arm.last_step >= most else min(wanted, most)

            return super().arm(name, lr, lr_at, sooner)

    found = range_test.measure(Short(), RangeTestSection())
    assert found.longest.lr > found.reference.lr
    assert max(arm.exposure[-1] for arm in found.arms) < found.reference.exposure[-1] + max(a.lr for a in found.arms)
    assert bounds_of(found).ceiling


def test_twice_the_arms_or_half_the_exposure_leave_the_ceiling_where_it_is():
    plain, finer, shorter = (
        bounds_of(range_test.measure(Formula(), RangeTestSection(**changed))).ceiling.value
        for changed in ({}, {"arms_per_decade": 8}, {"test_exposure": 0.25})
    )
    assert abs(np.log10(finer / plain)) < 0.05
    assert abs(np.log10(shorter / plain)) < 0.05
