"""`sdclr range-test`: how high may the learning rate go, and how much training can these images take?

1. Measure the untouched model on the held-out images.
2. Screen: one fast exponential ramp, to find the rate at which things break. It places the grid and decides nothing else.
3. Reference arm: a low constant rate until the held-out loss has passed its minimum. It gives the best exposure S*.
4. Anchor: a slower arm, to see that the reference itself is not already too high.
5. Arms from the top of the grid down, each from the untouched weights with a fresh optimizer and the same batches, noise and
   timesteps by step, each to the same exposure. They give the ceiling.
Every finished arm is on disk before the next begins, and is never run twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdclr.config import source
from sdclr.config.schema import RunConfig
from sdclr.engine.folder import RunFolder, read_json, write_bytes, write_json, write_text
from sdclr.engine.plan import describe, fingerprint, make_schedule, read_inputs
from sdclr.errors import ConfigError, DivergenceError, Inconclusive, InputError
from sdclr.lr.bounds import Arm, Bounds, Reason, analyse, judge
from sdclr.lr.exposure import implied_by_exponential_ramp, implied_by_linear_ramp, steps_for
from sdclr.lr.paired import half_width
from sdclr.lr.schedule import exponential_ramp, linear_ramp
from sdclr.report import console, figures, page

SCREEN_LOW, SCREEN_HIGH, SCREEN_PER_DECADE = 1e-9, 10.0, 4
CLOSING_SHARES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Where along its exposure an arm is measured."""


class OutOfTime(Exception):
    """`--max-minutes` has passed, or the user asked to stop, between two measurements."""


def range_test(
    config_path: Path,
    overrides: Sequence[str] = (),
    legacy: str | None = None,
    max_minutes: float | None = None,
    as_json: bool = False,
) -> None:
    """Run the command. Raises Inconclusive (exit 3) after reporting when the data cannot say."""
    if legacy not in (None, "linear", "exponential"):
        raise InputError(f"--legacy must be linear or exponential; got {legacy!r}")
    loaded = source.load(config_path, overrides)
    config = loaded.config
    if config.validation.fraction == 0:
        raise ConfigError(
            [
                loaded.problem(
                    "validation.fraction",
                    "is 0, and a range test measures held-out images; set 0.2 for the test (train may use 0)",
                )
            ]
        )
    inputs = read_inputs(loaded)
    folder = RunFolder(config.folder)
    with folder.locked("range-test"):
        from sdclr.engine.run import Run
        from sdclr.engine.signals import StopRequest

        console.table(describe(config, inputs, None), title=f"range test of {config.run.name}")
        run = Run(config, inputs)
        limit = max_minutes or config.range_test.max_minutes
        with StopRequest() as stop:
            bench = Bench(run, config, folder, deadline=time.monotonic() + 60 * limit if limit else None, stop=stop)
            if legacy:
                return _legacy_ramp(bench, legacy)
            result = measure(bench, fingerprint(config, inputs))
        write_json(folder.range_test / "result.json", result)
        _report(folder, bench, result)
    _print(config_path, result, as_json, folder)
    if stop.requested:
        raise stop.interrupted(
            f"the range test reported what its finished arms support; go on with: sdclr range-test {config_path}"
        )
    if result["verdict"] != "conclusive":
        raise Inconclusive(
            "the range test cannot say: " + "; ".join(r["text"] for r in result["reasons"]),
            hint=result["reasons"][0]["remedy"],
        )


@dataclasses.dataclass
class Measured:
    """An arm as it was run: rate of each step is `lr` unless a ramp; losses are of every draw, (points, images, K)."""

    name: str
    lr: float
    steps: np.ndarray
    exposure: np.ndarray
    losses: np.ndarray
    rates: np.ndarray
    diverged: bool = False

    def arm(self, upto: float = math.inf) -> Arm:
        """For the analysis: losses averaged over draws."""
        keep = self.exposure <= upto * (1 + 1e-9)
        return Arm(self.lr, self.exposure[keep], self.losses[keep].mean(axis=2), self.diverged)


