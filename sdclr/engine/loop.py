"""The only loop that trains: `range-test` and `train` iterate the same generator of optimizer steps.

It knows no model and no schedule class: it is handed `batches(step)`, `add_gradients(micro_batch, count)` and `lr_at(step)`, and yields
what each step did; the command decides what to do with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from sdclr.engine import sharding
from sdclr.engine.optimizers import InBackward
from sdclr.engine.rounding import Rounded
from sdclr.errors import DivergenceError

AddGradients = Callable[[Any, int], torch.Tensor]


@dataclasses.dataclass
class TrainState:
    """What training changes: weights, optimizer state, the number of steps done and the exposure they collected."""

    modules: dict[str, torch.nn.Module]
    optimizer: torch.optim.Optimizer
    step: int = 0
    exposure: float = 0.0
    in_backward: InBackward | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything that is trained, in the optimizer's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One optimizer step: its number (1 for the first), the rate it used, mean loss of its samples (of subject and prior pictures,
    weighted, where there are these), gradient norm before clipping."""

    step: int
    lr: float
    loss: float
    grad_norm: float
    exposure: float


def optimizer_steps(
    state: TrainState,
    batches: Callable[[int], Sequence[Any]],
    add_gradients: AddGradients,
    lr_at: Callable[[int], float],
    until: int,
    accelerator: Accelerator,
    max_grad_norm: float | None = None,
) -> Iterator[StepResult]:
    """Train from `state.step` to `until`, one StepResult a step.

    `add_gradients(micro_batch, count)` adds those of one of `count` micro-batches, of its share in the step's mean loss, and returns
    that share; a step averages over its micro-batches and over processes. The next step's batches are asked for while the
    device is at work on this one's. Raises DivergenceError, before the update, when a loss or gradient is not finite: weights and
    optimizer stay as they were (but for gradients that were used up in the backward).
    """
    modules = list(state.modules.values())
    micro_batches = batches(state.step) if state.step < until else ()
    while state.step < until:
        lr = lr_at(state.step)
        assign_lr(state.optimizer, lr)
        if isinstance(state.optimizer, Rounded):
            state.optimizer.begin(state.step)
        # Of a step that diverged, perhaps of another state of these weights:
        state.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=accelerator.device)
        for number, micro_batch in enumerate(micro_batches, 1):
            with _gradients_synced(accelerator, modules, number == len(micro_batches)):
                total += add_gradients(micro_batch, len(micro_batches))
        micro_batches = batches(state.step + 1) if state.step + 1 < until else ()
        norm = _grad_norm(state, accelerator)
        # Read together: a GPU is waited for once, and while it is at work the norm's kernels are started.
        loss_value, grad_norm = torch.stack(
            [accelerator.reduce(total, reduction="mean"), sharding.whole(norm)]
        ).tolist()
        _refuse_non_finite(state, lr, loss_value, grad_norm, accelerator)
        # torch's clip_grad_norm_ goes through all gradients once more to multiply them by 1 where they are short enough.
        if max_grad_norm is not None and grad_norm > max_grad_norm - 1e-5:
            torch.nn.utils.clip_grads_with_norm_(state.parameters, max_grad_norm, norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if not accelerator.optimizer_step_was_skipped:  # fp16: a gradient that overflowed has moved nothing
            state.exposure += lr
        yield StepResult(state.step, lr, loss_value, grad_norm, state.exposure)


def gradients_of(
    loss_fn: Callable[[Any], torch.Tensor], accelerator: Accelerator, careful: bool = False
) -> AddGradients:
    """The `add_gradients` of a function that gives a micro-batch's mean loss. A `careful` one skips the backward of a loss that is not
    finite: where weights are updated in the backward, they would be spoilt before the loop sees it."""

    def add_gradients(micro_batch: Any, count: int) -> torch.Tensor:
        loss = loss_fn(micro_batch) / count
        if not careful or torch.isfinite(loss):
            accelerator.backward(loss)
        return loss.detach()

    return add_gradients


def assign_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every parameter group's rate; a group's `lr_scale` (the text encoder's) multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@contextlib.contextmanager
def _gradients_synced(accelerator: Accelerator, modules: Sequence[torch.nn.Module], last: bool) -> Iterator[None]:
    """Across processes, exchange gradients only with a step's last micro-batch; those in shares with each, or they would lie there whole."""
    with contextlib.ExitStack() as waiting:
        for module in modules:
            if not last and not sharding.is_sharded(module):
                waiting.enter_context(accelerator.no_sync(module))
        yield


def _grad_norm(state: TrainState, accelerator: Accelerator) -> torch.Tensor:
    """Of the whole gradient."""
    if state.in_backward:
        return state.in_backward.grad_norm(accelerator.device)
    accelerator.unscale_gradients()
    grads = [p.grad for p in state.parameters if p.grad is not None]
    if isinstance(state.optimizer, Rounded):  # torch would sum up those in bf16 in bf16
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]))
    return torch.nn.utils.get_total_norm(grads)


def _refuse_non_finite(state: TrainState, lr: float, loss: float, grad_norm: float, accelerator: Accelerator) -> None:
    # In fp16 a gradient that overflows is skipped and the scale lowered, by design.
    scaled = accelerator.scaler is not None
    values = {"loss": loss} if scaled else {"loss": loss, "gradient norm": grad_norm}
    for name, value in values.items():
        if not math.isfinite(value):
            spoilt = name != "loss" and state.in_backward
            what = (
                "optimizer.fused_backward has put it into the weights"
                if spoilt
                else f"stopped before the update, the weights are those of step {state.step}"
            )
            raise DivergenceError(
                f"the {name} of step {state.step + 1} is {value} (learning rate {lr:.3g}); {what}",
                hint="lower schedule.max_lr (sdclr range-test says how far), or check the pictures with: sdclr check"
                if state.step
                else "no rate has done anything yet: the model or a picture is at fault (sdclr check), or model.precision overflows (fp32 does not)",
            )
