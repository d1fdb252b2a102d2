"""A second base model for the bench: the embedded one's VAE and text encoder, and a UNet of half its width, trained briefly.

A quarter of the parameters, other rates, another best exposure; and half the time for every step.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr

from sdclr.report import console

DATA = Path(__file__).parents[2] / "data"
sys.path.insert(0, str(DATA))

from make_demo import SEED, learning_rate, made_up_names, to_tensor, tokens_of  # noqa: E402
from portraits import distinct_portraits, draw  # noqa: E402

PICTURES, STEPS, BATCH, PEAK = 3000, 3000, 16, 2e-3
WIDTHS = (16, 32, 48)


def narrow_base(folder: Path) -> Path:
    """The base in `folder` as a diffusers pipeline, made when it is not there (about twenty minutes of one core)."""
    if folder.exists():
        return folder
    pipeline = StableDiffusionPipeline.from_pretrained(DATA / "tiny-sd", torch_dtype=torch.float32)
    portraits = list(distinct_portraits(SEED, PICTURES))
    with torch.no_grad():
        pictures = torch.stack([to_tensor(draw(p, SEED * 100_003 + i)) for i, p in enumerate(portraits)])
        latents = [pipeline.vae.encode(chunk).latent_dist.mean for chunk in pictures.split(64)]
        clean = torch.cat(latents) * pipeline.vae.config.scaling_factor
        captions = [p.caption for p in portraits]
        for i, name in enumerate(made_up_names(SEED, PICTURES)):
            if i % 2:  # a name in every second caption, as fine-tuning uses it
                captions[i] = captions[i].replace("a person", name, 1)
        contexts = _read(pipeline, captions)
        empty = _read(pipeline, [""])
    pipeline.unet = _trained(pipeline.scheduler, clean, contexts, empty)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    partial.rename(folder)
    return folder


def _read(pipeline: StableDiffusionPipeline, captions: list[str]) -> torch.Tensor:
    tokens = tokens_of(pipeline.tokenizer, captions)
    return torch.cat([pipeline.text_encoder(part)[0] for part in tokens.split(256)])


def _trained(scheduler, clean: torch.Tensor, contexts: torch.Tensor, empty: torch.Tensor) -> UNet2DConditionModel:
    torch.manual_seed(SEED)
    noising = DDPMScheduler.from_config(scheduler.config)
    like = UNet2DConditionModel.load_config(DATA / "tiny-sd" / "unet")
    unet = UNet2DConditionModel.from_config({**like, "block_out_channels": WIDTHS})
    optimizer = torch.optim.AdamW(unet.parameters(), lr=PEAK, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = EMAModel(unet.parameters(), decay=0.998, use_ema_warmup=True, power=0.75)
    generator = torch.Generator().manual_seed(SEED)
    with console.progress("training the narrow base", total=STEPS) as bar:
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, PEAK)
            pick = torch.randint(len(clean), (BATCH,), generator=generator)
            noise = torch.randn(clean[pick].shape, generator=generator)
            t = torch.randint(0, 1000, (BATCH,), generator=generator)
            dropped = torch.rand(BATCH, generator=generator) < 0.1
            context = torch.where(dropped[:, None, None], empty, contexts[pick])
            error = unet(noising.add_noise(clean[pick], noise, t), t, context).sample - noise
            loss = (error.square().mean(dim=(1, 2, 3)) * (1 / compute_snr(noising, t)).clamp(0.2, 10)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            average.step(unet.parameters())
            bar.advance(f"loss {error.square().mean().item():.4f}")
    average.copy_to(unet.parameters())
    return unet.eval()
