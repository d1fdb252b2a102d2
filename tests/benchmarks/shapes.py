"""Models of random weights in the shapes that matter, as diffusers folders: a middle-sized one, and Stable Diffusion 1.5's own.

Training costs the same whatever the weights are, so speed and memory can be measured with no download.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP = "CrossAttnUpBlock2D", "UpBlock2D"

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
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 49408},
    },
}  # fmt: skip


def folder_of(name: str, under: Path) -> Path:
    """The model's folder, made on first use."""
    folder = under / f"model-{name}"
    if not (folder / "model_index.json").is_file():
        _make(SHAPES[name], folder)
    return folder


def _make(shape: dict[str, dict[str, Any]], folder: Path) -> None:
    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    text = {"vocab_size": len(tokenizer), **shape["text"]}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}  # fmt: skip
    stages = len(shape["vae"]["block_out_channels"])
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * stages, up_block_types=("UpDecoderBlock2D",) * stages, latent_channels=4, **shape["vae"])  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, **text, **ends)), tokenizer=tokenizer,
        unet=UNet2DConditionModel(**shape["unet"]), scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
