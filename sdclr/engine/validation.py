"""The held-out loss, measured so that two states of a model can be told apart (research: paired, stratified, fixed draws).

Every image has K fixed draws: timestep k is uniform in the k-th of K equal strata, its noise is its own. Both depend on the seed
and the image alone, so adding an image changes no other's draws, and one model measured twice gives the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator

from sdclr.data.batches import in_groups
from sdclr.engine import sharding
from sdclr.seeding import generator, numpy_rng


@dataclasses.dataclass(frozen=True)
class Draws:
    """Fixed draws for some images: the timestep and the noise (4, h, w) of each, ordered image by image; K per image."""

    keys: tuple[str, ...]
    per_image: int
    timesteps: torch.Tensor
    noise: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def image_of(self, draw: int) -> int:
        """Index of the image that a draw belongs to."""
        return draw // self.per_image

    def batches(self, size: int) -> list[list[int]]:
        """Draws that are measured together: `size` at most, all of one shape."""
        return in_groups(range(len(self)), lambda draw: self.noise[draw].shape, size)


def fixed_draws(
    keys: Sequence[str], per_image: int, latent_shapes: Sequence[Sequence[int]], timesteps: int, seed: int
) -> Draws:
    """K stratified draws for each image, whose latents are of the shape beside its key: t_k = ⌊T·(k + u)/K⌋, ε ~ N(0, I)."""
    t: list[int] = []
    noise: list[torch.Tensor] = []
    for key, shape in zip(keys, latent_shapes, strict=True):
        u = numpy_rng(seed, "validation timestep", key).random(per_image)
        t += [int(timesteps * (k + u[k]) / per_image) for k in range(per_image)]
        noise += torch.randn((per_image, *shape), generator=generator(seed, "validation noise", key))
    return Draws(tuple(keys), per_image, torch.tensor(t), tuple(noise))


def evaluate(
    modules: Sequence[torch.nn.Module],
    losses_of: Callable[[list[int], torch.Tensor, torch.Tensor], torch.Tensor],
    draws: Draws,
    batch_size: int,
    accelerator: Accelerator,
) -> np.ndarray:
    """The loss of every draw, float64 (images, K).

    `losses_of(image_indices, timesteps, noise)` returns one loss per draw; it is called in evaluation mode, without gradients, and
    consumes no random numbers. Batches are always the same, whoever asks: floating point sums depend on their company. With weights in
    shares every process runs as many, some perhaps one whose losses another counts: they are gathered for all at once.
    """
    batches, processes = draws.batches(batch_size), accelerator.num_processes
    values = torch.zeros(len(draws), dtype=torch.float64, device=accelerator.device)
    shared = any(map(sharding.is_sharded, modules))  # what is gathered in inference mode could not be trained with
    with evaluation_mode(modules), torch.no_grad() if shared else torch.inference_mode():
        for first in range(0, len(batches), processes):
            own = first + accelerator.process_index
            number = min(own, len(batches) - 1)
            if number != own and not shared:
                continue
            part = batches[number]
            noise = torch.stack([draws.noise[draw] for draw in part])
            losses = losses_of([draws.image_of(draw) for draw in part], draws.timesteps[part], noise).double()
            if number == own:
                values[part] = losses
    return accelerator.reduce(values, reduction="sum").cpu().numpy().reshape(-1, draws.per_image)


@contextmanager
def evaluation_mode(modules: Sequence[torch.nn.Module]):
    """`.eval()` for the time of the block, then each module and submodule as it was."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in before:
            part.training = training
