"""A Stable Diffusion of a few thousand random weights, and pictures to train it on: the whole program in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIDE = 32


def make_model(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write a diffusers folder: 32-pixel pictures, 8×8 latents, a 16-wide text encoder with one token a byte."""
    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    vocab = {
        token: i
        for i, token in enumerate([*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    end = tokenizer.eos_token_id
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=SIDE, scaling_factor=0.5,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def make_pictures(folder: Path, count: int = 10, side: int = SIDE) -> Path:
    """Write `count` different captioned pictures: a bright disc on a coloured ground."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:side, :side]
    for i in range(count):
        picture = np.full((side, side, 3), rng.integers(0, 128, 3), dtype=np.uint8)
        picture[(x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 4 + i % 3) ** 2] = rng.integers(128, 256, 3)
        Image.fromarray(picture).save(folder / f"picture-{i:02d}.png")
        (folder / f"picture-{i:02d}.txt").write_text(f"disc {i}\n")
    return folder


def write_config(path: Path, model: Path, pictures: Path, runs: Path, extra: str = "") -> Path:
    """A config for the two above: 8 steps of triangular cycles; `extra` lines replace sections of the same name."""
    sections = {
        "run": f"{{name: tiny, output_dir: '{runs}', seed: 3}}",
        "model": f"{{base: '{model}'}}",
        "data": f"{{images: '{pictures}', resolution: {SIDE}, flip: true}}",
        "validation": "{fraction: 0.2, every: 2, timesteps_per_image: 4}",
        "batch": "{size: 2}",
        "schedule": "{policy: triangular, max_lr: 1e-3, cycles: 2}",
        "train": "{steps: 8}",
        "sample": "{prompts: [disc], seeds: [1], steps: 2}",
    }
    for line in extra.strip().splitlines():
        name, _, value = line.partition(":")
        sections[name.strip()] = value.strip()
    path.write_text("".join(f"{name}: {value}\n" for name, value in sections.items()))
    return path
