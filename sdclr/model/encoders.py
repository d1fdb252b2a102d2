"""What a Stable Diffusion's text encoders and VAE make of captions and pictures, for the UNet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from sdclr.model.components import Components, quiet_libraries


def tokenize(parts: Components, captions: list[str]) -> torch.Tensor:
    """Token ids for each text encoder, (captions, text encoders, tokens), padded and cut to the model's length."""
    return torch.stack(
        [
            tokenizer(
                captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
            ).input_ids
            for tokenizer in parts.tokenizers
        ],
        dim=1,
    )  # fmt: skip


@torch.no_grad()
def encode_tokens(parts: Components, tokens: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """What the UNet is told of captions, by diffusers' names, from their token ids (captions, text encoders, tokens).

    `encoder_hidden_states` (captions, tokens, width) are the text encoder's last hidden states. SDXL takes the last but one, side by side
    of both encoders, and `text_embeds` (captions, width) of the second (Podell 2023, arXiv 2307.01952, section 2.1).
    """
    read = [
        encoder.to(device)(tokens[:, number].to(device), output_hidden_states=parts.is_xl)
        for number, encoder in enumerate(parts.text_encoders)
    ]
    if not parts.is_xl:
        return {"encoder_hidden_states": read[0].last_hidden_state}
    hidden = torch.cat([out.hidden_states[-2] for out in read], dim=-1)
    return {"encoder_hidden_states": hidden, "text_embeds": read[1].text_embeds}


def cut_captions(parts: Components, captions: Iterable[str]) -> set[str]:
    """Those captions that are longer than one of the model's tokenizers reads."""
    with quiet_libraries():
        return {caption for caption in captions if any(_is_cut(caption, tokenizer) for tokenizer in parts.tokenizers)}


def _is_cut(caption: str, tokenizer: CLIPTokenizer) -> bool:
    most = tokenizer.model_max_length
    at_most = len(caption.encode()) + 2  # a token is a byte at least; two mark start and end
    return at_most > most and len(tokenizer(caption).input_ids) > most


def what_encodes(vae: AutoencoderKL) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that latents depend on, by name: the VAE's other half decodes, and need not even be read from disk to train."""
    return ((n, p) for n, p in vae.named_parameters() if not n.startswith(("decoder.", "post_quant_conv.")))


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (batch, 3, h, w) in −1…1 to mean and spread of their latents, each (batch, 4, h/8, w/8), scaled as the UNet sees them."""
    posterior = vae.encode(pixels).latent_dist
    return posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor


def decode_in_fp32(vae: AutoencoderKL) -> None:
    """Keep a VAE's decoder out of autocast: SDXL's overflows in fp16. Asked again, nothing more happens."""
    if "decode" in vars(vae):
        return
    decode = vae.decode

    def whole(latents: torch.Tensor, *args: Any, **named: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.float(), *args, **named)

    vae.decode = whole
