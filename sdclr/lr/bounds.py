"""From arms to an answer: the ceiling of the learning rate as a bracket, the best exposure S* with an interval, or why not.

An *arm* is a short run at one constant rate from the untouched base weights. Arms are compared at equal exposure, image by image, on the
same draws, with a *reference* arm whose rate is low: what differs then is the rate's own doing. Everything here is a
function over arrays; losses may be of any scale.

    gain      G(S) = V(0) − V_ref(S), the reference's
    excess    e = [V_arm(S) − V_ref(S)] / G(S), a share of the gain; negative when the arm is better
    ragged    sd of the second differences of the arm's excess over its closing points, / √6
    ceiling   the rate at which the excess, fitted as a rising function of ln lr, crosses the tolerance
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import isotonic_regression

from sdclr.lr.paired import Difference, half_width, paired_difference

CLOSING = 5
"""How many of an arm's last points its excess and raggedness are read from."""


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
    resamples: int = 500,
) -> Bounds:
    """Judge arms against a reference.

    `base` are the untouched model's losses (images,); all losses are of the same images in the same order. Raises ValueError for
    arrays that do not fit each other or exposures that do not rise.
    """
    _check(base, (reference, *arms))
    best = best_exposure(base, reference, resamples)
    at_best = losses_at(base, reference, best.value)
    gain = paired_difference(base, at_best)
    reasons = _no_gain(base, gain) or [*_edge(reference, best)]
    if any(r.code == "no_gain" for r in reasons):
        return Bounds(None, None, gain, (), tuple(reasons))
    verdicts = tuple(judge(base, reference, arm, tolerance, raggedness) for arm in sorted(arms, key=lambda a: a.lr))
    ceiling, why = find_ceiling(reference.lr, verdicts, tolerance)
    return Bounds(ceiling, best, gain, verdicts, (*reasons, *why))


def best_exposure(base: np.ndarray, reference: Arm, resamples: int = 500) -> Estimate:
    """S* of the reference: the minimum of a parabola in ln S through the points around the lowest; interval by resampling images."""
    curve = np.vstack([base, reference.losses])
    s = np.concatenate([[reference.exposure[0] / 4], reference.exposure])
    draws = np.random.default_rng(0).integers(0, len(base), (resamples, len(base)))
    values = [_lowest(s, curve[:, pick].mean(axis=1)) for pick in draws]
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(_lowest(s, curve.mean(axis=1)), float(low), float(high))


def losses_at(base: np.ndarray, arm: Arm, exposure: float) -> np.ndarray:
    """Each image's loss at some exposure, linear in ln S between the arm's points (linear in S before the first)."""
    s, losses = arm.exposure, arm.losses
    if exposure <= s[0]:
        share = max(0.0, exposure / s[0])
        return base + share * (losses[0] - base)
    i = int(np.clip(np.searchsorted(s, exposure), 1, len(s) - 1))
    share = np.clip(np.log(exposure / s[i - 1]) / np.log(s[i] / s[i - 1]), 0, 1) if len(s) > 1 else 1.0
    return losses[i - 1] + share * (losses[i] - losses[i - 1]) if len(s) > 1 else losses[0]


def judge(base: np.ndarray, reference: Arm, arm: Arm, tolerance: float, raggedness: float) -> ArmVerdict:
    """An arm against the reference at the arm's own closing exposures, as shares of the reference's gain there."""
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
    if worse_than_base or (mean - half > 0 and mean > tolerance) or ragged > raggedness:
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
                "grid_top", f"no rate up to {rates.max():.3g} was too high", "raise the top of the grid: range_test.lr"
            )
        ]
    top = min(bad)
    good = [reference_lr, *(v.lr for v in verdicts if v.verdict == "admissible" and v.lr < top)]
    low = max(rate for rate in good if rate < top) if any(rate < top for rate in good) else None
    if low is None:
        return None, [
            Reason(
                "all_inadmissible",
                f"every rate from {rates.min():.3g} up was too high",
                "lower the grid: range_test.lr",
            )
        ]
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
                "hold out more images (validation.fraction), or more arms: range_test.arms_per_decade",
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


def _lowest(s: np.ndarray, v: np.ndarray) -> float:
    """argmin of a parabola in ln S through the lowest point and its neighbours; the point itself at an edge."""
    i = int(np.argmin(v))
    if i in (0, len(v) - 1):
        return float(s[i])
    near = slice(max(0, i - 2), i + 3)
    a, b, _ = np.polyfit(np.log(s[near]), v[near], 2)
    if a <= 0:
        return float(s[i])
    return float(np.exp(np.clip(-b / (2 * a), np.log(s[near][0]), np.log(s[near][-1]))))


def _no_gain(base: np.ndarray, gain: Difference) -> list[Reason]:
    if gain.low > 0:
        return []
    more = "hold out more images (validation.fraction), or measure more finely: validation.timesteps_per_image"
    if gain.mean > 0 and gain.agreement < 0.75:
        text = f"only {gain.agreement:.0%} of the {gain.images} held-out images gain from training at all"
        return [Reason("no_gain", text, f"check that captions describe the pictures; {more}")]
    share = gain.mean / float(np.mean(base))
    interval = f"{gain.low / float(np.mean(base)):+.2%} to {gain.high / float(np.mean(base)):+.2%}"
    return [
        Reason(
            "no_gain",
            f"the held-out images show no certain gain ({share:+.2%} of the base loss, interval {interval})",
            more,
        )
    ]


def _edge(reference: Arm, best: Estimate) -> list[Reason]:
    last = float(reference.exposure[-1])
    if best.value >= last * 0.999:
        return [
            Reason(
                "edge",
                f"the loss was still falling at the end of the reference arm: S* ≥ {last:.3g}",
                "a longer reference: range_test.max_steps",
            )
        ]
    return []


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