class Bench:
    """Runs arms on one Run, measures them on the held-out images, keeps them on disk, counts what they cost."""

    def __init__(self, run: Any, config: RunConfig, folder: RunFolder, deadline: float | None = None, stop: Any = None):
        self.run, self.config, self.folder, self.deadline, self.stop = run, config, folder, deadline, stop
        self.arms_folder = folder.range_test / "arms"
        self.draws = run.draws(run.held_out)
        self.train_steps = self.forwards = 0
        self.started = time.monotonic()
        self.finished: dict[str, Measured] = {}
        self.bar: Any = None
        self.key = self._key()

    @property
    def images(self) -> int:
        return len(self.draws.keys)

    def base(self) -> np.ndarray:
        """Losses of the untouched model, (images, K)."""
        return self.arm("base", 0.0, lambda step: 0.0, lambda arm: True).losses[0]

    def arm(
        self,
        name: str,
        lr: float,
        lr_at: Callable[[int], float],
        enough: Callable[[Measured], bool],
        measure_at: Callable[[int, float], bool] | None = None,
    ) -> Measured:
        """Train from the untouched weights until `enough(arm so far)`, measuring when `measure_at(steps, exposure)` says.

        A finished arm is read from disk instead. Raises OutOfTime between measurements.
        """
        if name in self.finished:
            return self.finished[name]
        stored = self._load(name)
        self.finished[name] = stored or self._run(name, lr, lr_at, enough, measure_at or (lambda steps, exposure: True))
        if stored is None:
            self._save(self.finished[name])
        return self.finished[name]

    def _run(self, name, lr, lr_at, enough, measure_at) -> Measured:
        from sdclr.engine.loop import optimizer_steps

        run, config = self.run, self.config
        state = run.fresh_state()
        steps, exposures, losses, rates = [], [], [], []
        so_far = Measured(
            name, lr, np.array([]), np.array([]), np.empty((0, self.images, self.draws.per_image)), np.array([])
        )
        if lr == 0:
            self._pause()
            self.forwards += len(self.draws)
            return Measured(
                name, 0.0, np.array([0]), np.array([0.0]), run.losses(run.held_out, self.draws)[None], np.array([])
            )
        try:
            for result in optimizer_steps(
                state,
                run.inputs.batches,
                run.loss,
                lr_at,
                config.range_test.max_steps,
                run.accelerator,
                config.optimizer.max_grad_norm,
            ):
                self.train_steps += 1
                rates.append(result.lr)
                if self.bar:
                    self.bar.advance(f"{name}: step {result.step}, lr {result.lr:.2g}", 1)
                if not measure_at(result.step, result.exposure) and result.step < config.range_test.max_steps:
                    continue
                self._pause()
                values = run.losses(run.held_out, self.draws)
                self.forwards += len(self.draws)
                steps.append(result.step)
                exposures.append(result.exposure)
                losses.append(values)
                so_far = Measured(
                    name,
                    lr,
                    np.array(steps),
                    np.array(exposures),
                    np.array(losses),
                    np.array(rates),
                    not np.isfinite(values).all(),
                )
                if so_far.diverged or enough(so_far):
                    break
        except DivergenceError:
            so_far = dataclasses.replace(so_far, diverged=True, rates=np.array(rates))
        return so_far

    def _pause(self) -> None:
        if (self.deadline and time.monotonic() > self.deadline) or (self.stop and self.stop.requested):
            raise OutOfTime

    def _key(self) -> str:
        from sdclr.data.cache import key_of

        split = [pair.key for pair in self.run.inputs.split.validation]
        prints = fingerprint(self.config, self.run.inputs)
        return key_of(json.dumps([prints, split, self.config.run.seed, self.draws.per_image], sort_keys=True))

    def _path(self, name: str) -> Path:
        return self.arms_folder / f"{name}.json"

    def _load(self, name: str) -> Measured | None:
        try:
            stored = read_json(self._path(name), sealed=True)
        except InputError:
            return None
        if stored.get("key") != self.key:
            return None
        self.train_steps += stored["cost"][0]
        self.forwards += stored["cost"][1]
        numbers = {k: np.array(stored[k], dtype=float) for k in ("steps", "exposure", "losses", "rates")}
        if len(numbers["losses"]) == 0:
            numbers["losses"] = np.empty((0, self.images, self.draws.per_image))
        return Measured(stored["name"], stored["lr"], diverged=stored["diverged"], **numbers)

    def _save(self, arm: Measured) -> None:
        finite = np.isfinite(arm.losses).all(axis=(1, 2)) if len(arm.losses) else np.array([], dtype=bool)
        lists = {k: getattr(arm, k)[finite].tolist() for k in ("steps", "exposure", "losses")}
        cost = [len(arm.rates), len(arm.losses) * len(self.draws)]
        write_json(
            self._path(arm.name),
            {
                "key": self.key,
                "name": arm.name,
                "lr": arm.lr,
                "diverged": arm.diverged,
                "cost": cost,
                **lists,
                "rates": arm.rates.tolist(),
            },
        )


