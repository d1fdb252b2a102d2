"""`sdclr range-test`: how high may the learning rate go, and how much training can these images take?

1. Measure the untouched model on the held-out images.
2. Screen: one fast exponential ramp, to find the rate at which things break. It places the grid and decides nothing else.
3. Reference arm: a low constant rate until its held-out loss has levelled off. It gives the best exposure S*.
4. Arms from the top of the grid down, each from the untouched weights with a fresh optimizer and the same batches, noise and
   timesteps by step, each to the same exposure. They give the ceiling.
5. A ceiling close above the reference's rate says that the reference was no slow one: a slower takes its place, for as long as
   arms are compared. S* is still the first one's, if that stands up to the slower.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdclr.config import source
from sdclr.config.schema import RangeTestSection, RunConfig
from sdclr.data.batches import Inputs
from sdclr.engine import processes
from sdclr.engine.answer import as_answer, refuse_inconclusive, tell, with_run
from sdclr.engine.fingerprint import fingerprint, put_aside
from sdclr.engine.fit import settle_batch, settle_memory
from sdclr.engine.folder import RunFolder, write_bytes, write_json, write_text
from sdclr.engine.plan import read_inputs
from sdclr.engine.telling import describe
from sdclr.errors import DivergenceError, Inconclusive, InputError
from sdclr.lr.bounds import PAST, Arm, ArmVerdict, Bounds, Reason, analyse, has_passed_best, judge, least_exposure
from sdclr.lr.exposure import implied_by_exponential_ramp, implied_by_linear_ramp
from sdclr.lr.measured import Measured, at_steps
from sdclr.lr.paired import half_width
from sdclr.lr.schedule import exponential_ramp, linear_ramp
from sdclr.report import console, explain, figures, page

if TYPE_CHECKING:
    from sdclr.engine.pool import Pool
    from sdclr.engine.signals import StopRequest

SCREEN = (1e-9, 10.0, 4)
"""Lowest and highest rate of the screening ramp, and its steps in a factor of ten: wide enough for any optimizer and model."""
BROKEN = 1.05
"""The ramp has broken the model when the held-out loss exceeds the untouched one by this factor."""
CLOSING_SHARES = (0.5, 0.625, 0.75, 0.875, 1.0)
"""Where along its exposure an arm is measured: every measurement costs as much as several steps."""
FIRST, WIDER, CLOSER = 8, 1.3, 1.15
"""A reference arm is measured after so many steps, then each time its exposure has grown by the second factor; by less, but at
least the third, where that is what it still lacks."""
LEAST_POINTS, LEAST_STEPS = 8, 200
"""Points and steps that a reference arm has at least: its first points, a few steps apart, may waver, and with small batches so do
the next; where S* comes as early as that, the steps beyond it cost little."""
REFERENCES = 3
"""How many references are tried at most, each √10 slower than the one before."""


def range_test(
    config_path: Path,
    overrides: Sequence[str] = (),
    legacy: str | None = None,
    max_minutes: float | None = None,
    as_json: bool = False,
    at_length: bool = False,
) -> None:
    """Run the command. Raises Inconclusive (exit 3), after reporting, when the data cannot say."""
    if legacy not in (None, "linear", "exponential"):
        raise InputError(f"--legacy must be linear or exponential; got {legacy!r}")
    loaded = settle_batch(source.load(config_path, overrides))
    config = loaded.config
    together = processes.join()
    inputs = read_inputs(loaded, together.rank, together.count, measuring=True)
    trained = read_inputs(loaded, together.rank, together.count)
    folder = RunFolder(config.folder)
    with together.held_by_main(folder.locked("range-test")):
        from sdclr.engine.pool import make_pool
        from sdclr.engine.run import Run
        from sdclr.engine.signals import StopRequest

        console.table(describe(config, inputs, None), title=f"range test of {config.run.name}")
        run = Run(settle_memory(config, inputs, keeps_base=True), inputs)
        run.compile_for()
        if not legacy:
            together.on_main(lambda: _begin(folder, config, fingerprint(config, trained)))
        minutes = max_minutes or config.range_test.max_minutes
        deadline = time.monotonic() + 60 * minutes if minutes else None
        with StopRequest() as stop, console.progress("range test", total=None) as bar:
            bench = make_pool(run, loaded, folder.range_test / "arms", deadline, stop, bar.advance)
            if legacy:
                return console.result(_legacy(bench, legacy, stop, loaded.typed))
            findings = measure(bench, config.range_test)
        result = as_result(findings, bench, config, trained)
        together.on_main(lambda: _write(folder, bench, result, config))
    tell(result, as_json)
    report = folder.range_test / "report.html"
    console.say(f"{folder.range_test / 'result.json'}" + (f"; its page: {report}" if report.is_file() else ""))
    if at_length:
        console.paragraphs(explain.range_test(result))
    if stop.heard_by_any(together):
        raise stop.interrupted(
            "the range test reported what its finished arms support", f"sdclr range-test {loaded.typed}"
        )
    refuse_inconclusive(result, "the range test")
    console.say(f"next: sdclr train {loaded.typed}")


def _begin(folder: RunFolder, config: RunConfig, asked: dict[str, Any]) -> None:
    """Write the config, once what answers another question is put aside."""
    aside = put_aside(folder.range_test, asked)
    if aside:
        console.say(f"what another range test has answered here is kept in {aside}")
    write_text(folder.range_test / "config.yaml", source.dump(config))


@dataclasses.dataclass
class Findings:
    """What has been measured so far; a test that was stopped early leaves some of it empty.

    `reference` is what the arms are compared with; S* is read from `longest`, which is the reference or a faster one.
    """

    base: np.ndarray | None = None
    reference: Measured | None = None
    longest: Measured | None = None
    arms: list[Measured] = dataclasses.field(default_factory=list)
    stopped: bool = False


def measure(bench: Pool, settings: RangeTestSection) -> Findings:
    """Screen, reference, arms; and again from a slower reference while the ceiling lies close above it."""
    from sdclr.engine.arms import OutOfTime

    found = Findings()
    try:
        found.base = bench.base()
        top, scale = screen(bench, settings)
        lowest = settings.lr[0] if settings.lr else 0.0
        lr = max(min(top, scale) / 10, lowest)
        found.reference = found.longest = reference(bench, lr)
        if not len(found.reference.exposure):
            return found
        faster: list[Measured] = []
        target = _target(found, settings)
        _descend(bench, found, top, target, settings)
        while len(faster) < REFERENCES - 1 and _is_fast(found, settings) and found.reference.lr > lowest:
            faster.append(found.reference)
            target = _slow_down(bench, found, max(found.reference.lr / math.sqrt(10), lowest), target, settings)
            found.arms = [short for fast in faster if len((short := fast.upto(target)).exposure)]
            _descend(bench, found, top, target, settings)
    except OutOfTime:
        found.stopped = True
    return found


def screen(bench: Pool, settings: RangeTestSection) -> tuple[float, float]:
    """The rate at which a fast ramp breaks the model, and the exposure at which the ramp's loss was lowest.

    The reference is placed from both: a tenth of the first, or lower where the second asks for finer steps.
    """
    low, high = settings.lr or SCREEN[:2]
    steps = round(math.log10(high / low) * SCREEN[2]) + 1

    def broken(arm: Measured) -> bool:
        rise = arm.rises[-1]
        return bool(rise.mean() > max(half_width(rise) / 2, (BROKEN - 1) * arm.base.mean()))

    def next_point(arm: Measured) -> int | None:
        if arm.last_step >= steps or (arm.last_step and broken(arm)):
            return None
        return min(arm.last_step + 2, steps)

    ramp = bench.arm("screen", high, exponential_ramp(low, high, steps), next_point)
    if not len(ramp.rates):
        raise DivergenceError(
            f"the very first step, at the lowest rate of {low:.3g}, gives a loss or gradient that is not finite",
            hint="set model.precision: fp32 (fp16 overflows with some models), or check the model with: sdclr check",
        )
    lowest = float(ramp.exposure[int(np.argmin(ramp.means))]) if len(ramp.losses) else float(ramp.rates[-1])
    return float(ramp.rates[-1]), lowest


def reference(bench: Pool, lr: float) -> Measured:
    """The slow arm that the others are compared with, run until two measurements in succession show that its loss has levelled off."""

    def next_point(arm: Measured) -> int | None:
        if not arm.last_step:
            return FIRST
        reached, base = float(arm.exposure[-1]), arm.base.mean(axis=1)
        wanted = WIDER * reached
        if len(arm.exposure) >= LEAST_POINTS:
            wanted = min(wanted, max(PAST * least_exposure(base, arm.arm()), CLOSER * reached))
            before = arm.upto(float(arm.exposure[-2]))
            levelled_off = has_passed_best(base, arm.arm()) and has_passed_best(base, before.arm())
            if levelled_off and arm.last_step >= LEAST_STEPS:
                return None
        return arm.last_step + math.ceil((wanted - reached) / lr * (1 - 1e-9))

    return bench.arm(f"reference-{lr:.3e}", lr, lambda step: lr, next_point)


def _slow_down(bench: Pool, found: Findings, lr: float, target: float, settings: RangeTestSection) -> float:
    """A slower reference in the place of the one before; returns the exposure that arms are now compared at.

    It goes no further than that, if the one that S* was read from stands up to it; else it has to show S* itself.
    """
    assert found.longest is not None
    last = math.ceil(target / lr - 1e-9)
    points = {max(1, round(last / WIDER**i)) for i in range(LEAST_POINTS)}
    slow = bench.arm(f"reference-{lr:.3e}-{last}", lr, lambda step: lr, at_steps(points))
    if not len(slow.exposure):
        return target
    target = min(target, float(slow.exposure[-1]))
    found.reference = slow
    if not _stands_up(found.longest.upto(target), slow, settings):
        found.reference = found.longest = reference(bench, lr)
        target = min(target, _target(found, settings))
    return target


def _stands_up(fast: Measured, slow: Measured, settings: RangeTestSection) -> bool:
    """Whether S* may be read from a faster arm: compared with a slow one, it loses no more than the tolerance."""
    if not len(fast.exposure):
        return False
    verdict = _verdict(slow, fast, settings)
    return verdict.verdict != "inadmissible" and verdict.excess <= settings.tolerance


def _is_fast(found: Findings, settings: RangeTestSection) -> bool:
    return any(reason.code == "fast_reference" for reason in _bounds(found, settings).reasons)


def _verdict(reference: Measured, arm: Measured, settings: RangeTestSection) -> ArmVerdict:
    return judge(arm.base.mean(axis=1), reference.arm(), arm.arm(), settings.tolerance, settings.raggedness)


def _target(found: Findings, settings: RangeTestSection) -> float:
    """The exposure that arms are compared at."""
    assert found.base is not None and found.reference is not None and found.longest is not None
    best = least_exposure(found.base.mean(axis=1), found.longest.arm())
    return min(best * settings.test_exposure, float(found.reference.exposure[-1]))  # beyond: nothing to compare with


def _descend(bench: Pool, found: Findings, top: float, target: float, settings: RangeTestSection) -> None:
    """Arms from the top of the grid down; an admissible one, or one of those found so, ends it."""
    assert found.reference is not None
    reference, factor = found.reference, 10 ** (1 / settings.arms_per_decade)

    def admissible(arm: Measured) -> bool:
        return _verdict(reference, arm, settings).verdict == "admissible"

    lr, lowest = top, max([reference.lr, *(arm.lr for arm in found.arms if admissible(arm))])
    while lr > lowest * factor**0.5:
        found.arms.append(_arm(bench, lr, target))
        if admissible(found.arms[-1]):
            return
        lr /= factor


def _arm(bench: Pool, lr: float, target: float) -> Measured:
    """A constant-rate arm to the exposure `target`, measured closely at its end.

    Halfway and later, one that is surely worse than the untouched model is given up: it is inadmissible, however it goes on.
    """
    last = max(1, math.ceil(target / lr - 1e-9))
    following = at_steps({max(1, round(share * last)) for share in CLOSING_SHARES})

    def lost(arm: Measured) -> bool:
        return bool(arm.last_step and arm.last_step >= last / 2 and arm.rises[-1].mean() > half_width(arm.rises[-1]))

    def next_point(arm: Measured) -> int | None:
        return None if lost(arm) else following(arm)

    return bench.arm(f"arm-{lr:.3e}-{last}", lr, lambda step: lr, next_point)


def _legacy(bench: Pool, kind: str, stop: StopRequest, typed: str) -> str:
    from sdclr.engine.arms import OutOfTime

    try:
        return legacy_ramp(bench, kind)
    except OutOfTime:
        what, again = "stopped before the ramp was finished", f"sdclr range-test {typed} --legacy {kind}"
        raise stop.interrupted(what, again) if stop.requested else Inconclusive(what, again) from None


def legacy_ramp(bench: Pool, kind: str, steps: int = 200) -> str:
    """The field's single ramp: where its loss was lowest and the S* that this stands for; it cannot show a bound."""
    top, _ = screen(bench, bench.config.range_test)
    low, steps = top / 1000, max(2, min(steps, bench.config.range_test.max_steps))
    ramp = linear_ramp(0.0, top, steps) if kind == "linear" else exponential_ramp(low, top, steps)
    arm = bench.arm(f"legacy-{kind}-{steps}", top, ramp, at_steps({*range(5, steps, 5), steps}))
    if not len(arm.steps):
        raise Inconclusive(
            f"the ramp to {top:.3g} diverged before its first measurement", hint="set range_test.lr lower"
        )
    step = int(arm.steps[int(np.argmin(arm.means))])
    lr = float(arm.rates[step - 1])
    if kind == "linear":
        implied = implied_by_linear_ramp(lr, top / (steps - 1))
    else:
        implied = implied_by_exponential_ramp(lr, (top / low) ** (1 / (steps - 1)))
    return (
        f"# {kind} ramp to {top:.3g} in {steps} steps: lowest held-out loss at lr {lr:.3g}, step {step}\n"
        f"# this is no bound: it moves with the ramp's length, because it marks an exposure\n"
        f"implied_best_exposure: {implied:.3g}"
    )


