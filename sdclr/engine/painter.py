"""Draws pictures with diffusers' pipeline: with kept states, one after another, or with what a run at work has come to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from sdclr.config.schema import RunConfig
from sdclr.engine.run import Run, make_accelerator
from sdclr.engine.validation import evaluation_mode
from sdclr.model import components, encoders
from sdclr.model.components import Components


class Painter:
    """diffusers' pipeline over a model's parts, with whatever weights they have."""

    def __init__(self, config: RunConfig, parts: Components, accelerator: Accelerator):
        self.config, self.parts, self.accelerator = config, parts, accelerator
        if parts.is_xl:
            encoders.decode_in_fp32(parts.vae)
        self.pipeline = parts.pipeline().to(accelerator.device)

    def draw(self, prompt: str, seed: int) -> Image.Image:
        """One picture, exactly as a user's own call of the pipeline with this seed."""
        s, (width, height) = self.config.sample, self.config.sample_size
        with components.quiet_libraries(), self.accelerator.autocast():
            return self.pipeline(
                prompt, negative_prompt=s.negative_prompt or None, num_inference_steps=s.steps, guidance_scale=s.guidance, height=height, width=width,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]  # fmt: skip


class KeptStates(Painter):
    """Paints with the weights of one kept state at a time, the untouched base's at first."""

    def __init__(self, config: RunConfig):
        parts, accelerator = untouched(config)
        self.base = {  # of all that another folder may bring: another run's checkpoints may hold what this config does not train
            name: {k: v.clone() for k, v in m.state_dict().items()}
            for name, m in parts.networks.items()
            if name != "vae"
        }
        super().__init__(config, parts, accelerator)

    def load(self, folder: Path | None) -> None:
        """The base's weights, or those of a checkpoint or exported folder laid over them."""
        for name, weights in self.base.items():
            getattr(self.parts, name).load_state_dict(weights)
        if folder:
            components.load_trained(self.parts, folder, besides=("vae",))


def untouched(config: RunConfig) -> tuple[Components, Accelerator]:
    """The base's parts, and where they compute."""
    accelerator, parts = make_accelerator(config), components.load(config.model)
    components.set_attention(parts.unet, config.model.attention, accelerator.device)
    return parts, accelerator


@contextlib.contextmanager
def of_run(run: Run) -> Iterator[Painter]:
    """For the time of the block: a painter with the weights that a run has now. The parts that it does not train come to the device for it.

    It draws what `KeptStates` draws with the same weights (in full_bf16, of a LoRA and of SDXL up to rounding).
    """
    networks = list(run.parts.networks.values())
    with evaluation_mode(networks), _as_loaded(networks):
        try:
            yield Painter(run.config, run.parts, run.accelerator)
        finally:
            run.parts.put_away(run.config.model.train)


@contextlib.contextmanager
def _as_loaded(modules: list[Any]) -> Iterator[None]:
    """For the time of the block, forwards without what accelerate has laid around them for training, which turns their results into fp32."""
    wrapped = {module: module.forward for module in modules if hasattr(module, "_original_forward")}
    try:
        for module in wrapped:
            module.forward = module._original_forward
        yield
    finally:
        for module, forward in wrapped.items():
            module.forward = forward
