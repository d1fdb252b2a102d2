"""The truth about a case, by brute force: at least nine constant rates from a quarter of the ceiling to several times it, several
training seeds, each to three times the best exposure (or until it has surely passed its own), judged on 64 held-out pictures that no
user would have.

    best loss of a rate   the lowest point of its curve, averaged over seeds
    gain                  untouched loss − the lowest best loss of all rates
    ceiling               the largest rate whose best loss is within a tenth of the gain of the lowest; between two rates, where the
                          excess crosses a tenth, linear in ln lr
    S*                    where the curve of slow rates (a third of the ceiling and below, averaged) first comes within 2 % of the
                          gain of its lowest point, linear in ln S
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from stage import Judge, Place, log_points

from sdclr.lr.schedule import exponential_ramp

TOLERANCE, LEVEL, SCREEN, BROKEN = 0.10, 0.02, (1e-7, 10.0, 33), 1.05
LOWEST, HIGHEST = 4, 6
"""The rates go from the ceiling over the first to the ceiling times the second."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much brute force: rates a decade and in all, training seeds, the longest arm in steps, and points on each curve."""

    per_decade: int = 6
    rates: int = 9
    seeds: int = 3
    cap: int = 3000
    points: int = 14


QUICK = Effort(per_decade=3, rates=5, seeds=1, cap=500, points=9)


def find(place: Place, effort: Effort) -> dict[str, Any]:
    """Train what has not been trained yet, and read the truth off it."""
    judges: dict[int, Judge] = {}

    def judge(seed: int) -> Judge:
        if seed not in judges:
            judges.clear()  # one model in memory
            judges[seed] = Judge(place, seed)
        return judges[seed]

    base = place.piece("base", lambda: {"loss": judge(0).base()})["loss"]
    top = place.piece("screen", lambda: _screen(judge(0), base))["top"]
    pilot = place.piece("pilot", lambda: _pilot(judge(0), top / 10, effort.cap), effort.cap)
    span = pilot["exposure"][-1]

    def arm(lr: float, seed: int) -> dict[str, Any]:
        last = max(1, min(effort.cap, round(span / lr)))
        name = f"truth-{lr:.3e}-seed-{seed}-{last}"
        return place.piece(
            name,
            lambda: judge(seed).short_curve(
                name, lambda step: lr, last, _points(span, lr, last, effort.points), _passed(base)
            ),
            [span, lr, effort.points],
        )

    factor = 10 ** (1 / effort.per_decade)
    rates = [top]
    while len(rates) < 6 * effort.per_decade:  # down to well below the ceiling: fast rates cost little
        found = analyse(base, [(lr, [arm(lr, 0)]) for lr in sorted(rates)], span)
        below = found["ceiling"] and rates[-1] <= found["ceiling"] / LOWEST
        if (below and len(rates) >= effort.rates) or span / rates[-1] > 3 * effort.cap:
            break
        if found["ceiling"] is None and found["gain"] > 0 and len(rates) > effort.rates:
            rates.insert(0, rates[0] * factor)  # nothing was too high yet
        else:
            rates.append(rates[-1] / factor)
    rates = rates[-max(effort.rates, sum(lr <= HIGHEST * (found["ceiling"] or top) for lr in rates)) :]
    arms = {lr: [] for lr in sorted(rates)}
    for seed in range(effort.seeds):
        for lr in arms:
            arms[lr].append(arm(lr, seed))
    return analyse(base, list(arms.items()), span) | {"effort": dataclasses.asdict(effort), "screen_top": top}


def _screen(judge: Judge, base: float) -> dict[str, Any]:
    """The rate at which a fast exponential ramp has broken the model: the grid's top."""
    low, high, steps = SCREEN
    ramp = exponential_ramp(low, high, steps)
    found = judge.curve("screen", ramp, steps, range(2, steps, 2), lambda s, losses: losses[-1] > BROKEN * base)
    return {"top": found["rates"][-1]}


def _pilot(judge: Judge, lr: float, cap: int) -> dict[str, Any]:
    """One arm well below the top, until its exposure is three times that of its lowest loss: how far the others must go.

    It takes eighty steps at least: the first few may waver.
    """

    def enough(exposure: list[float], losses: list[float]) -> bool:
        return len(losses) > 14 and exposure[-1] >= 3 * exposure[int(np.argmin(losses))]

    return judge.short_curve(f"pilot-{lr:.3e}", lambda step: lr, cap, log_points(cap, 2), enough)


def _passed(base: float) -> Callable[[list[float], list[float]], bool]:
    """Has the lowest loss surely been passed: twice its exposure, and a fifth of what was gained lost again?"""

    def passed(exposure: list[float], losses: list[float]) -> bool:
        lowest = int(np.argmin(losses))
        return exposure[-1] >= 2 * exposure[lowest] and losses[-1] - losses[lowest] > 0.2 * (base - losses[lowest])

    return passed


