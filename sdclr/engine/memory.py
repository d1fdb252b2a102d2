"""How much memory a run will need, before it needs it: counted on tensors that have a shape and no bytes.

One training step and one validation forward are run on torch's meta device while every storage's birth and death is noted. What lives at
each moment is linear in the batch, so two counted batches give the peak of any other. What libraries take for themselves is not seen, but measured: see KEPT and LIBRARIES.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdclr.config.schema import RunConfig
from sdclr.data.dataset import views
from sdclr.engine import graph, rounding
from sdclr.engine.encoding import pictures_together
from sdclr.engine.ledger import Ledger, autocast, fused_attention
from sdclr.engine.run import validation_batch
from sdclr.model import adapters, components
from sdclr.model.objective import denoise, squared_error

KEPT, LIBRARIES = 0.55, 48 * 2**20
"""On the CPU: the share of gradients and activations that the C library holds beside them, in gaps between blocks and for kernels (between
36 and 82 %, over batches of 1 to 8 and pictures of 128 to 256 pixels: tests/benchmarks/throughput.py --memory), and what is loaded and
compiled with the first step."""
KEPT_BY_FROZEN, KEPT_RECOMPUTED = 0.2, 2.4
"""Of a LoRA on the CPU, which has next to no gradients to leave room for these: the share of the frozen weights that kernels keep copies of,
and the share of activations in gaps where they are computed twice (eleven cases, as above)."""
SHAPES_ONLY = torch.device("meta")
EIGHT_BITS_ON_CPU = 5
"""Tensors of fp32 and of a weight's size that bitsandbytes' update of it makes there; on a GPU it makes none."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """What lives at each moment of some work, in bytes: `fixed` and, for each sample of the batch, `each`."""

    fixed: np.ndarray
    each: np.ndarray

    def peak(self, batch: int) -> int:
        """The most that lives at any moment, at some batch size."""
        return int((self.fixed + self.each * batch).max())


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes that a run needs where it computes; `resident` is there throughout training (weights, of which so many bytes are trained,
    optimizer, data, copies)."""

    parts: dict[str, int]
    trained_bytes: int
    training: Moments
    validation: Moments | None
    draws: int
    encoding: int
    drawing: int = 0
    kept: float = 0.0
    kept_training: float = 0.0
    recorded: bool = False

    @property
    def resident(self) -> int:
        return sum(self.parts.values())

    def at(self, batch: int) -> int:
        """The peak of a run with this batch size."""
        return max(self.encoding, self.resident + self.working(batch))

    def while_drawing(self, batch: int) -> int:
        """The peak of drawing while training, with this batch size."""
        drawing = int((1 + self.kept) * self.drawing)
        return self.resident + drawing + (self.working(batch) if self.recorded else 0)

    def shared(self, processes: int) -> Needs:
        """About what each process needs where weights and optimizer are in shares: gradients are too, which is not reckoned with, nor are
        the blocks that are gathered for a while."""
        parts = {
            name: size // processes if name in ("weights", "optimizer") else size for name, size in self.parts.items()
        }
        return dataclasses.replace(self, parts=parts)

    def side_by_side(self) -> Needs:
        """What each of several processes needs, which exchange their gradients through a copy of them."""
        return dataclasses.replace(self, parts=self.parts | {"exchange": self.trained_bytes})

    def working(self, batch: int) -> int:
        """The peak of gradients and activations, in a training step or in a validation, whichever is higher (together where the step
        is recorded, for its memory stays its own), and what is kept beside them."""
        looking = self.validation.peak(min(self.draws, validation_batch(batch))) if self.validation else 0
        training_and_kept = (1 + self.kept_training) * self.training.peak(batch)
        looking_and_kept = (1 + self.kept) * looking
        return int(training_and_kept + looking_and_kept if self.recorded else max(training_and_kept, looking_and_kept))

    def largest(self, memory: int, most: int) -> int:
        """The largest batch up to `most` that fits; 0 when not even one sample does."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(middle) <= memory else (low, middle - 1)
        return low


def count(
    config: RunConfig,
    images: int,
    held_out: int,
    device: torch.device,
    keeps_base: bool = False,
    only: int | None = None,
) -> Needs:
    """Count a run's needs, of every batch size, or in half the time of `only` one; allocates nothing of size. Raises InputError when the model's configs cannot be read."""
    precision = components.mixed_precision(config.model.precision, device)
    work = _Work(config, device, precision)
    draws = held_out * config.validation.timesteps_per_image
    training = work.moments(True, only)
    validation = work.moments(False, min(draws, validation_batch(only)) if only else None) if held_out else None
    encoding = work.encoding()
    drawing = work.drawing() if config.sample.at_troughs else 0
    parts, weights = work.parts, sum(map(_bytes, work.trained))
    trained = sum(p.nbytes for module in work.trained for p in adapters.trained(module))
    frozen = {name: _bytes(module) for name, module in parts.networks.items() if name not in config.model.train}
    lasting = {"weights": weights, "optimizer": _optimizer_bytes(config, work.trained)}
    if device.type == "cuda":
        encoding += sum(_bytes(module) for name, module in parts.networks.items() if name != "unet")
        drawing += sum(frozen.values()) * config.sample.at_troughs
    else:  # the frozen parts, the copy of the best or untouched weights, and the data lie in the same memory
        copy = trained * ((config.checkpoint.best and held_out > 0) or keeps_base)
        lasting |= {
            "encoders": sum(frozen.values()),
            "copy": copy,
            "data": work.data_bytes(images, held_out),
            "libraries": LIBRARIES,
        }
        as_loaded = (
            4 * sum(p.numel() for module in work.trained for p in module.parameters()) if config.lora.rank else 0
        )
        encoding = sum(frozen.values()) + max(encoding + weights, as_loaded)
        if config.lora.rank:
            lasting["libraries"] += int(KEPT_BY_FROZEN * weights)
    kept = kept_training = KEPT if device.type == "cpu" else 0.0
    if kept and config.lora.rank and config.model.gradient_checkpointing is True:
        kept_training = KEPT_RECOMPUTED
    recorded = graph.wanted(config, device, precision)
    return Needs(lasting, trained, training, validation, draws, encoding, drawing, kept, kept_training, recorded)


def available(device: torch.device) -> int:
    """Bytes that a process may still take: of the device's memory, or of the computer's (and of its container's)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_meminfo(), _cgroup()]
    return min((value for value in found if value is not None), default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))  # fmt: skip


