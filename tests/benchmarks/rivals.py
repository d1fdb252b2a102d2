"""What else a user might do: the ramps of the field with their own readings, a fixed-length sweep, a constant default, Prodigy.

Readings are written from their formulas, in the versions named: fastai 2.8.12 (`valley`, `steep`), Lightning 7f0c343
(`lr_find`'s suggestion), and the linear ramp read at its minimum (Smith 2017, arXiv 1506.01186, section 3.3, as EveryDream2's
users read it off a validation curve). Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101) comes from its authors' package (prodigyopt).
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import trials
from stage import Judge, Place, log_points
from truth import excess_at

from sdclr.engine.run import Run
from sdclr.lr.schedule import exponential_ramp, linear_ramp
from sdclr.model import adapters

FASTAI, LIGHTNING, RAMP_STEPS = (1e-7, 10.0), (1e-8, 1.0), 100
SMOOTHING, STOP = 0.98, 4.0
"""Both smooth the training loss by a debiased exponential mean and stop when it exceeds four times its best."""


def rates(
    place: Place, seed: int, truth: dict[str, Any], lengths: Sequence[int], sweep: Sequence[int]
) -> dict[str, float]:
    """Each rival's learning rate, from one training seed; ramps are measured on the user's own split."""
    top = truth["screen_top"]
    found: dict[str, float] = {}
    for steps in lengths:
        ramp = _held_out_curve(place, seed, f"linear-{steps}", linear_ramp(0.0, top, steps), steps, max(1, steps // 25))
        lowest = ramp["steps"][int(np.argmin(ramp["losses"]))] if ramp["losses"] else 1
        found[f"linear ramp, {steps} steps, minimum"] = ramp["rates"][lowest - 1] or ramp["rates"][1]
    fast = _held_out_curve(place, seed, "fastai", exponential_ramp(*FASTAI, RAMP_STEPS), RAMP_STEPS, RAMP_STEPS)
    found["fastai valley"], found["fastai steep"] = fastai(fast["rates"], fast["train_losses"])
    # Lightning raises the rate once before its first step: lr_min·(max/min)^((k+1)/N).
    low, high = LIGHTNING
    light = _held_out_curve(
        place, seed, "lightning", lambda k: low * (high / low) ** ((k + 1) / RAMP_STEPS), RAMP_STEPS, RAMP_STEPS
    )
    found["Lightning"] = lightning(light["rates"], light["train_losses"])
    grid = [row["lr"] for row in truth["rates"]]
    for steps in sweep:
        found[f"sweep of {steps} steps"] = _sweep(place, seed, _half_decades(grid), steps)
    found["constant default"] = math.sqrt(grid[0] * grid[-1])
    return found


def compare(
    place: Place, seed: int, truth: dict[str, Any], found: dict[str, float], cap: int, runs: bool
) -> list[dict[str, Any]]:
    """Each rival's rate against the ceiling, what a constant run at it loses at its best, and the regret of a cyclical run up to it.

    The run is as long as an ideal recommended one (peaks at half the true ceiling, exposure S*), a length no rival could know;
    without `runs` none is trained.
    """
    steps = _ideal_steps(truth, cap)
    records = []
    for rival, lr in found.items():
        ratio = math.log10(lr / truth["ceiling"]) if truth["ceiling"] else None
        record = {"rival": rival, "seed": seed, "lr": lr, "decades_from_ceiling": ratio}
        record["excess_at_best"] = excess_at(truth, lr)
        if runs:
            name = f"rival-{lr:.3e}-{steps}-seed-{seed}"
            run = place.piece(name, lambda name=name, lr=lr: trials.train(Judge(place, seed), name, lr, steps))
            record |= {"steps": steps} | trials.regret(truth, run)
        records.append(record)
    return records


def prodigy(place: Place, seed: int, truth: dict[str, Any], cap: int) -> dict[str, Any]:
    """A run of the ideal length by Prodigy, which finds its rate itself, as its authors advise for diffusion: lr 1 on a cosine.

    `lr` is the rate that it has found by the end: one of Adam's scale, whatever the case's optimizer.
    """
    steps = _ideal_steps(truth, cap)

    def make() -> dict[str, Any]:
        from prodigyopt import Prodigy

        judge, made = Judge(place, seed), []

        def own() -> Prodigy:
            weights = [p for module in judge.run.modules.values() for p in adapters.trained(module)]
            with contextlib.redirect_stdout(sys.stderr):  # it says so when it decouples weight decay
                made.append(
                    Prodigy(weights, lr=1.0, weight_decay=0.01, safeguard_warmup=True, use_bias_correction=True)
                )
            return made[-1]

        judge.run._new_optimizer = own  # type: ignore[method-assign]
        points = log_points(steps, max(1, steps // 20))
        curve = judge.short_curve("prodigy", lambda step: (1 + math.cos(math.pi * step / steps)) / 2, steps, points)
        return curve | {"lr": float(made[-1].param_groups[0]["d"])}

    run = place.piece(f"rival-prodigy-{steps}-seed-{seed}", make)
    return {"rival": "Prodigy", "seed": seed, "lr": run["lr"], "steps": steps, **trials.regret(truth, run)}


def _ideal_steps(truth: dict[str, Any], cap: int) -> int:
    """Steps that collect S* on a cyclical run with peaks at half the ceiling; `cap` where brute force found no ceiling."""
    return max(8, min(cap, round(4 * truth["best_exposure"] / truth["ceiling"]))) if truth["ceiling"] else cap


def _held_out_curve(place: Place, seed: int, kind: str, lr_at: Any, steps: int, every: int) -> dict[str, Any]:
    """A ramp on the user's split, measured on the user's few held-out pictures."""
    name = f"ramp-{kind}-seed-{seed}"

    def make() -> dict[str, Any]:
        user = _User(place, seed)
        return user.curve(name, lr_at, steps, range(every, steps, every))

    return place.piece(name, make)


class _User(Judge):
    """A judge that sees only what the user holds out."""

    def __init__(self, place: Place, seed: int):
        self.loaded, self.inputs = place.load(seed)
        self.config = self.loaded.config
        self.run = Run(self.config, self.inputs)
        assert self.run.held_out is not None
        self.held_out = self.run.held_out
        self.draws = self.run.draws(self.held_out)


def _sweep(place: Place, seed: int, grid: Sequence[float], steps: int) -> float:
    """The rate whose loss on the user's held-out pictures is lowest after so many steps."""
    final = {}
    for lr in grid:
        curve = _held_out_curve(place, seed, f"sweep-{steps}-{lr:.3e}", lambda step, lr=lr: lr, steps, steps)
        final[lr] = curve["losses"][-1] if curve["losses"] else math.inf
    return min(final, key=lambda lr: final[lr])


