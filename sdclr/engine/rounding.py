"""Weights kept in bf16: updated in fp32, then rounded up or down by chance, so that the mean of many updates is kept however small each is
(Gupta 2015, arXiv 1502.02551, section 3; of training in bf16 Zamirai 2020, arXiv 2010.06192).

A bf16 has eight bits for its digits: to the nearest of them an update of less than a 256th of its weight would be lost, and at the rates
of fine-tuning nearly all are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from sdclr.seeding import derive

TOGETHER = 2**25
"""Numbers that are updated at the same time: their fp32 copies take 128 MiB, and as much again twice."""


def rounded(values: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """fp32 values with digits that bf16 has, the two neighbours of each weighed so that the mean is the value itself."""
    # To the 16 bits that bf16 drops a number of up to 16 bits is added: the carry comes as often as they ask for it.
    bits = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return bits.add_(values.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32)


def together(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """In their order, as many at a time as are small enough together, and one at least."""
    some: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if some and sum(p.numel() for p in some) + parameter.numel() > TOGETHER:
            yield some
            some = []
        some.append(parameter)
    if some:
        yield some


class Rounded(torch.optim.Optimizer):
    """An optimizer of bf16 weights, whose own arithmetic sees them and their gradients in fp32, some at a time.

    Its state stays the optimizer's, in fp32. Uses up the gradients. `begin` each step: what is rounded up is a function of (seed, step).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int):
        self.optimizer, self.seed = optimizer, seed
        device = optimizer.param_groups[0]["params"][0].device
        self.generator = torch.Generator(device)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def begin(self, step: int) -> None:
        """The draws of this step, 0 for the first, come next."""
        self.generator.manual_seed(derive(self.seed, "rounding", step))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        every = self.param_groups
        try:
            for group in every:
                for parameters in together([p for p in group["params"] if p.grad is not None]):
                    self.param_groups = [{**group, "params": parameters}]
                    self._update(parameters)
        finally:
            self.param_groups = every

    def _update(self, parameters: list[torch.nn.Parameter]) -> None:
        grads = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
        with _standing_in(parameters, [parameter.float() for parameter in parameters]) as kept:
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            self.optimizer.step()
            for parameter, weights in zip(parameters, kept, strict=True):
                weights.copy_(rounded(parameter.data, self.generator))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a state that is to stay fp32: torch would make it of the weights' kind."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        weightless = [p.new_empty((), dtype=torch.float32).expand(p.shape) for p in parameters]
        with _standing_in(parameters, weightless):
            self.optimizer.load_state_dict(state_dict)


@contextlib.contextmanager
def _standing_in(parameters: list[torch.nn.Parameter], others: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """For the time of the block other tensors are the parameters' data; gives their own. Gradients are let go of, before and after."""
    kept = [parameter.data for parameter in parameters]
    _hold(parameters, others)
    try:
        yield kept
    finally:
        _hold(parameters, kept)


def _hold(parameters: list[torch.nn.Parameter], tensors: list[torch.Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.grad = None  # or it would not be of the same kind
        parameter.data = tensor
