"""A Stable Diffusion of a few thousand random weights, and pictures to train it on: the whole program in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIDE = 32


def make_model(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write a diffusers folder: 32-pixel pictures, 8×8 latents, a 16-wide text encoder with one token a byte."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    StableDiffusionPipeline(
        text_encoder=CLIPTextModel(text_config(tokenizer)), tokenizer=tokenizer, vae=make_vae(), unet=make_unet(cross_attention_dim=16),
        scheduler=make_scheduler(prediction_type), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def make_xl(folder: Path, zeros: bool = True) -> Path:
    """Write a diffusers folder in the shape of SDXL: text encoders of 16 and 24 numbers a token, the second with 20 a caption."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    told = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 6 * 8}  # fmt: skip
    second = text_config(tokenizer, hidden_size=24, num_hidden_layers=3, projection_dim=20, hidden_act="gelu")
    StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(text_config(tokenizer, num_hidden_layers=2)), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(second), tokenizer_2=make_tokenizer(), vae=make_vae(),
        unet=make_unet(cross_attention_dim=16 + 24, use_linear_projection=True, **told), scheduler=make_scheduler("epsilon"),
        force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def make_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def text_config(tokenizer: CLIPTokenizer, **more: Any) -> CLIPTextConfig:
    end = tokenizer.eos_token_id
    plain = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end,
    }  # fmt: skip
    return CLIPTextConfig(**plain | more)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=SIDE, scaling_factor=0.5,
    )  # fmt: skip


def make_unet(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=4, attention_head_dim=2, **more,
    )  # fmt: skip


def make_scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip


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
        "schedule": "{policy: triangular, max_lr: 1e-3, cycles: 2, allow_peak_end: true}",
        "train": "{steps: 8}",
        "sample": "{prompts: [disc], seeds: [1], steps: 2}",
    }
    for line in extra.strip().splitlines():
        name, _, value = line.partition(":")
        sections[name.strip()] = value.strip()
    path.write_text("".join(f"{name}: {value}\n" for name, value in sections.items()))
    return path


def built(path: Path, *overrides: str) -> Any:
    """The engine's Run of a config."""
    from sdclr.config import source
    from sdclr.engine.plan import read_inputs
    from sdclr.engine.run import Run

    loaded = source.load(path, overrides)
    return Run(loaded.config, read_inputs(loaded))
