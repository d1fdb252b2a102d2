"""The optimizers that a config can name, and the update inside the backward."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from sdclr.config.schema import OptimizerSection
from sdclr.engine import sharding
from sdclr.errors import InputError

TORCHS = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "sgd": torch.optim.SGD}


def refuse_what_cannot_run(c: OptimizerSection, precision: str, processes: int) -> None:
    """Raise InputError for an optimizer that is not installed, and for an update inside the backward where others must be heard first."""
    if c.name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "optimizer.name: adamw8bit needs bitsandbytes, which is not installed",
            hint="pip install 'sdclr[bitsandbytes]', or set optimizer.name: adamw",
        )
    if not c.fused_backward:
        return
    if processes > 1:
        raise InputError(
            "optimizer.fused_backward is for one process: several must add up their gradients before the update",
            hint="set optimizer.fused_backward: false",
        )
    if precision == "fp16":
        raise InputError(
            "optimizer.fused_backward cannot be had in fp16, whose loss scale needs the whole gradient before the update",
            hint="set model.precision: bf16 or fp32",
        )


def new(c: OptimizerSection, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over groups of parameters; the loop sets its rates."""
    settings: dict[str, dict[str, Any]] = {
        "adamw": {"betas": c.betas, "eps": c.eps, "fused": True},
        "adamw8bit": {"betas": c.betas, "eps": c.eps},
        "adafactor": {},
        "sgd": {"momentum": c.momentum, "fused": not sharding.asked()},  # torch has no fused one for shares
    }
    return _kind(c.name)(groups, lr=1e-3, weight_decay=c.weight_decay, **settings[c.name])


def _kind(name: str) -> Any:
    if name != "adamw8bit":
        return TORCHS[name]
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit  # Dettmers 2021, arXiv 2110.02861


class InBackward:
    """Updates each parameter as soon as its gradient is there and lets go of that, so that gradients never lie there all at once
    (Lv 2023, arXiv 2306.09782, section 3.1; torch's tutorial "optimizer step in backward").

    The update of a parameter is that of the optimizer, whose state stays in its place.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._squares: list[torch.Tensor] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._updater(number))
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        ]

    def grad_norm(self, device: torch.device) -> torch.Tensor:
        """Of the whole gradient, since it was last asked for."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=device)

    def end(self) -> None:
        """Updates nothing any more."""
        for hook in self._hooks:
            hook.remove()

    def _updater(self, number: int) -> Any:
        """For a parameter of the group with that number: a group itself is another once a state has been loaded."""

        def update(parameter: torch.nn.Parameter) -> None:
            assert parameter.grad is not None
            self._squares.append(torch.linalg.vector_norm(parameter.grad.detach(), dtype=torch.float32).square())
            every = self.optimizer.param_groups
            self.optimizer.param_groups = [{**every[number], "params": [parameter]}]
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = every
            parameter.grad = None

        return update
