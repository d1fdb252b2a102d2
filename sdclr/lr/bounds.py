"""From arms to an answer: the ceiling of the learning rate as a bracket, the best exposure S* with an interval, or why not.

An *arm* is a short run at one constant rate from the untouched base weights. Arms are compared at equal exposure, image by image, on the
same draws, with a *reference* arm whose rate is low: what differs then is the rate's own doing. Everything here is a
function over arrays; losses may be of any scale.

    gain      G(S) = V(0) − V_ref(S), the reference's
    S*        the least exposure at which the longest arm (the reference, or one that stood up to it) has all but 2 % of the most
              that it gains: the bottom of V is so flat that a handful of images cannot place its minimum, and what lies between
              the two buys nothing but memorised pictures
    excess    e = [V_arm(S) − V_ref(S)] / G(S), a share of the gain; negative when the arm is better
    ragged    sd of the second differences of the arm's excess over its closing points, / √6
    ceiling   the rate at which the excess, fitted as a rising function of ln lr, crosses the tolerance
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import isotonic_regression

from sdclr.lr.paired import Difference, half_width, paired_difference

CLOSING = 5
"""How many of an arm's last points its excess and raggedness are read from."""
LEVEL = 0.02
"""Share of the highest gain that S* forgoes."""
PAST = 1.5
"""An arm has shown its S* when it has gone this many times as far and gained nothing that would move it."""
NEAR = 0.8
"""Share of the highest gain from which on the points of a curve place its top."""
RESAMPLES = 500
"""Of the images, for the interval of S*."""
SLOW = 2.0
"""The ceiling must be this many times the reference's rate, or the reference's own excess hides too much of everybody's."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A run at one rate: exposure at each measured point (points,), rising, and each image's loss there (points, images)."""

    lr: float
    exposure: np.ndarray
    losses: np.ndarray
    diverged: bool = False


@dataclasses.dataclass(frozen=True)
class ArmVerdict:
    """What an arm shows: its excess with a 95 % interval over images, its raggedness, and whether its rate is admissible."""

    lr: float
    excess: float
    low: float
    high: float
    ragged: float
    verdict: str
    per_image: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why the answer is inconclusive, and the cheapest thing that would help."""

    code: str
    text: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The range test's answer. `ceiling` and `best_exposure` are None when the data do not show them at all."""

    ceiling: Estimate | None
    best_exposure: Estimate | None
    gain: Difference | None
    arms: tuple[ArmVerdict, ...]
    reasons: tuple[Reason, ...]

    @property
    def conclusive(self) -> bool:
        return not self.reasons


def analyse(
    base: np.ndarray,
    reference: Arm,
    arms: Sequence[Arm],
    tolerance: float = 0.10,
    raggedness: float = 0.25,
    longest: Arm | None = None,
) -> Bounds:
    """Judge arms against a reference.

    `base` are the untouched model's losses (images,); all losses are of the same images in the same order. S* is read from
    `longest`, an arm that went further than the reference and stood up to it; without one from the reference. Raises ValueError for
    arrays that do not fit each other or exposures that do not rise.
    """
    longest = longest or reference
    _check(base, (reference, longest, *arms))
    best = best_exposure(base, longest)
    gain = paired_difference(base, losses_at(base, longest, best.value))
    reasons = _no_gain(base, gain) or _edge(base, longest, best) or _low_edge(longest, best)
    if any(r.code == "no_gain" for r in reasons):
        return Bounds(None, None, gain, (), tuple(reasons))
    verdicts = tuple(judge(base, reference, arm, tolerance, raggedness) for arm in sorted(arms, key=lambda a: a.lr))
    ceiling, why = find_ceiling(reference.lr, verdicts, tolerance)
    return Bounds(ceiling, best, gain, verdicts, (*reasons, *why))


def best_exposure(base: np.ndarray, reference: Arm) -> Estimate:
    """S* of the reference, its interval by resampling images."""
    gains = base - reference.losses
    draws = np.random.default_rng(0).integers(0, len(base), (RESAMPLES, len(base)))
    values = [_least_exposure(reference.exposure, gains[:, pick].mean(axis=1)) for pick in draws]
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(least_exposure(base, reference), float(low), float(high))


def least_exposure(base: np.ndarray, arm: Arm) -> float:
    """S* of an arm, without an interval."""
    return _least_exposure(arm.exposure, (base - arm.losses).mean(axis=1))