# Counting -----------------------------------------------------------------------------------------------------------------------


class _Work:
    """A run's work on shapes alone."""

    def __init__(self, config: RunConfig, device: torch.device, precision: str):
        self.config, self.device, self.precision = config, device, precision
        with SHAPES_ONLY:
            self.parts = components.skeleton(config.model)
        # All kernels keep the same; whether xformers runs is for the run to say.
        counted = config.model.model_copy(update={"attention": "sdpa"})
        for name in components.narrowed(config.model):
            components.narrow(getattr(self.parts, name))
        components.prepare_for_training(self.parts, counted, SHAPES_ONLY)
        if config.lora.rank:
            components.attach_lora(self.parts, config, precision)
        self.trained = list(self.parts.trainable(config.model.train).values())
        vae, unet = self.parts.vae.config, self.parts.unet.config
        self.factor = 2 ** (len(vae.block_out_channels) - 1)
        side = config.data.resolution // self.factor
        self.latent = (vae.latent_channels, side, side)
        self.tokens, self.width = self.parts.text_encoder.config.max_position_embeddings, unet.cross_attention_dim
        second = self.parts.text_encoder_2
        self.pooled = second.config.projection_dim if second is not None else 0

    def moments(self, grad: bool, only: int | None = None) -> Moments:
        """What lives, beyond the weights, at each moment of a forward, and with `grad` of its backward."""
        if only:
            fixed = np.array(self._pass(only, grad), dtype=np.int64)
            return Moments(fixed, np.zeros_like(fixed))
        two, three = (np.array(self._pass(batch, grad), dtype=np.int64) for batch in (2, 3))
        assert len(two) == len(three), "a pass does the same, whatever the batch"
        return Moments(3 * two - 2 * three, three - two)

    def encoding(self) -> int:
        """The peak of the VAE at work, beyond the weights."""
        side, group = self.config.data.resolution, pictures_together(self.config.data.resolution)
        with self._counted(grad=False) as ledger:
            self.parts.vae.encode(torch.empty(group, 3, side, side, device=SHAPES_ONLY))
        return max(ledger.moments)

    def drawing(self) -> int:
        """The peak of the sampler, which asks with and without the prompt at once (classifier-free guidance), and of the VAE that decodes one
        picture, beyond the weights."""
        width, height = self.config.sample_size
        drawn = (self.latent[0], height // self.factor, width // self.factor)
        asked = 2 if self.config.sample.guidance > 1 else 1
        with self._counted(grad=False) as ledger, contextlib.nullcontext() if self.pooled else self._autocast():
            self.parts.vae.decode(torch.empty(1, *drawn, device=SHAPES_ONLY))  # SDXL's in fp32: see encoders
        return max(*self._pass(asked, grad=False, latent=drawn), *ledger.moments)

    def data_bytes(self, images: int, held_out: int) -> int:
        """Latents (mean, spread and mask of every view) and encoded captions; as many training pictures as are held out are measured beside these."""
        data = self.config.data
        seen = images * len(views(data.crop, data.crops, data.flip)) + 2 * held_out
        captions = 0 if "text_encoder" in self.config.model.train else images * data.tag_orders + 2 * held_out
        numbers = 2 * math.prod(self.latent) + (math.prod(self.latent[1:]) if self.config.mask.images else 0)
        return 4 * (seen * numbers + captions * (self.tokens * self.width + self.pooled))

    def _pass(self, batch: int, grad: bool, latent: tuple[int, ...] = ()) -> list[int]:
        with self._counted(grad) as ledger, self._autocast(), SHAPES_ONLY:
            latents, timesteps = torch.empty(batch, *(latent or self.latent)), torch.empty(batch, dtype=torch.long)
            told = {"encoder_hidden_states": torch.empty(batch, self.tokens, self.width)}
            if self.pooled:
                told["text_embeds"] = torch.empty(batch, self.pooled)
                told["time_ids"] = torch.empty(batch, 6, dtype=torch.long)
            if "text_encoder" in self.config.model.train:
                ids = torch.empty(batch, self.tokens, dtype=torch.long)
                told["encoder_hidden_states"] = self.parts.text_encoder(ids)[0]
            prediction = denoise(self.parts.unet, latents, timesteps, told)
            loss = squared_error(prediction, latents).mean()
            forward = list(ledger.moments)
            if grad:
                self._backward(loss)
        return ledger.moments + self._with_gradients(forward) if grad else ledger.moments

    def _with_gradients(self, forward: list[int]) -> list[int]:
        """The moments of a forward that comes after another one's backward in the same step: the whole gradient lies beside them."""
        several = self.config.batch.accumulate > 1 or self.config.prior.images or self.config.data.aspect == "buckets"
        gradients = sum(p.nbytes for module in self.trained for p in adapters.trained(module))
        return [moment + gradients for moment in forward] if several else []

    def _backward(self, loss: torch.Tensor) -> None:
        wanted = [p for module in self.trained for p in adapters.trained(module)]
        if not self.config.optimizer.fused_backward:
            kept = torch.autograd.grad(loss, wanted, allow_unused=True)
            self._update(wanted)
            del kept
            return
        hooks = [p.register_post_accumulate_grad_hook(self._update_and_let_go) for p in wanted]
        loss.backward()
        for hook in hooks:
            hook.remove()

    def _update_and_let_go(self, parameter: torch.nn.Parameter) -> None:
        self._update([parameter])
        parameter.grad = None

    def _update(self, parameters: list[torch.nn.Parameter]) -> None:
        """What the update of these takes for itself: of bf16 weights copies in fp32, and 8-bit AdamW on the CPU a few of each."""
        narrow = bool(components.narrowed(self.config.model))
        few = EIGHT_BITS_ON_CPU if self.config.optimizer.name == "adamw8bit" and self.device.type == "cpu" else 0
        if not narrow and not few:
            return
        for some in rounding.together(parameters) if narrow else ([parameter] for parameter in parameters):
            copies = [p.float() for _ in range(2) for p in some] if narrow else []
            largest = max(some, key=torch.Tensor.numel)
            if few:
                torch.empty(few * largest.numel())
            if narrow:
                rounding.rounded(max(copies, key=torch.Tensor.numel), None)
            del copies

    def _autocast(self) -> Any:
        if self.precision == "no":
            return contextlib.nullcontext()
        return autocast(self.device.type, components.DTYPES[self.precision])

    @contextlib.contextmanager
    def _counted(self, grad: bool) -> Iterator[Ledger]:
        ledger = Ledger()
        for module in self.parts.networks.values():
            ledger.skip((*module.parameters(), *module.buffers()))
        with fused_attention(), ledger, torch.set_grad_enabled(grad):
            yield ledger


def _bytes(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _optimizer_bytes(config: RunConfig, modules: list[torch.nn.Module]) -> int:
    """AdamW: two numbers a weight, in 8 bits a byte each (and one scale for 256 of them); Adafactor: one a row and one a column, and the update it works on; SGD: its momentum."""
    shapes = [p.shape for module in modules for p in adapters.trained(module)]
    if config.optimizer.name == "adamw":
        return sum(8 * shape.numel() for shape in shapes)
    if config.optimizer.name == "adamw8bit":  # bitsandbytes leaves tensors of less than 4096 numbers as they are
        return sum(2 * (shape.numel() + 4 * -(-shape.numel() // 256)) if shape.numel() >= 4096 else 8 * shape.numel() for shape in shapes)  # fmt: skip
    if config.optimizer.name == "sgd":
        return sum(4 * shape.numel() for shape in shapes) if config.optimizer.momentum else 0
    factored = [s.numel() // s[-1] + s.numel() // s[-2] if len(s) > 1 else s.numel() for s in shapes]
    return 4 * sum(factored) + 2 * 4 * max(shape.numel() for shape in shapes)


def _meminfo() -> int | None:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return None


def _cgroup() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup")
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    return None