def _half_decades(grid: Sequence[float]) -> list[float]:
    """Every rate of the grid that lies at least 0.45 decades from the one taken before it."""
    taken: list[float] = []
    for lr in grid:
        if not taken or lr / taken[-1] > 10**0.45:
            taken.append(lr)
    return taken


def smoothed(losses: Sequence[float]) -> list[float]:
    """Debiased exponential mean, cut where a loss is not finite or the mean exceeds four times its best."""
    mean, best, out = 0.0, math.inf, []
    for i, loss in enumerate(losses):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        value = mean / (1 - SMOOTHING ** (i + 1))
        if not math.isfinite(value):
            break
        out.append(value)
        if i > 0 and value > STOP * best:
            break
        best = min(best, value)
    return out


def fastai(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """`valley` and `steep`: the first tenth of the steps and the last five dropped.

    Valley: halfway into the longest falling subsequence of length L that ends first, index start + ⌊L/3⌋ + ⌊L/6⌋, where start is the
    end's index less L. Steep: where Δloss/Δln lr is lowest.
    """
    means = smoothed(losses)
    first, end = len(losses) // 10, max(len(losses) // 10 + 2, len(means) - 5)
    y, x = np.array(means[first:end]), np.array(lrs[first:end])[: len(means[first:end])]
    if len(y) < 2:
        return float(lrs[0]), float(lrs[0])
    longest = [1] * len(y)
    for i in range(1, len(y)):
        longest[i] = max([longest[j] + 1 for j in range(i) if y[i] < y[j]], default=1)
    stop = int(np.argmax(longest))
    sections = longest[stop] / 3
    valley = stop - longest[stop] + int(sections) + int(sections / 2)
    steep = int(np.argmin(np.diff(y) / np.diff(np.log(x))))
    return float(x[max(0, valley)]), float(x[steep])


def lightning(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """The first ten and the last step dropped; where the gradient with respect to lr (not to ln lr) is lowest."""
    means = smoothed(losses)[10:-1]
    if len(means) < 2:
        return float(lrs[0])
    x = np.array(lrs[10 : 10 + len(means)])
    return float(x[int(np.argmin(np.gradient(np.array(means), x)))])
