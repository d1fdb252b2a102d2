"""What a run may be resumed from, what may have changed since it began, and when a new one would overwrite it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from sdclr.config import source
from sdclr.config.kinds import Section, Span
from sdclr.config.schema import RunConfig
from sdclr.config.source import LoadedConfig
from sdclr.data.batches import Inputs
from sdclr.engine.checkpoint import FULL, TROUGH, Checkpoint, available, newest_sound, those_in, verify
from sdclr.engine.fingerprint import fingerprint
from sdclr.engine.folder import RunFolder
from sdclr.engine.plan import NoRangeTest, Plan, make_plan
from sdclr.errors import CheckpointError, InputError
from sdclr.report import console, metrics

FREE_TO_CHANGE = ("run.tensorboard", "run.output_dir", "run.name", "sample.", "checkpoint.", "range_test.", "validation.every", "train.early_stop", "train.kappa",
                  "model.attention", "model.gradient_checkpointing", "model.compile", "optimizer.fused_backward", "schedule.allow_peak_end")  # fmt: skip
"""Keys that a resumed run may change: they touch neither the weights nor the meaning of the curves."""
NEVER = ("run.seed", "model.", "lora.", "data.", "mask.", "prior.", "validation.fraction", "optimizer.name", "batch.")
"""Keys that no resumed run can change, not even when asked: it would be another run."""


def resume_point(folder: RunFolder, named: Path | None, typed: str) -> Checkpoint:
    """The checkpoint to go on from. Raises CheckpointError rather than ever starting afresh; `typed` is for its hints."""
    if named:
        checkpoint = Checkpoint.at(named)
        if checkpoint is None or checkpoint.kind != FULL:
            fresh = f"this run has none to go on from; begin it: sdclr train {typed}"
            what = (
                f"is not a checkpoint to resume from ({FULL}-000400)" if named.exists() else "there is no such folder"
            )
            raise CheckpointError(f"{named}: {what}", hint=those_in(folder.checkpoints, (FULL,)) or fresh)
        if named.resolve().parent != folder.checkpoints.resolve():
            raise CheckpointError(
                f"{named}: belongs to another run; this one's are in {folder.checkpoints}",
                hint=f"take the newest whole one: sdclr train {typed} --resume",
            )
        problems = verify(checkpoint)
        if problems:
            raise CheckpointError(
                f"{named}: is damaged: {'; '.join(problems)}",
                hint=f"take the newest whole one: sdclr train {typed} --resume",
            )
        return checkpoint
    found, skipped = newest_sound(folder.checkpoints)
    for line in skipped:
        console.warn(f"skipped a damaged checkpoint: {line}")
    if found is None and skipped:
        raise CheckpointError(
            f"{folder.checkpoints}: holds no sound checkpoint to resume from",
            hint="start another run: --set run.name=...; sdclr sample still draws the troughs and the best that are whole",
        )
    if found is None:
        raise CheckpointError(
            f"{folder.checkpoints}: holds no checkpoint to resume from", hint=f"start it: sdclr train {typed}"
        )
    return found


def plan_again(loaded: LoadedConfig, inputs: Inputs, start: Checkpoint) -> tuple[RunConfig, Plan]:
    """The plan of a run that goes on from `start`, and the config it is made by. Where no range test says any more what `auto` is, that is
    filled in with what the run began with."""
    info, config = start.info(), loaded.config
    done = {"done": start.step, "collected": info["exposure"]}
    try:
        return config, dataclasses.replace(make_plan(loaded, inputs), **done)
    except NoRangeTest as problem:
        why = problem.message.splitlines()[0]
    stored, filled = info["config"], []
    schedule, train = config.schedule, config.train
    if schedule.max_lr == "auto":
        schedule = schedule.model_copy(update={"max_lr": stored["schedule"]["max_lr"]})
        filled.append(f"schedule.max_lr {schedule.max_lr:.3g}")
    if train.steps == "auto":
        train = train.model_copy(update={"steps": Span(value=stored["train"]["steps"], unit="steps"), "kappa": 1.0})
        filled.append(f"train.steps {stored['train']['steps']}")
        filled += ["whatever train.kappa is"] if config.train.kappa != 1 else []
    console.warn(f"{why}; the run goes on with what it began with: {', '.join(filled)}")
    config = config.model_copy(update={"schedule": schedule, "train": train})
    plan = make_plan(dataclasses.replace(loaded, config=config), inputs)
    known = info.get("planned_by") or {"best_exposure": None, "ceiling": None, "source": None}
    known["source"] = Path(known["source"]) if known["source"] else None
    return config, dataclasses.replace(plan, **known, **done)


def refuse_to_overwrite(folder: RunFolder, typed: str) -> None:
    """Raise InputError where the folder holds a run that a new one would overwrite.

    A `best` alone is no run: it is the trace of a first save that was cut short, for it is written before the state to resume from.
    """
    if folder.final.exists():
        raise InputError(
            f"{folder.path}: holds a finished run",
            hint="give the new one another name: --set run.name=...  (or remove that folder)",
        )
    if available(folder.checkpoints, (FULL, TROUGH)):
        raise InputError(
            f"{folder.path}: holds an unfinished run",
            hint=f"go on with it: sdclr train {typed} --resume  (or begin another: --set run.name=...)",
        )


def refuse_other_mathematics(
    folder: RunFolder, config: RunConfig, plan: Plan, start: Checkpoint, overrides: Sequence[str]
) -> None:
    """A resumed run must compute what the stored one would have; differences to the checkpoint's config are named with both values.

    Other rates that are asked for with --set are taken, with a warning.
    """
    stored = start.info()["config"]  # which may be older than a key
    before = {name: _defaults(section) | stored.get(name, {}) for name, section in RunConfig.model_fields.items()}
    if plan.steps < start.step:
        raise CheckpointError(
            f"the plan has {plan.steps} steps, and {start.step} are done",
            hint=f"go on for longer: --set train.steps={2 * start.step}, or start another run: --set run.name=...",
        )
    accepted = tuple(o.partition("=")[0].strip() for o in overrides)
    same_rates = _rates_as_used(folder, start.step, plan)
    clashes: list[str] = []
    back: list[str] = []
    for key, old, new in _changed_keys(before, config.model_dump(mode="json")):
        if key.startswith(FREE_TO_CHANGE) or (key.startswith(("schedule.", "train.steps")) and same_rates):
            continue
        if key.startswith(accepted) and not key.startswith(NEVER):
            continue
        asked = "" if key.startswith(NEVER) else f"; to accept the change: --set {shlex.quote(f'{key}={_typed(new)}')}"
        clashes.append(f"{key} is {_typed(new)} in the config, and the run was started with {_typed(old)}{asked}")
        back += ["--set", f"{key}={_typed(old)}"]
    if clashes:
        hint = f"put back what it was started with: {shlex.join(back)}\nor start another run: --set run.name=..."
        raise CheckpointError("\n".join(clashes), hint=hint)
    if not same_rates and start.step < plan.steps:
        console.warn(f"the rates of this plan are not those of the first {start.step} steps; from step {start.step + 1} on it goes at {plan.schedule(start.step):.3g}")  # fmt: skip


def _changed_keys(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Every `section.key` whose value differs between two dumped configs, with both values."""
    for section, keys in after.items():
        for key, new in keys.items():
            old = before[section].get(key)
            if old != new:
                yield f"{section}.{key}", old, new


