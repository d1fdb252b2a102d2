"""Arms: short runs from the untouched weights, measured on the held-out images, kept on disk and never run twice."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sdclr.config.schema import RunConfig
from sdclr.data.cache import key_of
from sdclr.engine.encoding import Encoded
from sdclr.engine.fingerprint import fingerprint
from sdclr.engine.folder import read_json, write_json
from sdclr.engine.run import Run
from sdclr.engine.signals import StopRequest
from sdclr.errors import DivergenceError, InputError
from sdclr.lr.measured import Measured, NextPoint


class OutOfTime(Exception):
    """The time allowed has passed, or the user asked to stop, between two measurements."""


class Bench:
    """Runs and measures arms on one Run, and counts what they cost."""

    def __init__(
        self,
        run: Run,
        held_out: Encoded,
        config: RunConfig,
        folder: Path,
        deadline: float | None = None,
        stop: StopRequest | None = None,
        heard: Callable[[str], None] = lambda numbers: None,
    ):
        self.run, self.held_out, self.config, self.folder = run, held_out, config, folder
        self.deadline, self.stop, self.heard = deadline, stop, heard
        self.draws = run.draws(held_out)
        self.finished: dict[str, Measured] = {}
        self.train_steps = self.forwards = 0
        self.key = self._key()

    def base(self) -> np.ndarray:
        """Losses of the untouched model, (images, K)."""
        if "base" not in self.finished:
            self._pause()
            self.run.fresh_state()
            losses = self._measure()[None]
            if not np.isfinite(losses).all():
                raise DivergenceError(
                    "the untouched model's held-out loss is not finite, so nothing can be measured",
                    hint="set model.precision: fp32 (fp16 overflows with some models), or check the model with: sdclr check",
                )
            self.finished["base"] = Measured("base", 0.0, np.zeros(1), np.zeros(1), losses, np.zeros(0), losses[0])
        return self.finished["base"].losses[0]

    def arm(
        self,
        name: str,
        lr: float,
        lr_at: Callable[[int], float],
        next_point: NextPoint,
    ) -> Measured:
        """Train from the untouched weights, measuring at each step that `next_point(arm so far)` names next, until it names none.

        A finished arm is read from disk instead, unless these rates or this end would have made it another. Raises OutOfTime
        between measurements.
        """
        self.base()
        if name not in self.finished:
            arm = self.run.processes.on_main(lambda: self._load(name, lr_at, next_point))
            if arm:
                self.train_steps += len(arm.rates)
                self.forwards += arm.losses.size
            else:
                arm = ran = self._run(name, lr, lr_at, next_point)
                self.run.processes.on_main(lambda: self._save(ran))
            self.finished[name] = arm
        return self.finished[name]

    def _run(
        self,
        name: str,
        lr: float,
        lr_at: Callable[[int], float],
        next_point: NextPoint,
    ) -> Measured:
        run, most = self.run, self.config.range_test.max_steps
        rates: list[float] = []
        points: list[tuple[int, float, np.ndarray]] = []
        diverged = False
        wanted = next_point(self._gathered(name, lr, points, rates))
        try:
            for result in run.steps(run.fresh_state(), lr_at, most):
                self.train_steps += 1
                rates.append(result.lr)
                self.heard(f"{name}: step {result.step}, lr {result.lr:.2g}")
                if wanted is not None and result.step < min(wanted, most):
                    continue
                if result.exposure <= (points[-1][1] if points else 0.0):
                    continue  # in fp16 a step whose gradient overflowed moves nothing: there is nothing new to measure yet
                self._pause()
                losses = self._measure()
                if not np.isfinite(losses).all():
                    diverged = True
                    break
                points.append((result.step, result.exposure, losses))
                wanted = next_point(self._gathered(name, lr, points, rates))
                if wanted is None:
                    break
        except DivergenceError:
            diverged = True
        return dataclasses.replace(self._gathered(name, lr, points, rates), diverged=diverged)

    def _gathered(
        self, name: str, lr: float, points: list[tuple[int, float, np.ndarray]], rates: list[float]
    ) -> Measured:
        empty = np.empty((0, len(self.draws.keys), self.draws.per_image))
        losses = np.array([p[2] for p in points]) if points else empty
        steps, exposure = np.array([p[0] for p in points]), np.array([p[1] for p in points])
        return Measured(name, lr, steps, exposure, losses, np.array(rates), self.base())

    def _measure(self) -> np.ndarray:
        self.forwards += len(self.draws)
        return self.run.losses(self.held_out, self.draws)

    def _pause(self) -> None:
        late = self.deadline is not None and time.monotonic() > self.deadline
        asked = self.stop is not None and self.stop.heard_by_any(self.run.processes)
        if self.run.processes.agree(late) or asked:
            raise OutOfTime

    def _key(self) -> str:
        """What a stored arm must agree in to be used again."""
        prints = fingerprint(self.config, self.run.inputs)
        return key_of(
            json.dumps([prints, self.draws.keys, self.run.inputs.batches.seed, self.draws.per_image], sort_keys=True)
        )

    def _load(self, name: str, lr_at: Callable[[int], float], next_point: NextPoint) -> Measured | None:
        try:
            stored = read_json(self.folder / f"{name}.json", sealed=True)
        except InputError:
            return None
        if stored.get("key") != self.key:
            return None
        arrays = {k: np.array(stored[k], dtype=float) for k in ("steps", "exposure", "losses", "rates")}
        arrays["losses"] = arrays["losses"].reshape(-1, len(self.draws.keys), self.draws.per_image)
        if not (np.diff(arrays["exposure"], prepend=0.0) > 0).all():
            return None
        arm = Measured(stored["name"], stored["lr"], base=self.base(), diverged=stored["diverged"], **arrays)
        same_rates = all(rate == lr_at(step) for step, rate in enumerate(arm.rates))
        ended = (
            arm.diverged
            or len(arm.rates) >= self.config.range_test.max_steps
            or (len(arm.steps) and next_point(arm) is None)
        )
        return arm if same_rates and ended else None

    def _save(self, arm: Measured) -> None:
        arrays = {k: getattr(arm, k).tolist() for k in ("steps", "exposure", "losses", "rates")}
        write_json(
            self.folder / f"{arm.name}.json",
            {"key": self.key, "name": arm.name, "lr": arm.lr, "diverged": arm.diverged, **arrays},
        )