def measure(bench: Bench, prints: dict[str, Any]) -> dict[str, Any]:
    """Screen, reference, anchor, arms; returns result.json's content, with what is missing said when time ran out."""
    c = bench.config.range_test
    base = reference = None
    arms: list[Measured] = []
    stopped: list[Reason] = []
    try:
        with console.progress("range test", total=c.max_steps // 4) as bar:
            bench.bar = bar
            base = bench.base()
            top, scale = _grid_top(bench, base)
            reference = _reference(bench, base, top, scale)
            best = analyse(base.mean(axis=1), reference.arm(), [], c.tolerance).best_exposure
            if best is not None:
                target = best.value * c.test_exposure
                arms.append(_arm(bench, reference.lr / math.sqrt(10), target / 4))
                reference, arms = _lower_reference(bench, base, reference, arms)
                _descend(bench, base, reference, arms, top, target)
            bar.total(bench.train_steps)
    except OutOfTime:
        stopped = [
            Reason(
                "stopped", "the test was stopped before its last arm", "run it again: it goes on from its finished arms"
            )
        ]
    bench.bar = None
    return _result(bench, base, reference, arms, stopped, prints)


def _grid_top(bench: Bench, base: np.ndarray) -> tuple[float, float]:
    """The first rate of a fast ramp at which the held-out loss is surely above its start, and the ramp's exposure at its lowest loss."""
    c = bench.config.range_test
    low, high = c.lr or (SCREEN_LOW, SCREEN_HIGH)
    steps = round(math.log10(high / low) * SCREEN_PER_DECADE) + 1

    def broken(arm: Measured) -> bool:
        rise = arm.losses[-1].mean(axis=1) - base.mean(axis=1)
        return bool(rise.mean() > max(half_width(rise) / 2, 0.05 * base.mean()))

    screen = bench.arm(
        "screen",
        high,
        exponential_ramp(low, high, steps),
        lambda a: broken(a) or len(a.rates) >= steps,
        lambda step, s: step % 2 == 0 or step >= steps,
    )
    broke_at = float(screen.rates[-1]) if screen.diverged or (len(screen.losses) and broken(screen)) else high
    means = screen.losses.mean(axis=(1, 2))
    return broke_at, float(screen.exposure[int(np.argmin(means))]) if len(means) else broke_at


def _reference(bench: Bench, base: np.ndarray, top: float, scale: float) -> Measured:
    """The low arm: its rate is a tenth of where the ramp broke, or lower where the ramp's own minimum asks for finer steps."""
    c = bench.config.range_test
    lr = min(top / 10, scale / 30)
    if c.lr:
        lr = max(lr, c.lr[0])

    def past_minimum(arm: Measured) -> bool:
        means = arm.losses.mean(axis=(1, 2))
        lowest = int(np.argmin(means))
        return (
            len(means) >= 6 and bool(arm.exposure[-1] >= 2.2 * arm.exposure[lowest]) and bool(means[-1] > means[lowest])
        )

    due = _log_spaced(first=4 * lr, factor=1.3)
    return bench.arm(f"reference-{lr:.3e}", lr, lambda step: lr, past_minimum, due)


def _arm(bench: Bench, lr: float, target: float) -> Measured:
    """A constant-rate arm to the exposure `target`, measured along its way and closely at its end."""
    last = max(1, math.ceil(target / lr - 1e-9))
    points = {max(1, round(share * last)) for share in CLOSING_SHARES} | {last}
    return bench.arm(
        f"arm-{lr:.3e}-{target:.3e}", lr, lambda step: lr, lambda a: a.steps[-1] >= last, lambda step, s: step in points
    )


def _lower_reference(
    bench: Bench, base: np.ndarray, reference: Measured, arms: list[Measured]
) -> tuple[Measured, list[Measured]]:
    """If the slower anchor is surely better than the reference, the reference was itself too high: run a lower one."""
    c = bench.config.range_test
    anchor = arms[-1]
    verdict = judge(base.mean(axis=1), anchor.arm(), reference.arm(float(anchor.exposure[-1])), c.tolerance, math.inf)
    if verdict.low > c.tolerance and bench.train_steps < c.max_steps:
        lower = _reference(bench, base, reference.lr / math.sqrt(10) * 10, math.inf)
        return lower, [reference_as_arm(reference)]
    return reference, arms


def reference_as_arm(reference: Measured) -> Measured:
    """A reference that turned out too high, as one arm among others."""
    return dataclasses.replace(reference, name=f"arm-{reference.lr:.3e}")


def _descend(
    bench: Bench, base: np.ndarray, reference: Measured, arms: list[Measured], top: float, target: float
) -> None:
    """Arms from the top of the grid down; two admissible ones in a row end it."""
    c = bench.config.range_test
    factor = 10 ** (1 / c.arms_per_decade)
    lr, admissible = top, 0
    while lr > reference.lr * factor**0.5 and admissible < 2:
        arms.append(_arm(bench, lr, target))
        verdict = judge(base.mean(axis=1), reference.arm(), arms[-1].arm(), c.tolerance, c.raggedness)
        admissible = admissible + 1 if verdict.verdict == "admissible" else 0
        lr /= factor


def _log_spaced(first: float, factor: float) -> Callable[[int, float], bool]:
    """True when the exposure has grown by `factor` since it last was."""
    threshold = [first]

    def due(step: int, exposure: float) -> bool:
        if exposure < threshold[0] * (1 - 1e-9):
            return False
        threshold[0] = max(threshold[0] * factor, exposure * 1.0001)
        return True

    return due


def _result(
    bench: Bench, base, reference: Measured | None, arms: list[Measured], stopped: list[Reason], prints: dict[str, Any]
) -> dict[str, Any]:
    """result.json: the analysis of whatever was measured."""
    c, config = bench.config.range_test, bench.config
    bounds = Bounds(None, None, None, (), ())
    if base is not None and reference is not None and len(reference.exposure):
        bounds = analyse(base.mean(axis=1), reference.arm(), [a.arm() for a in arms], c.tolerance, c.raggedness)
    reasons = [*stopped, *(r for r in bounds.reasons if not (stopped and r.code in ("grid_top", "edge")))]
    recommended = (
        _recommend(config, bench, bounds.ceiling.value, bounds.best_exposure.value)
        if bounds.ceiling and bounds.best_exposure
        else None
    )
    return {
        "verdict": "conclusive" if bounds.ceiling and not reasons else "inconclusive",
        "reasons": [dataclasses.asdict(r) for r in reasons],
        "ceiling": {"lr": bounds.ceiling.value, "bracket": [bounds.ceiling.low, bounds.ceiling.high]} if bounds.ceiling else None,
        "best_exposure": {"value": bounds.best_exposure.value, "interval": [bounds.best_exposure.low, bounds.best_exposure.high]} if bounds.best_exposure else None,
        "gain": dataclasses.asdict(bounds.gain) | {"of_base": float(base.mean())} if bounds.gain else None,
        "recommended": recommended,
        "reference": {"lr": reference.lr, "steps": len(reference.rates)} if reference else None,
        "arms": [_arm_record(v, arms) for v in bounds.arms],
        "cost": {"train_steps": bench.train_steps, "validation_forwards": bench.forwards, "seconds": round(time.monotonic() - bench.started, 1)},
        "fingerprint": prints,
    }  # fmt: skip


def _arm_record(verdict, arms: list[Measured]) -> dict[str, Any]:
    arm = next(a for a in arms if a.lr == verdict.lr)
    finite = {
        k: v if math.isfinite(v) else None
        for k, v in {
            "excess": verdict.excess,
            "low": verdict.low,
            "high": verdict.high,
            "ragged": verdict.ragged,
        }.items()
    }
    return {
        "lr": verdict.lr,
        "steps": len(arm.rates),
        **finite,
        "per_image": list(verdict.per_image),
        "verdict": verdict.verdict,
    }


def _recommend(config: RunConfig, bench: Bench, ceiling: float, best: float) -> dict[str, Any]:
    """The schedule's bounds and length: peak at half the ceiling (the bracket's safety), exposure κ·S*."""
    peak = ceiling / 2
    per_epoch = bench.run.inputs.steps_per_epoch
    steps = steps_for(config.train.kappa * best, lambda n: make_schedule(config, per_epoch, n, peak))
    schedule = make_schedule(config, per_epoch, steps, peak)
    cycles = steps / (2 * schedule.step_size) if schedule.step_size else None
    return {"base_lr": config.schedule.base_lr, "max_lr": peak, "steps": steps, "cycles": cycles}


def _report(folder: RunFolder, bench: Bench, result: dict[str, Any]) -> None:
    curves = [a for a in bench.finished.values() if a.name not in ("base", "screen") and len(a.losses)]
    base = bench.finished.get("base")
    if base is None or not curves:
        return
    picture = figures.range_test(
        float(base.losses[0].mean()),
        [(a.lr, a.exposure, a.losses.mean(axis=2)) for a in curves],
        result,
        bench.config.range_test.tolerance,
    )
    write_bytes(folder.range_test / "range_test.png", picture)
    write_text(folder.range_test / "report.html", page.range_test(bench.config.run.name, result, picture))


def _print(config_path: Path, result: dict[str, Any], as_json: bool, folder: RunFolder) -> None:
    rows = [
        (f"{a['lr']:.2e}", a["steps"], "—" if a["excess"] is None else f"{a['excess']:+.1%}", "—" if a["low"] is None else f"{a['low']:+.1%} … {a['high']:+.1%}",
         "—" if a["ragged"] is None else f"{a['ragged']:.1%}", a["verdict"])
        for a in result["arms"]
    ]  # fmt: skip
    console.table(
        rows,
        ("rate", "steps", "excess", "95 % interval", "ragged", "verdict"),
        title="arms, at equal exposure, as shares of the gain",
    )
    if as_json:
        console.result(json.dumps({"schema": 1, **result}, allow_nan=False))
        return
    if result["verdict"] == "conclusive":
        ceiling, best, rec = result["ceiling"], result["best_exposure"], result["recommended"]
        console.result(
            f"# ceiling {ceiling['lr']:.3g} (between {ceiling['bracket'][0]:.3g} and {ceiling['bracket'][1]:.3g}); "
            f"best exposure {best['value']:.3g} ({best['interval'][0]:.3g} to {best['interval'][1]:.3g})\n"
            f"schedule: {{policy: triangular, base_lr: {rec['base_lr']:g}, max_lr: {rec['max_lr']:.3g}, cycles: {rec['cycles'] or 4:g}}}\n"
            f"train: {{steps: {rec['steps']}}}"
        )
    console.say(f"{folder.range_test / 'result.json'}, range_test.png and report.html are beside it")


def _legacy_ramp(bench: Bench, kind: str) -> None:
    """The field's single ramp: prints where its loss was lowest and the S* that this stands for; it cannot show a bound."""
    base = bench.base()
    top, _ = _grid_top(bench, base)
    low, steps = top / 1000, 200
    ramp = linear_ramp(0.0, top, steps) if kind == "linear" else exponential_ramp(low, top, steps)
    with console.progress(f"{kind} ramp", total=steps) as bar:
        bench.bar = bar
        arm = bench.arm(
            f"legacy-{kind}-{steps}", top, ramp, lambda a: len(a.rates) >= steps, lambda step, s: step % 5 == 0
        )
    lowest = int(np.argmin(arm.losses.mean(axis=(1, 2))))
    lr = float(arm.rates[int(arm.steps[lowest]) - 1])
    implied = (
        implied_by_linear_ramp(lr, top / (steps - 1))
        if kind == "linear"
        else implied_by_exponential_ramp(lr, (top / low) ** (1 / (steps - 1)))
    )
    console.result(
        f"# {kind} ramp to {top:.3g} in {steps} steps: lowest held-out loss at lr {lr:.3g}, step {int(arm.steps[lowest])}\n"
        f"# this is no bound: it moves with the ramp's length, because it marks an exposure\n"
        f"implied_best_exposure: {implied:.3g}"
    )
