"""A range test's answer, whoever logged the curves: the record that result.json holds, the run that follows, and how both are told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdclr.config.kinds import Section
from sdclr.config.schema import RunConfig
from sdclr.data.batches import Inputs
from sdclr.engine.plan import make_schedule, peak_below, peak_end, steps_to_exposure
from sdclr.errors import Inconclusive, InputError
from sdclr.lr.bounds import Arm, Bounds, Reason
from sdclr.report import console, page
from sdclr.report.metrics import SCHEMA, finite


def as_answer(
    bounds: Bounds,
    reasons: Sequence[Reason],
    base: np.ndarray,
    reference: Arm | None,
    longest: Arm | None,
    steps: Mapping[float, int],
) -> dict[str, Any]:
    """What the analysis found, as result.json has it, without a run that follows; null stands for what is not finite.

    `base` are the untouched model's losses (images,), `steps` those of each arm and of the reference, by their rates; S* was read from
    `longest`.
    """
    ceiling, best, gain = bounds.ceiling, bounds.best_exposure, bounds.gain
    record = {
        "verdict": "conclusive" if ceiling and best and not reasons else "inconclusive",
        "reasons": [dataclasses.asdict(reason) for reason in reasons],
        "ceiling": {"lr": ceiling.value, "bracket": [ceiling.low, ceiling.high]} if ceiling else None,
        "best_exposure": {"value": best.value, "interval": [best.low, best.high], "lr": longest.lr}
        if best and longest
        else None,
        "gain": dataclasses.asdict(gain) | {"base_loss": float(np.mean(base))} if gain else None,
        "recommended": None,
        "reference": {"lr": reference.lr, "steps": steps.get(reference.lr, 0)} if reference else None,
        "arms": [{"lr": arm.lr, "steps": steps.get(arm.lr, 0)} | dataclasses.asdict(arm) for arm in bounds.arms],
    }
    plain: dict[str, Any] = finite(record)
    return plain


def with_run(answer: dict[str, Any], config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """The answer with the run that follows from it, if it is conclusive: peaks at half the ceiling, as many steps as collect κ·S*, and the
    sections of the config that say so, with all else that the user has set in them.

    None follows, with a warning, when the config's schedule cannot have them: what was measured must not be lost over it.
    """
    if answer["verdict"] != "conclusive":
        return answer
    peak, per_epoch = peak_below(answer["ceiling"]["lr"]), inputs.steps_per_epoch
    try:
        steps = steps_to_exposure(config, per_epoch, peak, config.train.kappa * answer["best_exposure"]["value"])
        schedule = make_schedule(config, per_epoch, steps, peak)
        near_peak = peak_end(config, schedule)
        if near_peak:
            raise InputError(f"it {near_peak}", hint="set the schedule otherwise")
    except InputError as problem:
        console.warn(f"no run follows from the answer: {problem.message}\n  {problem.hint}")
        return answer
    run = {
        "policy": schedule.policy,
        "base_lr": schedule.base_lr,
        "max_lr": peak,
        "steps": steps,
        "cycles": schedule.cycles if schedule.half_cycle else None,
    }
    found: dict[str, dict[str, Any]] = {
        "schedule": {"policy": schedule.policy, "base_lr": schedule.base_lr, "max_lr": float(f"{peak:.3g}")},
        "train": {"steps": steps},
    }
    sections = {name: found[name] | _set_beside(getattr(config, name), found[name]) for name in found}
    return answer | {"recommended": run | {"config": sections}}


def _set_beside(section: Section, found: dict[str, Any]) -> dict[str, Any]:
    """What a config's section sets besides what was found, κ apart, of which the steps are."""
    given = section.model_dump(mode="json", exclude_defaults=True)
    return {key: value for key, value in given.items() if key not in found and key != "kappa"}


def tell(answer: dict[str, Any], as_json: bool) -> None:
    """The arms as a table; the answer as JSON or, if it is conclusive, in words and as YAML to paste."""
    console.table(page.arm_rows(answer), page.ARM_HEADER, title="arms, at equal exposure, as shares of the gain")
    if as_json:
        console.result(json.dumps({"schema": SCHEMA, **answer}, allow_nan=False))
    elif answer["verdict"] == "conclusive":
        console.result(page.answer(answer))


def refuse_inconclusive(answer: dict[str, Any], who: str) -> None:
    """Raise Inconclusive (exit 3) where the answer is that, with its reasons and their remedies."""
    if answer["verdict"] != "conclusive":
        texts = "; ".join(reason["text"] for reason in answer["reasons"])
        remedies = dict.fromkeys(reason["remedy"] for reason in answer["reasons"])
        raise Inconclusive(f"{who} cannot say: {texts}", hint="; or ".join(remedies))