def _typed(value: Any) -> str:
    """As it would be typed in a config; a number that was planned, to as many digits as tell."""
    return f"{value:.6g}" if isinstance(value, float) else source.dump_value(value)


def refuse_other_inputs(start: Checkpoint, config: RunConfig, inputs: Inputs) -> None:
    """The same paths may hold other pictures, captions or weights than when the run began; the order of samples hangs on them."""
    before, now = start.info().get("fingerprint") or {}, fingerprint(config, inputs)
    clashes = []
    if before.get("images") != now["images"]:
        clashes.append(f"{config.data.images}: its pictures or captions are not those that the run was started with")
    if config.prior.images and (before.get("prior") or {}).get("images") != now["prior"]["images"]:
        clashes.append(f"{config.prior.images}: its pictures or captions are not those that the run was started with")
    if config.mask.images and (before.get("mask") or {}).get("images") != now["mask"]["images"]:
        clashes.append(f"{config.mask.images}: the pictures' masks are not those that the run was started with")
    if before.get("model") != now["model"]:
        clashes.append(f"{config.model.base}: its weights are not those that the run was started with")
    if before.get("model_settings") != now["model_settings"]:
        place = config.model.config or config.model.base
        clashes.append(f"{place}: its configs or tokenizers are not those that the run was started with")
    if clashes:
        raise CheckpointError("\n".join(clashes), hint="put them back, or start another run: --set run.name=...")


def _defaults(section: FieldInfo) -> dict[str, Any]:
    """What a section's keys stand for where nothing is said."""
    assert isinstance(section.annotation, type) and issubclass(section.annotation, Section)
    return section.annotation.model_construct().model_dump(mode="json", warnings=False)


def _rates_as_used(folder: RunFolder, step: int, plan: Plan) -> bool:
    """Whether the new plan's rates for the steps already done are those the run really used."""
    used = [r.get("lr") for r in metrics.read(folder.metrics) if r["kind"] == "step" and r["step"] <= step]
    return len(used) == step and used == [plan.schedule(i) for i in range(step)]
