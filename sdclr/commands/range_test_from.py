"""`sdclr range-test --from curves.csv`: the same verdict, from curves that another program logged. Trains and writes nothing.

The slowest rate whose loss has levelled off is the reference; every faster rate is an arm, read up to the exposure at which
the range test would have compared it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdclr.commands.range_test import recommend
from sdclr.config import source
from sdclr.config.schema import RangeTestSection
from sdclr.data import curves as curves_
from sdclr.data.curves import Curves
from sdclr.engine.fit import settle_batch
from sdclr.engine.plan import read_inputs
from sdclr.errors import DataError, Inconclusive
from sdclr.lr.bounds import Arm, ArmVerdict, Bounds, analyse, has_passed_best, least_exposure
from sdclr.report import console, page
from sdclr.report.metrics import SCHEMA, finite


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
    result = as_result(curves, settings)
    if loaded and result["verdict"] == "conclusive":
        values = result["ceiling"]["lr"], result["best_exposure"]["value"]
        result["recommended"] = recommend(loaded.config, read_inputs(settle_batch(loaded)), *values)
    _print(result, as_json)
    if result["verdict"] != "conclusive":
        texts = "; ".join(reason["text"] for reason in result["reasons"])
        raise Inconclusive(f"the curves cannot say: {texts}", hint=result["reasons"][0]["remedy"])


def as_result(curves: Curves, settings: RangeTestSection) -> dict[str, Any]:
    """As result.json of a range test, without cost and fingerprint."""
    bounds, reference = judge_curves(curves, settings)
    ceiling, best, gain = bounds.ceiling, bounds.best_exposure, bounds.gain
    steps = {arm.lr: round(float(arm.exposure[-1]) / arm.lr) for arm in curves.arms if len(arm.exposure)}
    record = {
        "verdict": "conclusive" if ceiling and best and not bounds.reasons else "inconclusive",
        "reasons": [dataclasses.asdict(reason) for reason in bounds.reasons],
        "ceiling": {"lr": ceiling.value, "bracket": [ceiling.low, ceiling.high]} if ceiling else None,
        "best_exposure": {"value": best.value, "interval": [best.low, best.high], "lr": reference.lr} if best else None,
        "gain": dataclasses.asdict(gain) | {"base_loss": float(np.mean(curves.base))} if gain else None,
        "recommended": None,
        "reference": {"lr": reference.lr, "steps": steps[reference.lr]},
        "arms": [_record(arm, steps.get(arm.lr, 0)) for arm in bounds.arms],
    }
    plain: dict[str, Any] = finite(record)
    return plain


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


def _record(arm: ArmVerdict, steps: int) -> dict[str, Any]:
    values = dataclasses.asdict(arm)
    return {"lr": values.pop("lr"), "steps": steps, **values, "per_image": list(arm.per_image)}


def _print(result: dict[str, Any], as_json: bool) -> None:
    console.table(page.arm_rows(result), page.ARM_HEADER, title="arms, at equal exposure, as shares of the gain")
    if as_json:
        console.result(json.dumps({"schema": SCHEMA, **result}, allow_nan=False))
    elif result["verdict"] == "conclusive":
        console.result(page.answer(result))
