"""Weights kept in bf16: updated in fp32, then rounded up or down by chance, so that the mean of many updates is kept however small each is
(Gupta 2015, arXiv 1502.02551, section 3; of training in bf16 Zamirai 2020, arXiv 2010.06192).

A bf16 has eight bits for its digits: rounded to the nearest, an update of less than a 512th of its weight is always lost, and at the rates
of fine-tuning nearly all are smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sdclr.config.schema import BF16_SUMS
from sdclr.engine.processes import Processes
from sdclr.errors import InputError
from sdclr.seeding import derive

TOGETHER = 2**25
"""Numbers that are updated at the same time: in fp32 they take 128 MiB, as do their gradients and, one tensor after another, the draws."""


def rounded(values: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """fp32 values with digits that bf16 has, the two neighbours of each weighed so that the mean is the value itself."""
    # To the 16 bits that bf16 drops a number of up to 16 bits is added: the carry comes as often as they ask for it.
    bits = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    found = bits.add_(values.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32)
    return found.masked_fill_(values.isnan(), torch.nan)  # a GPU's NaN has all bits set, and would come out as zero


def refuse_mixed_cards(device: torch.device, together: Processes) -> None:
    """Raise InputError where processes compute on different GPUs: each kind draws other numbers from the same seed, and weights that are
    rounded apart stay apart."""
    if device.type != "cuda" or together.count == 1:
        return
    card = derive(0, torch.cuda.get_device_name(device))
    if together.agree(card) != card or together.agree(-card) != -card:
        raise InputError(
            "model.precision: full_bf16 needs the same GPU in all processes", hint="set model.precision: bf16"
        )


def refuse_many_sums(count: int) -> None:
    """Raise InputError where a step sums up so many gradients in bf16, one for each of its forward-backwards."""
    if count > BF16_SUMS:
        raise InputError(
            f"model.precision: full_bf16 sums up {BF16_SUMS} gradients at most, and a step has up to {count} (one for each shape of pictures, and those of prior ones)",
            hint="lower batch.accumulate, or set data.aspect: square, prior.images: null or model.precision: bf16",
        )


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

    It updates parameters of its own, that stand in for the model's and have content only then: others hook on the model's, and
    must find them as they are. Its state stays the optimizer's, in fp32. Uses up the gradients. `begin` each step: on one kind
    of device, what is rounded up is a function of (seed, step, parameter), in whatever order they are updated.
    """

    def __init__(
        self,
        new: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        groups: list[dict[str, Any]],
        seed: int,
    ):
        """`new` makes the optimizer over groups of parameters."""
        parameters = [parameter for group in groups for parameter in group["params"]]
        self.stand_ins = {parameter: torch.nn.Parameter(_without_content(parameter)) for parameter in parameters}
        self.numbers = {parameter: number for number, parameter in enumerate(parameters)}
        self.optimizer = new([{**group, "params": self._standing_in(group["params"])} for group in groups])
        self.param_groups = [
            {**own, "params": group["params"]} for own, group in zip(self.optimizer.param_groups, groups, strict=True)
        ]
        self.seed, self.at = seed, 0
        self.generator = torch.Generator(parameters[0].device)

    @property
    def state(self) -> Any:  # type: ignore[override]
        """As the optimizer's, by the model's parameters."""
        own = self.optimizer.state
        return {parameter: own[other] for parameter, other in self.stand_ins.items() if other in own}

    def begin(self, step: int) -> None:
        """The draws of this step, 0 for the first, come next."""
        self.at = step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            for parameters in together([p for p in group["params"] if p.grad is not None]):
                self.optimizer.param_groups = [{**group, "params": self._standing_in(parameters)}]
                self._update(parameters)

    def _update(self, parameters: list[torch.nn.Parameter]) -> None:
        for parameter, other in zip(parameters, self._standing_in(parameters), strict=True):
            assert parameter.grad is not None
            other.data, other.grad = parameter.float(), parameter.grad.float()
            parameter.grad = None
        self.optimizer.step()
        for parameter, other in zip(parameters, self._standing_in(parameters), strict=True):
            self.generator.manual_seed(derive(self.seed, "rounding", self.at, self.numbers[parameter]))
            parameter.copy_(rounded(other.data, self.generator))
            other.data, other.grad = _without_content(parameter), None

    def _standing_in(self, parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        return [self.stand_ins[parameter] for parameter in parameters]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.stand_ins:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        self._take_all()
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._take_all()
        self.optimizer.load_state_dict(state_dict)

    def _take_all(self) -> None:
        self.optimizer.param_groups = [
            {**group, "params": self._standing_in(group["params"])} for group in self.param_groups
        ]


def _without_content(parameter: torch.Tensor) -> torch.Tensor:
    """In its shape and place, of fp32 as an optimizer's state is to be, in no memory."""
    return parameter.new_empty((), dtype=torch.float32).expand(parameter.shape)
