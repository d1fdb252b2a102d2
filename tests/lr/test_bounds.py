"""The range test's judgement on arms whose best exposure and ceiling are known, because they were made so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sdclr.lr.bounds import Arm, Bounds, analyse, has_passed_best, losses_at

BEST, REFERENCE, CEILING, TOLERANCE = 2e-4, 1e-6, 2e-5, 0.10
"""True values of the made-up world: where the loss is lowest, and so on. An arm's excess is TOLERANCE · (lr / CEILING)²: it crosses the tolerance at CEILING."""
IMAGES = 12
FACTORS = np.linspace(0.8, 1.2, IMAGES)
"""What multiplies a loss of each image: pictures differ, as real ones do."""


def true_losses(exposure: np.ndarray, best: float = BEST) -> np.ndarray:
    """V(S) = a + b · (ln S/S*)² for each image, shape (points, images); 20 % below the untouched model at its best."""
    curve = 0.8 + 0.02 * np.log(exposure / best) ** 2
    return curve[:, None] * FACTORS


BASE = 1.0 * FACTORS


def reference(end: float = 8 * BEST, points: int = 25, noise: float = 0.0) -> Arm:
    exposure = np.geomspace(BEST / 16, end, points)
    wobble = noise * np.random.default_rng(1).normal(size=(points, IMAGES))
    return Arm(REFERENCE, exposure, true_losses(exposure) + wobble)


