"""The learning rate as a pure function of the optimizer step.

Nothing here has state: a schedule is assigned, `lr_at(step)`, so there is nothing to save, accumulation and process count cannot
rescale it, and resuming cannot bend it. Formulas follow Smith 2017 (arXiv 1506.01186, section 3.1) and agree with
`torch.optim.lr_scheduler.CyclicLR`; `everydream` follows diffusers' cosine, which is not clamped after its end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

WINDOWS: dict[str, Callable[[float], float]] = {
    "triangular": lambda u: 1 - abs(2 * u - 1),
    "welch": lambda u: 1 - (2 * u - 1) ** 2,
    "hann": lambda u: math.sin(math.pi * u) ** 2,
}
"""Height of one cycle at phase u in [0, 1), between 0 and 1 (Smith 2017, section 3.1: "all produced equivalent results")."""


@dataclasses.dataclass(frozen=True)
class Group:
    """`cycles` cycles whose height above base_lr is multiplied by `scale`."""

    cycles: float
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A fully resolved schedule; call it with a step (0-based) to get the learning rate.

    `step_size` is half a cycle in optimizer steps and may be fractional (a run of 100 steps in 3 cycles); `steps` is the length of
    the run, which of the policies only `linear` needs to know. Groups scale a cycle's height, on top of what its policy does to it.
    """

    policy: str
    max_lr: float
    steps: int
    base_lr: float = 0.0
    step_size: float = 0.0
    start: str = "low"
    gamma: float = 1.0
    groups: tuple[Group, ...] = ()
    warmup: int = 0

    def __call__(self, step: int) -> float:
        if self.policy in ("constant", "linear"):
            return self._plain(step)
        if self.policy == "everydream":
            return everydream(step, self.max_lr, self.step_size, self.warmup)
        phase = step / (2 * self.step_size) + (0.5 if self.start == "peak" else 0.0)
        window = WINDOWS.get(self.policy, WINDOWS["triangular"])
        height = window(phase % 1.0) * self._scale(step, phase)
        return self.base_lr + (self.max_lr - self.base_lr) * height

    def _plain(self, step: int) -> float:
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        if self.policy == "constant":
            return self.max_lr * rise
        return self.base_lr + (self.max_lr - self.base_lr) * rise * (1 - step / self.steps)

    def _scale(self, step: int, phase: float) -> float:
        scale = _group_scale(self.groups, step / (2 * self.step_size))
        if self.policy == "triangular2":
            return scale * 0.5 ** math.floor(phase)
        if self.policy == "exp_range":
            return scale * self.gamma**step
        return scale

    def rates(self) -> np.ndarray:
        """The learning rate of every step of the run, shape (steps,)."""
        return np.array([self(step) for step in range(self.steps)])

    @property
    def half_cycle(self) -> float:
        """Steps from a trough to the next peak; 0 without cycles. everydream's step_size holds its warm-up too, so its half is shorter."""
        return max(1.0, self.step_size - self.warmup) if self.policy == "everydream" else self.step_size

    @property
    def first_trough(self) -> float:
        """Steps done when the first cycle has ended low."""
        if self.policy == "everydream":
            return self.warmup + self.half_cycle
        return self.half_cycle * (1 if self.start == "peak" else 2)

    @property
    def cycles(self) -> float:
        """Cycles in the run, after any warm-up; 0 without cycles."""
        if not self.half_cycle:
            return 0.0
        until_first = 0.5 if self.policy == "everydream" or self.start == "peak" else 1.0
        return until_first + (self.steps - self.first_trough) / (2 * self.half_cycle)

    def troughs(self) -> list[int]:
        """Numbers of steps done at which a cycle has ended low; the end of the run is always one of them."""
        ends = {self.steps}
        if self.half_cycle:
            lows = np.arange(self.first_trough, self.steps, 2 * self.half_cycle)
            ends |= {round(low) for low in lows if 0 < round(low) < self.steps}
        return sorted(ends)

    @property
    def ends_near_peak(self) -> bool:
        """Whether a cyclic run's last step lies in the upper half of its cycle, where weights are noisiest."""
        if not self.half_cycle:
            return False
        since_trough = (self.steps - 1 - self.first_trough) / (2 * self.half_cycle) % 1.0
        return 0.25 + 1e-9 < since_trough < 0.75 - 1e-9


def _group_scale(groups: Sequence[Group], cycles_done: float) -> float:
    for group in groups:
        # Half a millionth of a cycle of slack: 7 steps of 1/3 cycle must not fall short of their group's end.
        if cycles_done < group.cycles - 5e-7:
            return group.scale
        cycles_done -= group.cycles
    return groups[-1].scale if groups else 1.0


def everydream(step: int, max_lr: float, decay_steps: float, warmup: int) -> float:
    """EveryDream2's cosine: diffusers' `get_cosine_schedule_with_warmup` with a decay shorter than the run.

    ½(1 + cos(π·(step − warmup)/(decay_steps − warmup))), not clamped at the end, so it rises again: a cycle of
    2·(decay_steps − warmup) steps that starts at the peak.
    """
    if step < warmup:
        return max_lr * step / max(1, warmup)
    progress = (step - warmup) / max(1, decay_steps - warmup)
    return max_lr * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def exponential_ramp(low: float, high: float, steps: int) -> Callable[[int], float]:
    """Equal factors from `low` at step 0 to `high` at the last step."""
    return lambda step: low * (high / low) ** (step / max(1, steps - 1))


def linear_ramp(low: float, high: float, steps: int) -> Callable[[int], float]:
    """Equal differences from `low` at step 0 to `high` at the last step (Smith 2017, section 3.3)."""
    return lambda step: low + (high - low) * step / max(1, steps - 1)