# The result ---------------------------------------------------------------------------------------------------------------


def _bounds(found: Findings, settings: RangeTestSection) -> Bounds:
    """The analysis of what has been measured."""
    assert found.base is not None and found.reference is not None and found.longest is not None
    arms: list[Arm] = [a.arm() for a in found.arms if len(a.exposure) or a.diverged]
    return analyse(
        found.base.mean(axis=1),
        found.reference.arm(),
        arms,
        settings.tolerance,
        settings.raggedness,
        longest=found.longest.arm(),
    )


def as_result(found: Findings, bench: Pool, config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """result.json: the analysis of whatever was measured. `inputs` are training's, for which a run is recommended."""
    bounds = Bounds(None, None, None, (), ())
    if found.longest is not None and len(found.longest.exposure):
        bounds = _bounds(found, config.range_test)
    elif found.reference is not None:
        lower = "set the grid by hand, from lower rates: range_test.lr"
        diverged = Reason("diverged", f"training diverged at the lowest rate, {found.reference.lr:.3g}", lower)
        bounds = dataclasses.replace(bounds, reasons=(diverged,))
    reasons = list(bounds.reasons)
    if found.stopped:
        again = "run it again: it goes on from its finished arms"
        reasons = [Reason("stopped", "the test was stopped before its last arm", again)]
    measured = [arm for arm in (*found.arms, found.reference) if arm]
    base = found.base.mean(axis=1) if found.base is not None else np.empty(0)
    reference, longest = (arm.arm() if arm else None for arm in (found.reference, found.longest))
    answer = as_answer(bounds, reasons, base, reference, longest, {arm.lr: len(arm.rates) for arm in measured})
    return with_run(answer, config, inputs) | {
        "cost": {
            "train_steps": bench.train_steps,
            "validation_forwards": bench.forwards,
            "seconds": round(time.monotonic() - bench.started, 1),
        },
        "fingerprint": fingerprint(config, inputs),
    }


def _write(folder: RunFolder, bench: Pool, result: dict[str, Any], config: RunConfig) -> None:
    """result.json, and the picture and the page if there is a curve to show; those of an earlier answer do not outlive it."""
    write_json(folder.range_test / "result.json", result)
    curves = [
        (a.lr, a.exposure, a.losses.mean(axis=2)) for a in bench.finished.values() if a.name not in ("base", "screen")
    ]
    curves = [curve for curve in curves if len(curve[1])]
    pictured = (folder.range_test / "range_test.png", folder.range_test / "report.html")
    if not curves:
        for path in pictured:
            path.unlink(missing_ok=True)
        return
    picture = figures.range_test(float(bench.base().mean()), curves, result, config.range_test.tolerance)
    write_bytes(pictured[0], picture)
    write_text(pictured[1], page.range_test(config.run.name, result, picture))
