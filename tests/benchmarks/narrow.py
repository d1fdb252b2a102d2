"""A second base model for the bench: the embedded one's VAE, and a UNet of half its width with its own text encoder, trained briefly.

A quarter of the parameters, other rates, another best exposure; and half the time for every step. The trained parts lie in
narrow-sd/ beside this file, in half precision; `python tests/benchmarks/narrow.py` makes them (about ten minutes of one core).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

DATA = Path(__file__).parents[2] / "data"
sys.path.insert(0, str(DATA))

from make_demo import SEED, encode, make_denoiser, to_tensor  # noqa: E402
from portraits import distinct_portraits, draw  # noqa: E402

from sdclr.engine.fingerprint import model_fingerprint  # noqa: E402

PICTURES, STEPS, NAME_STEPS = 3000, 2000, 1000
WIDTHS = (16, 32, 48)
PARTS = Path(__file__).parent / "narrow-sd"


def narrow_base(folder: Path) -> Path:
    """The base as a diffusers pipeline in a folder beside `folder`, named by what it is put together from, when it is not there."""
    folder = folder.with_name(f"{folder.name}-{model_fingerprint(str(PARTS))[:8]}")
    if not folder.exists():
        pipeline = StableDiffusionPipeline.from_pretrained(DATA / "tiny-sd", torch_dtype=torch.float32)
        pipeline.unet = UNet2DConditionModel.from_pretrained(PARTS / "unet", torch_dtype=torch.float32)
        pipeline.text_encoder = CLIPTextModel.from_pretrained(PARTS / "text_encoder", torch_dtype=torch.float32)
        pipeline.save_pretrained(folder.with_name(f"{folder.name}.partial"))
        folder.with_name(f"{folder.name}.partial").rename(folder)
    return folder


def make(build: Path) -> None:
    """Train the parts; goes on where it stopped."""
    build.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusionPipeline.from_pretrained(DATA / "tiny-sd", torch_dtype=torch.float32)
    portraits = list(distinct_portraits(SEED, PICTURES))
    pictures = torch.stack([to_tensor(draw(p, SEED * 100_003 + i)) for i, p in enumerate(portraits)])
    latents = encode(pipeline.vae, pictures, build)
    text_encoder, unet, _ = make_denoiser(
        pipeline.tokenizer, pipeline.text_encoder, portraits, latents, STEPS, NAME_STEPS, WIDTHS, build
    )
    unet.half().save_pretrained(PARTS / "unet")
    text_encoder.half().save_pretrained(PARTS / "text_encoder")


if __name__ == "__main__":
    make(DATA / ".build" / "narrow")
