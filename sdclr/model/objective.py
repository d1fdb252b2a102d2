"""The denoising loss of Stable Diffusion: noise a latent at a timestep, ask the UNet for the noise (ε) or the velocity (v)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr


def predict(
    unet: Callable[..., Any],
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    told: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The UNet's prediction and what it should have been, both (batch, 4, h, w).

    `told` is what it is told besides, as for `denoise`. Raises ValueError for a prediction_type that is neither
    epsilon (Ho 2020, eq. 14) nor v_prediction (Salimans 2022, section 4).
    """
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    kind = noise_scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise ValueError(f"the model's scheduler predicts {kind!r}; sdclr trains epsilon and v_prediction models")
    return denoise(unet, noisy, timesteps, told), target


def denoise(
    unet: Callable[..., Any], noisy: torch.Tensor, timesteps: torch.Tensor, told: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What the UNet makes of noisy latents (batch, 4, h, w) at some timesteps (batch,).

    It is told, by diffusers' names, `encoder_hidden_states` (batch, tokens, width) and, if it is SDXL's, also `text_embeds` (batch, width)
    and `time_ids` (batch, 6): the sizes of the picture (Podell 2023, arXiv 2307.01952, section 2.2).
    """
    added = {name: tensor for name, tensor in told.items() if name != "encoder_hidden_states"}
    hidden = told["encoder_hidden_states"]
    return unet(noisy, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added or None, return_dict=False)[0]


def squared_error(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each sample, in fp32, shape (batch,); with `weights` (batch, 1, h, w) the mean is over what they let count, so
    that a picture counts as much as another, however much of it is masked."""
    squares, every = (prediction.float() - target.float()).square(), tuple(range(1, target.ndim))
    if weights is None:
        return squares.mean(dim=every)
    return (squares.mean(dim=1, keepdim=True) * weights).sum(dim=every) / weights.sum(dim=every)


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v (Hang 2023, arXiv 2303.09556, section 3.4); shape (batch,)."""
    snr = compute_snr(noise_scheduler, timesteps)
    clamped = snr.clamp(max=gamma)
    return (
        clamped / (snr + 1)
        if noise_scheduler.config.prediction_type == "v_prediction"
        else clamped / snr.clamp(min=1e-8)
    )


def offset_noise(noise: torch.Tensor, shift: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise plus a constant per channel: `shift` is standard normal, (batch, 4, 1, 1) (Guttenberg 2023, "Diffusion with offset noise")."""
    return noise + strength * shift if strength else noise
