"""Models of random weights in the shapes that matter, as diffusers folders: middle-sized ones, and those of Stable Diffusion 1.5 and SDXL.

Training costs the same whatever the weights are, so speed and memory can be measured with no download.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP = "CrossAttnUpBlock2D", "UpBlock2D"
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}
SIZES = {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "middle": {  # 125 million parameters in the UNet
        "unet": {"block_out_channels": (224, 448, 768), "layers_per_block": 1, "cross_attention_dim": 256, "attention_head_dim": 8,
                 "down_block_types": (CROSS, CROSS, PLAIN), "up_block_types": (UP, UP_CROSS, UP_CROSS), "sample_size": 32},
        "vae": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1},
        "text": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    },
    "sd15": {
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,
                 "down_block_types": (CROSS, CROSS, CROSS, PLAIN), "up_block_types": (UP, UP_CROSS, UP_CROSS, UP_CROSS), "sample_size": 64},
        "vae": VAE, "text": CLIP_L,
    },
    "middle-xl": {  # 202 million
        "unet": {"block_out_channels": (160, 320, 640), "layers_per_block": 1, "cross_attention_dim": 512, "attention_head_dim": (5, 10, 20),
                 "transformer_layers_per_block": (1, 1, 4), "down_block_types": (PLAIN, CROSS, CROSS), "up_block_types": (UP_CROSS, UP_CROSS, UP),
                 "sample_size": 32, "projection_class_embeddings_input_dim": 256 + 6 * 256, **SIZES},
        "vae": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1},
        "text": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
        "second": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4, "projection_dim": 256},
    },
    "sdxl": {
        "unet": {"block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
                 "transformer_layers_per_block": (1, 2, 10), "down_block_types": (PLAIN, CROSS, CROSS), "up_block_types": (UP_CROSS, UP_CROSS, UP),
                 "sample_size": 128, "projection_class_embeddings_input_dim": 1280 + 6 * 256, **SIZES},
        "vae": VAE, "text": CLIP_L,
        "second": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
                   "projection_dim": 1280, "hidden_act": "gelu", "vocab_size": 49408},
    },
}  # fmt: skip


def folder_of(name: str, under: Path) -> Path:
    """The model's folder, made on first use."""
    folder = under / f"model-{name}"
    if not (folder / "model_index.json").is_file():
        make(SHAPES[name], folder)
    return folder


def vae_of(shape: dict[str, dict[str, Any]]) -> AutoencoderKL:
    stages = len(shape["vae"]["block_out_channels"])
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * stages, up_block_types=("UpDecoderBlock2D",) * stages, latent_channels=4, **shape["vae"])  # fmt: skip


def configs_alone(shape: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write a diffusers folder without any weights."""
    with torch.device("meta"):
        UNet2DConditionModel(**shape["unet"]).save_config(folder / "unet")
        vae_of(shape).save_config(folder / "vae")
    index = {"unet": ["diffusers", "UNet2DConditionModel"]}
    for part, key in (("text_encoder", "text"), ("text_encoder_2", "second")):
        if key in shape:
            CLIPTextConfig(max_position_embeddings=77, **shape[key]).save_pretrained(folder / part)
            index[part] = ["transformers", "CLIPTextModel" + "WithProjection" * (key == "second")]
    (folder / "model_index.json").write_text(json.dumps(index))


def make(shape: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write a diffusers folder of random weights, in fp16 as models are published."""
    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}  # fmt: skip

    def text(name: str) -> CLIPTextConfig:
        return CLIPTextConfig(**{"vocab_size": len(tokenizer), "max_position_embeddings": 77, **shape[name], **ends})

    parts: dict[str, Any] = {
        "vae": vae_of(shape), "text_encoder": CLIPTextModel(text("text")), "tokenizer": tokenizer, "unet": UNet2DConditionModel(**shape["unet"]),
        "scheduler": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    }  # fmt: skip
    if "second" in shape:
        second = CLIPTextModelWithProjection(text("second"))
        pipeline: Any = StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