def has_passed_best(base: np.ndarray, arm: Arm) -> bool:
    """Whether an arm has gone far enough beyond its S* to show it."""
    return bool(arm.exposure[-1] >= PAST * least_exposure(base, arm) * (1 - 1e-9))


def losses_at(base: np.ndarray, arm: Arm, exposure: float) -> np.ndarray:
    """Each image's loss at some exposure, linear in ln S between the arm's points (linear in S before the first)."""
    s, losses = arm.exposure, arm.losses
    if exposure <= s[0]:
        share = max(0.0, exposure / s[0])
        return base + share * (losses[0] - base)
    if len(s) == 1:
        return losses[0]
    i = int(np.clip(np.searchsorted(s, exposure), 1, len(s) - 1))
    share = np.clip(np.log(exposure / s[i - 1]) / np.log(s[i] / s[i - 1]), 0, 1)
    return losses[i - 1] + share * (losses[i] - losses[i - 1])


def judge(base: np.ndarray, reference: Arm, arm: Arm, tolerance: float, raggedness: float) -> ArmVerdict:
    """An arm against the reference at the arm's own closing exposures, as shares of the reference's gain there.

    Admissible or inadmissible is what lies surely within or beyond the tolerance; also admissible an arm within half of it, without
    certainty, and inadmissible one that is ragged or no better than the untouched model.
    """
    finite = np.isfinite(arm.losses).all()
    if arm.diverged or not finite:
        return ArmVerdict(arm.lr, float("inf"), float("inf"), float("inf"), float("inf"), "inadmissible")
    closing = range(max(0, len(arm.exposure) - CLOSING), len(arm.exposure))
    rows = []
    for i in closing:
        expected = losses_at(base, reference, float(arm.exposure[i]))
        rows.append((arm.losses[i] - expected) / max(float((base - expected).mean()), 1e-12))
    excess = np.array(rows)
    each = excess[-3:].mean(axis=0)
    half = half_width(each)
    mean = float(each.mean())
    ragged = float(np.sqrt(np.mean(np.diff(excess.mean(axis=1), 2) ** 2) / 6)) if len(rows) > 2 else 0.0
    worse_than_base = bool(arm.losses[-1].mean() >= base.mean())
    if worse_than_base or mean - half > tolerance or ragged > raggedness:
        verdict = "inadmissible"
    elif mean + half <= tolerance or (mean <= tolerance / 2 and ragged <= raggedness / 2):
        verdict = "admissible"
    else:
        verdict = "undetermined"
    return ArmVerdict(arm.lr, mean, mean - half, mean + half, ragged, verdict, tuple(float(v) for v in each))


def find_ceiling(
    reference_lr: float, verdicts: Sequence[ArmVerdict], tolerance: float
) -> tuple[Estimate | None, list[Reason]]:
    """Where the excess crosses the tolerance, bracketed by the largest admissible and the smallest inadmissible rate."""
    rates = np.array([reference_lr, *(v.lr for v in verdicts)])
    bad = [v.lr for v in verdicts if v.verdict == "inadmissible"]
    if not bad:
        return None, [
            Reason(
                "grid_top",
                f"no rate up to {rates.max():.3g} was surely too high",
                "raise the top of the grid: range_test.lr",
            )
        ]
    top = min(bad)
    low = max([reference_lr, *(v.lr for v in verdicts if v.verdict == "admissible" and v.lr < top)])
    excess = np.array([0.0, *(min(v.excess, 10.0) for v in verdicts)])
    order = np.argsort(rates)
    fitted = isotonic_regression(excess[order]).x
    crossing = _crossing(np.log(rates[order]), fitted, tolerance)
    value = float(np.clip(np.exp(crossing), low, top))
    reasons = []
    if top / low > 10.001:
        undecided = sum(1 for v in verdicts if low < v.lr < top)
        reasons.append(
            Reason(
                "wide_bracket",
                f"the ceiling lies between {low:.3g} and {top:.3g}, more than a factor of ten; {undecided} rate(s) between could not be decided",
                "hold out more images (range_test.fraction), or more arms: range_test.arms_per_decade",
            )
        )
    if value < SLOW * reference_lr:
        reasons.append(
            Reason(
                "fast_reference",
                f"the ceiling seems to be {value:.3g}, less than twice the slowest rate, {reference_lr:.3g}, which others are compared with",
                "let the grid begin lower: range_test.lr",
            )
        )
    return Estimate(value, low, top), reasons


