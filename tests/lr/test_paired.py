"""Paired differences against scipy's t-test and a sum done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sdclr.lr.paired import half_width, paired_difference, per_image

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("images", [2, 4, 30])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_is_scipys_paired_t_interval(images: int, confidence: float) -> None:
    a, b = RNG.normal(1, 0.3, images), RNG.normal(0.9, 0.3, images)
    ours, theirs = paired_difference(a, b, confidence), stats.ttest_rel(a, b).confidence_interval(confidence)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    assert ours.mean == pytest.approx((ours.low + ours.high) / 2)


def test_four_differences_by_hand() -> None:
    # Differences 1, 2, 3, 4: mean 2.5, sd sqrt(5/3), t(0.975, 3) = 3.18245 from a printed table.
    found = paired_difference(np.array([2.0, 4, 6, 8]), np.array([1.0, 2, 3, 4]))
    half = 3.18245 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-5)
    assert found.images == 4


def test_draws_are_averaged_before_images_are_compared() -> None:
    a, b = RNG.random((6, 8)), RNG.random((6, 8))
    assert paired_difference(a, b) == paired_difference(a.mean(axis=1), b.mean(axis=1))
    assert per_image(a) == pytest.approx(a.mean(axis=1))


def test_an_offset_common_to_both_states_changes_nothing() -> None:
    a, b, luck = RNG.random(8), RNG.random(8), 100 * RNG.random(8)
    plain, lucky = paired_difference(a, b), paired_difference(a + luck, b + luck)
    assert (lucky.mean, lucky.low) == pytest.approx((plain.mean, plain.low), rel=1e-9)


def test_agreement_is_the_share_of_images_with_the_means_sign() -> None:
    assert paired_difference(np.array([3.0, 3, 3, -1]), np.zeros(4)).agreement == 0.75
    assert paired_difference(np.array([-3.0, -3, 1, 1]), np.zeros(4)).agreement == 0.5


def test_one_image_has_an_infinite_interval() -> None:
    found = paired_difference(np.array([2.0]), np.array([1.0]))
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert half_width(np.array([1.0])) == math.inf


@pytest.mark.parametrize(("shift", "excludes"), [(1.0, True), (-1.0, True), (0.0, False)])
def test_zero_is_excluded_only_when_the_whole_interval_lies_on_one_side(shift: float, excludes: bool) -> None:
    wobble = np.array([-0.1, 0.1, -0.2, 0.2])
    found = paired_difference(wobble + shift, np.zeros(4))
    assert (found.low > 0 or found.high < 0) is excludes


def test_no_difference_at_all_agrees_with_nothing_and_is_not_certain() -> None:
    found = paired_difference(np.ones(5), np.ones(5))
    assert (found.mean, found.low, found.high, found.agreement) == (0, 0, 0, 0)