def arm(lr: float, noise: float = 0.0) -> Arm:
    """A short run to half the best exposure, worse than the reference by a share of the gain that grows with the rate."""
    exposure = BEST / 2 * np.array([0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    expected = true_losses(exposure)
    gain = (BASE - expected).mean(axis=1, keepdims=True)
    rng = np.random.default_rng(round(1e9 * lr))
    excess = TOLERANCE * (lr / CEILING) ** 2 * rng.uniform(0.8, 1.2, IMAGES) + noise * rng.normal(size=expected.shape)
    return Arm(lr, exposure, expected + excess * gain)


RATES = [float(rate) for rate in REFERENCE * 10 ** (np.arange(1, 9) / 4)]


def judged(rates: list[float] = RATES, noise: float = 0.0) -> Bounds:
    return analyse(BASE, reference(), [arm(rate, noise) for rate in rates], TOLERANCE)


def codes(bounds: Bounds) -> set[str]:
    return {reason.code for reason in bounds.reasons}


def as_numbers(bounds: Bounds) -> list[float]:
    """All that is said of the data, as numbers without a unit of loss."""
    assert bounds.ceiling
    assert bounds.best_exposure
    values = [*dataclasses.astuple(bounds.ceiling), *dataclasses.astuple(bounds.best_exposure)]
    for verdict in bounds.arms:
        values += [verdict.lr, verdict.excess, verdict.low, verdict.high, verdict.ragged]
    return values


def reached(best: float = BEST, gain: float = 0.2) -> float:
    """Where V(S) has come within 2 % of the gain of its minimum: 0.02 · (ln S/S*)² = 0.02 · gain."""
    return float(best * np.exp(-np.sqrt(0.02 * gain / 0.02)))


def test_the_best_exposure_of_a_parabola_is_found_within_one_percent() -> None:
    found = judged().best_exposure
    assert found
    assert found.value == pytest.approx(reached(), rel=0.01)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("best_at", [BEST / 3, BEST, 3 * BEST])
def test_the_best_exposure_is_found_wherever_it_lies_between_the_points(best_at: float) -> None:
    exposure = np.geomspace(BEST / 40, 40 * BEST, 24)
    made = Arm(REFERENCE, exposure, true_losses(exposure, best_at))
    found = analyse(1.3 * FACTORS, made, [arm(RATES[0])]).best_exposure
    assert found
    assert found.value == pytest.approx(reached(best_at, 0.5), rel=0.02)


def test_the_best_exposure_of_noisy_losses_lies_in_its_interval() -> None:
    found = analyse(BASE, reference(noise=0.01), [arm(rate) for rate in RATES]).best_exposure
    assert found
    assert found.low < reached() < found.high
    assert found.high / found.low < 1.5


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_the_best_exposure_by_little_where_it_moves_the_minimum_by_much(seed: int) -> None:
    """One per cent of the gain, on the mean loss: the lowest point is anywhere on the flat bottom."""
    exposure = np.geomspace(BEST / 16, 4 * BEST, 16)
    wobble = 0.002 * np.random.default_rng(seed).normal(size=(16, 1))
    found = analyse(BASE, Arm(REFERENCE, exposure, true_losses(exposure) + wobble), []).best_exposure
    assert found
    assert found.value == pytest.approx(reached(), rel=0.15)


def test_a_gain_that_has_levelled_off_is_past_its_best_and_one_that_still_grows_is_not() -> None:
    exposure = np.geomspace(1e-5, 1e-3, 24)

    def made(gains: np.ndarray) -> Arm:
        return Arm(REFERENCE, exposure, (1 - gains)[:, None] * FACTORS)

    assert has_passed_best(BASE, made(0.2 * (1 - np.exp(-exposure / 1e-4))))  # 98 % at 3.9e-4
    assert not has_passed_best(BASE, made(0.2 * (1 - np.exp(-exposure / 4e-4))))
    assert not has_passed_best(BASE, made(0.02 * np.log(exposure / 1e-6)))
    assert has_passed_best(BASE, made(-exposure)), "losses that only rise"
    assert not has_passed_best(BASE, made(exposure - 0.1)), "losses that fall from above the untouched model's"


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_ceiling_is_where_the_excess_crosses_the_tolerance(noise: float) -> None:
    bounds = judged(noise=noise)
    assert bounds.conclusive
    assert bounds.ceiling
    assert bounds.ceiling.low < CEILING < bounds.ceiling.high
    assert bounds.ceiling.value == pytest.approx(CEILING, rel=0.35)


def test_the_ceilings_bracket_is_the_largest_good_and_the_smallest_bad_rate() -> None:
    bounds = judged()
    assert bounds.ceiling
    verdicts = {verdict.lr: verdict.verdict for verdict in bounds.arms}
    assert verdicts[bounds.ceiling.low] == "admissible"
    assert verdicts[bounds.ceiling.high] == "inadmissible"
    assert not any(verdict == "inadmissible" for lr, verdict in verdicts.items() if lr < bounds.ceiling.high)


def test_losses_a_thousand_times_as_large_change_no_number() -> None:
    arms = [arm(rate) for rate in RATES]
    large = [dataclasses.replace(a, losses=1000 * a.losses) for a in (reference(), *arms)]
    assert as_numbers(analyse(1000 * BASE, large[0], large[1:])) == pytest.approx(
        as_numbers(analyse(BASE, reference(), arms)), rel=1e-6, abs=1e-9
    )


def test_the_order_of_the_arms_changes_nothing() -> None:
    arms = [arm(rate, 0.02) for rate in RATES]
    forwards, backwards = analyse(BASE, reference(), arms), analyse(BASE, reference(), arms[::-1])
    assert forwards == backwards
    assert [verdict.lr for verdict in forwards.arms] == RATES


def test_the_order_of_the_images_changes_no_number_beyond_resampling() -> None:
    pick = np.random.default_rng(3).permutation(IMAGES)
    arms = [arm(rate) for rate in RATES]
    shuffled = [dataclasses.replace(a, losses=a.losses[:, pick]) for a in (reference(), *arms)]
    before, after = analyse(BASE, reference(), arms), analyse(BASE[pick], shuffled[0], shuffled[1:])
    assert as_numbers(after) == pytest.approx(as_numbers(before), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_arm_with_a_loss_that_is_no_number_is_inadmissible(bad: float) -> None:
    broken = arm(RATES[6])
    broken.losses[-1, 3] = bad
    bounds = analyse(BASE, reference(), [arm(RATES[0]), broken])
    assert [verdict.verdict for verdict in bounds.arms] == ["admissible", "inadmissible"]
    assert bounds.ceiling
    assert (bounds.ceiling.low, bounds.ceiling.high) == (RATES[0], RATES[6])
    assert RATES[0] <= bounds.ceiling.value <= RATES[6]


def test_an_arm_that_was_lost_before_its_first_measurement_is_inadmissible() -> None:
    lost = Arm(RATES[-1], np.empty(0), np.empty((0, len(BASE))), diverged=True)
    bounds = analyse(BASE, reference(), [arm(RATES[0]), lost])
    assert bounds.arms[-1].verdict == "inadmissible" and bounds.ceiling is not None


def test_an_arm_that_diverged_is_inadmissible_whatever_its_last_losses() -> None:
    bounds = analyse(BASE, reference(), [dataclasses.replace(arm(RATES[0]), diverged=True)])
    assert bounds.arms[0].verdict == "inadmissible"


def test_an_arm_worse_than_the_untouched_model_is_inadmissible() -> None:
    good = arm(RATES[0])
    bounds = analyse(BASE, reference(), [dataclasses.replace(good, losses=np.tile(1.01 * BASE, (7, 1)))])
    assert bounds.arms[0].verdict == "inadmissible"


def test_an_arm_that_jumps_up_and_down_is_inadmissible_though_its_mean_is_good() -> None:
    good = arm(RATES[0])
    gain = float((BASE - good.losses[-1]).mean())
    jumps = 0.6 * gain * np.array([0, 0, 1, -1, 1, -1, 0])[:, None]
    bounds = analyse(BASE, reference(), [dataclasses.replace(good, losses=good.losses + jumps)])
    assert bounds.arms[0].ragged > 0.25
    assert bounds.arms[0].excess < TOLERANCE
    assert bounds.arms[0].verdict == "inadmissible"


def test_an_arm_that_equals_the_reference_has_no_excess_and_no_raggedness() -> None:
    made = reference()
    same = Arm(2e-6, made.exposure[8:18], made.losses[8:18])
    verdict = analyse(BASE, made, [same]).arms[0]
    assert verdict.excess == pytest.approx(0, abs=1e-9)
    assert verdict.ragged == pytest.approx(0, abs=1e-9)
    assert verdict.verdict == "admissible"


def test_an_arm_better_than_the_reference_is_admissible() -> None:
    good = arm(RATES[0])
    assert (
        analyse(BASE, reference(), [dataclasses.replace(good, losses=0.99 * good.losses)]).arms[0].verdict
        == "admissible"
    )


def test_an_arm_whose_images_disagree_is_not_decided() -> None:
    good = arm(RATES[0])
    gain = float((BASE - good.losses[-1]).mean())
    disagreement = gain * (0.09 + 0.5 * np.resize([1.0, -1.0], IMAGES))
    bounds = analyse(BASE, reference(), [dataclasses.replace(good, losses=good.losses + disagreement)])
    assert bounds.arms[0].verdict == "undetermined"
    assert bounds.arms[0].low < TOLERANCE < bounds.arms[0].high


def test_flat_data_show_no_gain_and_no_number() -> None:
    flat = Arm(REFERENCE, np.geomspace(1e-5, 1e-3, 12), np.tile(BASE, (12, 1)))
    bounds = analyse(BASE, flat, [arm(rate) for rate in RATES])
    assert codes(bounds) == {"no_gain"}
    assert bounds.ceiling is None
    assert bounds.best_exposure is None
    assert not bounds.conclusive


@pytest.mark.parametrize("seed", range(5))
def test_pure_noise_shows_no_gain(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noisy = Arm(REFERENCE, np.geomspace(1e-5, 1e-3, 6), 1 + 0.3 * rng.normal(size=(6, 6)))
    bounds = analyse(1 + 0.3 * rng.normal(size=6), noisy, [])
    assert "no_gain" in codes(bounds)


def test_one_held_out_image_is_never_enough() -> None:
    made = reference()
    single = dataclasses.replace(made, losses=made.losses[:, :1])
    assert "no_gain" in codes(analyse(BASE[:1], single, []))


def test_a_loss_still_falling_at_the_end_is_an_edge() -> None:
    bounds = analyse(BASE, reference(end=BEST / 2), [arm(rate) for rate in RATES])
    assert "edge" in codes(bounds)
    assert bounds.best_exposure
    assert BEST / 3 < bounds.best_exposure.value <= BEST / 2


def late(first: float = BEST) -> Arm:
    """An arm whose lowest loss is that of its first point."""
    exposure = np.geomspace(first, 8 * first, 12)
    return Arm(REFERENCE, exposure, true_losses(exposure))


@pytest.mark.parametrize("first", BEST * np.linspace(1, 1.5, 20))
def test_a_loss_that_only_rises_after_the_first_measurement_is_a_low_edge(first: float) -> None:
    assert codes(analyse(BASE, late(first), [arm(rate) for rate in RATES])) == {"low_edge"}


def test_an_arm_that_was_cut_short_at_its_first_point_is_no_low_edge() -> None:
    exposure = np.array([BEST, 1.2 * BEST])
    found = analyse(BASE, Arm(REFERENCE, exposure, true_losses(exposure)), [arm(rate) for rate in RATES])
    assert "edge" in codes(found) and "low_edge" not in codes(found)


def test_arms_that_are_all_good_are_the_grids_top_and_give_no_ceiling() -> None:
    bounds = judged(RATES[:3])
    assert {verdict.verdict for verdict in bounds.arms} == {"admissible"}
    assert codes(bounds) == {"grid_top"}
    assert bounds.ceiling is None
    assert bounds.best_exposure


def test_a_bracket_wider_than_ten_is_inconclusive() -> None:
    found = judged([RATES[0], RATES[-1]])
    assert found.ceiling
    assert codes(found) == {"wide_bracket"}


def test_a_ceiling_close_above_the_reference_is_inconclusive_because_the_reference_loses_too() -> None:
    slow = dataclasses.replace(reference(), lr=0.7 * CEILING)
    assert codes(analyse(BASE, slow, [arm(rate) for rate in RATES if rate > slow.lr])) == {"fast_reference"}


def test_every_reason_names_a_key_of_the_config_that_would_help() -> None:
    from sdclr.config.schema import RunConfig

    flat = Arm(REFERENCE, np.geomspace(1e-5, 1e-3, 12), np.tile(BASE, (12, 1)))
    made = [
        *analyse(BASE, flat, []).reasons,
        *analyse(BASE, reference(end=BEST / 2), [arm(rate) for rate in RATES]).reasons,
        *analyse(BASE, late(), [arm(rate) for rate in RATES]).reasons,
        *judged(RATES[:3]).reasons,
        *judged([RATES[-1]]).reasons,
        *analyse(BASE, dataclasses.replace(reference(), lr=0.7 * CEILING), [arm(2 * CEILING)]).reasons,
    ]  # fmt: skip
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    keys = [f"{section}.{key}" for section, model in sections.items() for key in model.model_fields]  # type: ignore[union-attr]
    assert {reason.code for reason in made} == {
        "no_gain",
        "low_edge",
        "edge",
        "grid_top",
        "wide_bracket",
        "fast_reference",
    }
    for reason in made:
        assert any(key in reason.remedy for key in keys), reason.remedy


@pytest.mark.parametrize(
    "broken",
    [
        lambda a: dataclasses.replace(a, losses=a.losses[:, :-1]),
        lambda a: dataclasses.replace(a, losses=a.losses[:-1]),
        lambda a: dataclasses.replace(a, exposure=a.exposure[:-1]),
        lambda a: dataclasses.replace(a, exposure=a.exposure[::-1]),
        lambda a: dataclasses.replace(a, exposure=a.exposure - a.exposure[0]),
        lambda a: dataclasses.replace(a, exposure=np.full_like(a.exposure, 1e-5)),
        lambda a: Arm(a.lr, np.array([]), np.zeros((0, IMAGES))),
    ],
    ids=["an image too few", "a point too few", "an exposure too few", "falling", "from zero", "standing still", "empty"],
)  # fmt: skip
@pytest.mark.parametrize("where", ["reference", "arm"])
def test_arrays_that_do_not_fit_are_a_value_error(broken: object, where: str) -> None:
    assert callable(broken)
    first, second = reference(), arm(RATES[0])
    with pytest.raises(ValueError, match=r"losses are|exposures must"):
        analyse(BASE, broken(first) if where == "reference" else first, [broken(second) if where == "arm" else second])


def test_losses_between_points_are_linear_in_the_logarithm_and_before_the_first_in_exposure() -> None:
    made = Arm(1e-6, np.array([1.0, 4.0]), np.array([[10.0], [20.0]]))
    base = np.array([2.0])
    at = {0.0: 2, 0.5: 6, 1.0: 10, 2.0: 15, 4.0: 20, 9.0: 20}
    assert [float(losses_at(base, made, s)[0]) for s in at] == pytest.approx(list(at.values()))
