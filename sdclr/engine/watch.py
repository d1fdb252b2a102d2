"""The held-out loss along a run: each look, the best so far and its weights, and how long ago that was."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from sdclr.engine import sharding
from sdclr.engine.encoding import Encoded
from sdclr.engine.run import Run
from sdclr.errors import DivergenceError
from sdclr.lr.paired import paired_difference


@dataclasses.dataclass(frozen=True)
class Look:
    """One measurement: after `step` steps and so much `exposure`, the held-out loss and that of as many training images."""

    step: int
    exposure: float
    loss: float
    train_loss: float

    @property
    def gap(self) -> float:
        """Held-out minus training: what grows when a model begins to memorise."""
        return self.loss - self.train_loss


class Watch:
    """Measures a run's current weights on fixed draws; the first look is what later ones are compared with."""

    def __init__(self, run: Run, held_out: Encoded, stabilised: Encoded, keep_best: bool):
        self.run, self.held_out, self.stabilised, self.keep_best = run, held_out, stabilised, keep_best
        self.draws, self.train_draws = run.draws(held_out), run.draws(stabilised)
        self.base: np.ndarray | None = None
        self.best: Look | None = None
        self.last: Look | None = None
        self.since_best = 0
        self.best_weights: dict[str, dict[str, torch.Tensor]] | None = None

    def look(self, step: int, exposure: float) -> dict[str, Any]:
        """Measure now; returns the record for the metrics: losses, the paired difference to the base, each image, each timestep bin.

        Raises DivergenceError when the weights give losses that are not finite; they are no new best.
        """
        losses = self.run.losses(self.held_out, self.draws)
        seen = self.run.losses(self.stabilised, self.train_draws)
        for what, values in (("held-out loss", losses), ("loss of the training images", seen)):
            if not np.isfinite(values).all():
                raise DivergenceError(
                    f"the {what} after step {step} is {values.mean()}; stopped before these weights were saved",
                    hint="lower schedule.max_lr (sdclr range-test says how far), or check the pictures with: sdclr check",
                )
        if self.base is None:
            self.base = losses
        self.last = Look(step, exposure, float(losses.mean()), float(seen.mean()))
        self._remember(self.last)
        change = paired_difference(losses, self.base)
        return {
            "exposure": exposure,
            "loss": self.last.loss,
            "train_loss": self.last.train_loss,
            "gap": self.last.gap,
            "vs_base": change.mean,
            "vs_base_low": _finite(change.low),
            "vs_base_high": _finite(change.high),
            "agreement": change.agreement,
            "images": dict(zip(self.draws.keys, losses.mean(axis=1).tolist(), strict=True)),
            "bins": losses.mean(axis=0).tolist(),
        }

    def measure(self) -> float | None:
        """The held-out loss of whatever weights the model has now, remembered nowhere; None when it is not finite."""
        return _finite(float(self.run.losses(self.held_out, self.draws).mean()))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on watching."""
        looks = {
            name: dataclasses.asdict(look) if look else None
            for name, look in (("best", self.best), ("last", self.last))
        }
        return {**looks, "since_best": self.since_best, "base": self.base.tolist() if self.base is not None else None}

    def restore(self, state: dict[str, Any], best_weights: dict[str, dict[str, torch.Tensor]] | None) -> None:
        """Go on from `state()` as it was stored."""
        self.best, self.last = (Look(**state[name]) if state[name] else None for name in ("best", "last"))
        self.since_best, self.best_weights = state["since_best"], best_weights
        self.base = np.array(state["base"]) if state["base"] is not None else None

    def forget_best(self) -> None:
        """Begin to look for the best anew: the weights of the one so far are lost."""
        self.best, self.best_weights, self.since_best = None, None, 0

    def _remember(self, look: Look) -> None:
        if self.best and look.loss >= self.best.loss:
            self.since_best += 1
            return
        self.best, self.since_best = look, 0
        if self.keep_best and look.step:
            # In memory until a checkpoint is due: a falling loss must not write the model at every look.
            self.best_weights = None  # before the next copy, not after it: two would not fit beside a large model
            main = self.run.processes.main
            self.best_weights = {name: sharding.copy_of(module, main) for name, module in self.run.modules.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
