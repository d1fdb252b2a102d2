"""An arm as it was run and measured, and when it is measured next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from sdclr.lr.bounds import Arm


@dataclasses.dataclass
class Measured:
    """An arm as it was run: the rate of every step, and at each measured point the steps done, the exposure, and the losses of
    every draw (points, images, K); `base` are the untouched model's (images, K)."""

    name: str
    lr: float
    steps: np.ndarray
    exposure: np.ndarray
    losses: np.ndarray
    rates: np.ndarray
    base: np.ndarray
    diverged: bool = False

    @property
    def rises(self) -> np.ndarray:
        """By how much each image's loss exceeds the untouched model's, (points, images)."""
        rises: np.ndarray = (self.losses - self.base).mean(axis=2)
        return rises

    @property
    def means(self) -> np.ndarray:
        """Mean loss at each point, (points,)."""
        return self.losses.mean(axis=(1, 2))

    @property
    def last_step(self) -> int:
        """After which it was measured last; 0 before that."""
        return int(self.steps[-1]) if len(self.steps) else 0

    def arm(self) -> Arm:
        """For the analysis: losses averaged over draws."""
        return Arm(self.lr, self.exposure, self.losses.mean(axis=2), self.diverged)

    def upto(self, exposure: float) -> Measured:
        """The arm as it would be, had it ended at some exposure; what became of it afterwards does not count."""
        keep = self.exposure <= exposure * (1 + 1e-9)
        steps = self.steps[keep]
        return dataclasses.replace(
            self,
            steps=steps,
            exposure=self.exposure[keep],
            losses=self.losses[keep],
            rates=self.rates[: int(steps[-1])] if len(steps) else self.rates[:0],
            diverged=self.diverged and not (self.exposure >= exposure * (1 - 1e-9)).any(),
        )


NextPoint = Callable[[Measured], int | None]
"""Of an arm so far, at first one without a point: the step after which it is measured next, or None when it is done."""


def at_steps(steps: Iterable[int]) -> NextPoint:
    """Measured after each of these steps, and done with the last."""
    ordered = sorted(steps)
    return lambda arm: next((step for step in ordered if step > arm.last_step), None)
