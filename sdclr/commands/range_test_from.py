"""`sdclr range-test --from curves.csv`: the same verdict, from curves that another program logged. Trains and writes nothing.

The slowest rate whose loss has levelled off is the reference; every faster rate is an arm, read up to the exposure at which
the range test would have compared it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdclr.config import source
from sdclr.config.schema import RangeTestSection
from sdclr.data import curves as curves_
from sdclr.data.curves import Curves
from sdclr.engine.answer import as_answer, refuse_inconclusive, tell, with_run
from sdclr.engine.fit import settle_batch
from sdclr.engine.plan import read_inputs
from sdclr.errors import DataError
from sdclr.lr.bounds import Arm, Bounds, analyse, has_passed_best, least_exposure
from sdclr.report import console


def range_test_from(
    path: Path, config_path: Path | None = None, overrides: Sequence[str] = (), as_json: bool = False
) -> None:
    """Print what the curves say. With a config, its range_test section judges and the run that follows is planned too.

    Raises Inconclusive (exit 3), after reporting, when the curves cannot say.
    """
    curves = curves_.read(path)
    loaded = source.load(config_path, overrides) if config_path else None
    settings = loaded.config.range_test if loaded else RangeTestSection()
    if len(curves.images) == 1:
        console.warn(f"{path}: shows one image (or an average), so how much images differ cannot be told")
    answer = as_result(curves, settings)
    if loaded:
        answer = with_run(answer, loaded.config, read_inputs(settle_batch(loaded)))
    tell(answer, as_json)
    refuse_inconclusive(answer, "the curves")


def as_result(curves: Curves, settings: RangeTestSection) -> dict[str, Any]:
    """As result.json of a range test, without the run that follows, cost and fingerprint."""
    bounds, reference = judge_curves(curves, settings)
    steps = {arm.lr: round(float(arm.exposure[-1]) / arm.lr) for arm in curves.arms if len(arm.exposure)}
    return as_answer(bounds, bounds.reasons, curves.base, reference, reference, steps)


def judge_curves(curves: Curves, settings: RangeTestSection) -> tuple[Bounds, Arm]:
    """The range test's analysis of the curves, and the arm that served as its reference."""
    usable = [arm for arm in curves.arms if len(arm.exposure) and not arm.diverged]
    if not usable:
        raise DataError(["the curves show no arm whose losses stay finite"], hint="log slower rates")
    passed = (arm for arm in usable if has_passed_best(curves.base, arm))
    reference = next(passed, max(usable, key=lambda a: float(a.exposure[-1])))
    target = settings.test_exposure * least_exposure(curves.base, reference)
    arms = [_upto(arm, target) for arm in curves.arms if arm.lr > reference.lr]
    known = [arm for arm in arms if arm.diverged or arm.exposure[-1] <= reference.exposure[-1]]
    return analyse(curves.base, reference, known, settings.tolerance, settings.raggedness), reference


def _upto(arm: Arm, target: float) -> Arm:
    """The arm's points up to an exposure; its first where that lies beyond. A divergence after the exposure does not count."""
    if not len(arm.exposure):  # lost before its first measurement: one point that says so
        return dataclasses.replace(arm, exposure=np.array([arm.lr]), losses=np.full((1, arm.losses.shape[1]), math.inf))
    keep = max(1, int(np.sum(arm.exposure <= target * (1 + 1e-9))))
    cut = keep < len(arm.exposure) or arm.exposure[-1] >= target
    return Arm(arm.lr, arm.exposure[:keep], arm.losses[:keep], arm.diverged and not cut)
