"""A second base model for the bench: the embedded one's VAE and text encoder, and a UNet of half its width, trained briefly.

A quarter of the parameters, other rates, another best exposure; and half the time for every step.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

DATA = Path(__file__).parents[2] / "data"
sys.path.insert(0, str(DATA))

from make_demo import SEED, encode, make_denoiser, to_tensor  # noqa: E402
from portraits import distinct_portraits, draw  # noqa: E402

PICTURES, STEPS, NAME_STEPS = 3000, 2000, 1000
WIDTHS = (16, 32, 48)


def narrow_base(folder: Path) -> Path:
    """The base in `folder` as a diffusers pipeline, made when it is not there (about twenty minutes of one core; goes on where it stopped)."""
    if folder.exists():
        return folder
    build = folder.with_name(f"{folder.name}.build")
    build.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusionPipeline.from_pretrained(DATA / "tiny-sd", torch_dtype=torch.float32)
    portraits = list(distinct_portraits(SEED, PICTURES))
    pictures = torch.stack([to_tensor(draw(p, SEED * 100_003 + i)) for i, p in enumerate(portraits)])
    latents = encode(pipeline.vae, pictures, build)
    pipeline.text_encoder, pipeline.unet, _ = make_denoiser(
        pipeline.tokenizer, pipeline.text_encoder, portraits, latents, STEPS, NAME_STEPS, WIDTHS, build
    )
    pipeline.save_pretrained(build / "pipeline")
    (build / "pipeline").rename(folder)
    shutil.rmtree(build)
    return folder