def _crossing(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Where a rising curve, linear between its points, first reaches the level."""
    above = int(np.argmax(y > level)) if (y > level).any() else len(y) - 1
    if above == 0 or y[above] == y[above - 1]:
        return float(x[above])
    share = (level - y[above - 1]) / (y[above] - y[above - 1])
    return float(x[above - 1] + np.clip(share, 0, 1) * (x[above] - x[above - 1]))


def _least_exposure(s: np.ndarray, gains: np.ndarray) -> float:
    """Where the curve of gains first comes within LEVEL of its top, by a parabola in ln S through the points around the highest.

    The highest point itself where nothing is gained; the first such point of the raw curve where the parabola has no top.
    """
    i = int(np.argmax(gains))
    if gains[i] <= 0:
        return float(s[i])
    near = slice(*_around(gains >= NEAR * gains[i], i))
    x, y = np.log(s[near]), gains[near]
    a, b, c = np.polyfit(x - x[0], y, 2) if len(x) > 2 else (0.0, 0.0, 0.0)
    if a >= -1e-12 * gains[i]:
        return float(s[np.argmax(gains >= (1 - LEVEL) * gains[i])])
    top = np.polyval((a, b, c), np.clip(-b / (2 * a), 0, x[-1] - x[0]))
    reached = (-b + math.sqrt(max(0.0, b * b - 4 * a * (c - (1 - LEVEL) * top)))) / (2 * a)
    return float(np.exp(x[0] + np.clip(reached, 0, x[-1] - x[0])))


def _around(wanted: np.ndarray, i: int, least: int = 2) -> tuple[int, int]:
    """First and last + 1 of the unbroken run of wanted points around i, and of at least `least` points to either side."""
    before, after = np.flatnonzero(~wanted[:i]), np.flatnonzero(~wanted[i:])
    first = int(before[-1]) + 1 if len(before) else 0
    end = i + int(after[0]) if len(after) else len(wanted)
    return max(0, min(first, i - least)), max(end, min(len(wanted), i + least + 1))


def _no_gain(base: np.ndarray, gain: Difference) -> list[Reason]:
    if gain.low > 0:
        return []
    more = "hold out more images (range_test.fraction), or measure more finely: validation.timesteps_per_image"
    if gain.mean > 0 and gain.agreement < 0.75:
        text = f"only {gain.agreement:.0%} of the {gain.images} held-out images gain from training at all"
        return [Reason("no_gain", text, f"check that captions describe the pictures; {more}")]
    share, low, high = (value / float(np.mean(base)) for value in (gain.mean, gain.low, gain.high))
    if gain.images == 1:
        text = f"one held-out image cannot show whether others gain as well ({share:+.2%} of the base loss)"
    else:
        text = f"the held-out images show no certain gain ({share:+.2%} of the base loss, interval {low:+.2%} to {high:+.2%})"
    return [Reason("no_gain", text, more)]


def _low_edge(longest: Arm, best: Estimate) -> list[Reason]:
    if best.value > longest.exposure[0] * (1 + 1e-9):
        return []
    return [
        Reason(
            "low_edge",
            f"all there is to gain is gained by the first measurement of the arm at {longest.lr:.3g} (S* ≤ {best.value:.3g}): "
            "the model may know these images already",
            "train on pictures that it does not know, or start from another model: model.base",
        )
    ]


def _edge(base: np.ndarray, longest: Arm, best: Estimate) -> list[Reason]:
    if has_passed_best(base, longest):
        return []
    return [
        Reason(
            "edge",
            f"the loss was still falling at the end of the arm at {longest.lr:.3g}: S* ≥ {best.value:.3g}",
            "longer arms: range_test.max_steps",
        )
    ]


def _check(base: np.ndarray, arms: Sequence[Arm]) -> None:
    for arm in arms:
        if arm.losses.shape != (len(arm.exposure), len(base)):
            raise ValueError(
                f"arm {arm.lr:g}: losses are {arm.losses.shape}, expected ({len(arm.exposure)} points, {len(base)} images)"
            )
        if not len(arm.exposure) and arm.diverged:
            continue  # lost before its first measurement: inadmissible all the same
        if len(arm.exposure) == 0 or not (np.diff(arm.exposure) > 0).all() or arm.exposure[0] <= 0:
            raise ValueError(f"arm {arm.lr:g}: exposures must be positive and rise")
