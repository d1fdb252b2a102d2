"""A net small enough to be trained in milliseconds, with every optimizer."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sdclr.engine.checkpoint import pack_optimizer

EVERY = ("adamw", "adamw8bit", "adafactor", "sgd")


class Net(torch.nn.Module):
    """Three layers, two of which are large enough for eight bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.wide, self.broad, self.narrow = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64), torch.nn.Linear(64, 4)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return (self.narrow(self.broad(self.wide(x).tanh()).tanh()) - x[:, :4]).square().mean()


def groups_of(net: Net) -> list[dict]:
    return [
        {"params": [*net.wide.parameters(), *net.broad.parameters()], "lr_scale": 1.0},
        {"params": list(net.narrow.parameters()), "lr_scale": 0.5},
    ]


def batches(step: int) -> list[torch.Tensor]:
    return [torch.randn(8, 64, generator=torch.Generator().manual_seed(step))]


def written_and_read(
    optimizer: torch.optim.Optimizer, folder: Path
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Its state as a checkpoint gives it back."""
    tensors, numbers = pack_optimizer(optimizer)
    if tensors:
        save_file(tensors, folder / "optimizer.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
    return tensors, numbers