def _points(span: float, lr: float, last: int, count: int) -> list[int]:
    """Steps at which the exposure has grown by equal factors; the same exposures for every rate, as far as whole steps allow."""
    return sorted({min(last, max(1, round(s / lr))) for s in np.geomspace(span / 30, span, count)})


def analyse(base: float, arms: Sequence[tuple[float, Sequence[dict[str, Any]]]], span: float) -> dict[str, Any]:
    """Read the truth off curves: (lr, one curve a seed) from the slowest up."""
    rows = [_row(lr, curves, span) for lr, curves in arms]
    best = min(row["best_loss"] for row in rows)
    gain = base - best
    for row in rows:
        row["excess"] = (row["best_loss"] - best) / gain if gain > 0 else np.inf
    ceiling, bracket = ceiling_of([row["lr"] for row in rows], [row["excess"] for row in rows])
    slow = [row for row in rows if ceiling and row["lr"] <= ceiling / 3 and not row["at_edge"]]
    slow = sorted(slow, key=lambda row: row["best_loss"])[:3] or [min(rows, key=lambda row: row["best_loss"])]
    exposure, losses = average_curve(slow)
    reached = first_within(exposure, losses, base)
    within = losses <= losses.min() + LEVEL * max(base - losses.min(), 0.0)
    return {
        "base": base,
        "best": best,
        "gain": gain,
        "gain_share": gain / base,
        "ceiling": ceiling,
        "bracket": bracket,
        "best_exposure": reached,
        "lowest_at": float(exposure[np.argmin(losses)]),
        "flat": [reached, float(exposure[within].max())],
        "span": span,
        "capped": sum(row["capped"] for row in rows),
        "rates": rows,
    }


def _row(lr: float, curves: Sequence[dict[str, Any]], span: float) -> dict[str, Any]:
    shortest = min(len(curve["losses"]) for curve in curves)
    lost = any(curve["diverged"] for curve in curves) or not shortest
    losses = np.mean([curve["losses"][:shortest] for curve in curves], axis=0)
    exposure = np.array(curves[0]["exposure"][:shortest])
    each = [min(curve["losses"]) for curve in curves if curve["losses"]]
    return {
        "lr": lr,
        "best_loss": float(losses.min()) if not lost else float("inf"),
        "seed_spread": float(np.std(each, ddof=1)) if len(each) > 1 else None,
        "at_edge": bool(shortest and np.argmin(losses) == shortest - 1),
        "capped": bool(shortest and exposure[-1] < min(0.99 * span, 2 * exposure[np.argmin(losses)]) and not lost),
        "exposure": exposure.tolist(),
        "losses": losses.tolist(),
    }


def ceiling_of(rates: Sequence[float], excess: Sequence[float]) -> tuple[float | None, list[float | None]]:
    """Where the excess crosses the tolerance above the largest rate within it, and the two rates around it."""
    within = [i for i, e in enumerate(excess) if e <= TOLERANCE]
    if not within:
        return None, [None, rates[0]]
    i = within[-1]
    if i == len(rates) - 1:
        return None, [rates[i], None]
    above = min(excess[i + 1], 10.0)
    share = (TOLERANCE - excess[i]) / (above - excess[i])
    return float(rates[i] * (rates[i + 1] / rates[i]) ** share), [rates[i], rates[i + 1]]


def average_curve(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of several rates' curves at the exposures of the first, as far as all go; linear in ln S between points."""
    end = min(row["exposure"][-1] for row in rows) * (1 + 1e-3)
    exposure = np.array([s for s in rows[0]["exposure"] if s <= end])
    curves = [np.interp(np.log(exposure), np.log(row["exposure"]), row["losses"]) for row in rows]
    return exposure, np.mean(curves, axis=0)


def first_within(exposure: np.ndarray, losses: np.ndarray, base: float) -> float:
    """Where a curve first comes within LEVEL of the gain of its lowest point, linear in ln S between its points."""
    lowest = losses.min()
    wanted = lowest + LEVEL * max(base - lowest, 0.0)
    i = int(np.argmax(losses <= wanted))
    if i == 0:
        return float(exposure[0])
    share = (losses[i - 1] - wanted) / (losses[i - 1] - losses[i])
    return float(exposure[i - 1] * (exposure[i] / exposure[i - 1]) ** share)


def excess_at(truth: dict[str, Any], lr: float) -> float | None:
    """What a constant run at this rate loses of the gain even when it is stopped at its best; None outside the grid."""
    rates = np.array([row["lr"] for row in truth["rates"]])
    if not rates[0] <= lr <= rates[-1]:
        return None
    excess = [min(row["excess"] if row["excess"] is not None else 10.0, 10.0) for row in truth["rates"]]
    return float(np.interp(np.log(lr), np.log(rates), excess))
