"""The denoising loss against numbers computed by hand, formulas of the papers, and diffusers' own calls."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdclr.model.objective import min_snr_weights, offset_noise, predict, squared_error

LATENT = torch.tensor([[[[1.0, -2.0], [0.5, 0.0]]]])
NOISE = torch.tensor([[[[0.5, 1.0], [-1.0, 2.0]]]])
GUESS = torch.tensor([[[[0.5, 0.0], [-1.0, 1.0]]]])


class Recorder(torch.nn.Module):
    """A UNet that notes what it is given and always answers the same."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, noisy, timesteps, encoder_hidden_states, added_cond_kwargs, return_dict):
        self.given, self.added = (noisy, timesteps, encoder_hidden_states), added_cond_kwargs
        return (self.answer,)


def caption(context: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": context}


def scheduler(kind: str) -> DDPMScheduler:
    """Two timesteps that keep 0.64 and 0.36 of the signal's power: √ᾱ = 0.8, 0.6 and √(1 − ᾱ) = 0.6, 0.8."""
    return DDPMScheduler(num_train_timesteps=2, trained_betas=[0.36, 1 - 0.36 / 0.64], prediction_type=kind)


def test_epsilon_at_the_first_timestep_is_as_computed_by_hand():
    unet, context = Recorder(GUESS), torch.zeros(1, 3, 5)
    prediction, target = predict(unet, scheduler("epsilon"), LATENT, NOISE, torch.tensor([0]), caption(context))
    noisy, timesteps, given = unet.given
    # 0.8·x + 0.6·ε
    assert noisy.flatten().tolist() == pytest.approx([1.1, -1.0, -0.2, 1.2])
    assert timesteps.tolist() == [0]
    assert given is context
    assert unet.added is None
    assert prediction is GUESS
    assert target.flatten().tolist() == [0.5, 1.0, -1.0, 2.0]
    # (0, -1, 0, -1)² / 4
    assert squared_error(prediction, target).tolist() == pytest.approx([0.5])


def test_whatever_else_is_told_reaches_the_unet_by_its_name():
    unet, sizes, pooled = Recorder(GUESS), torch.arange(6)[None], torch.ones(1, 4)
    told = {"text_embeds": pooled, "encoder_hidden_states": torch.zeros(1, 3, 5), "time_ids": sizes}
    predict(unet, scheduler("epsilon"), LATENT, NOISE, torch.tensor([0]), told)
    assert unet.added == {"text_embeds": pooled, "time_ids": sizes}


def test_v_prediction_at_the_second_timestep_is_as_computed_by_hand():
    unet = Recorder(GUESS)
    prediction, target = predict(
        unet, scheduler("v_prediction"), LATENT, NOISE, torch.tensor([1]), caption(torch.zeros(1, 3, 5))
    )
    # 0.6·x + 0.8·ε, and v = 0.6·ε − 0.8·x
    assert unet.given[0].flatten().tolist() == pytest.approx([1.0, -0.4, -0.5, 1.6])
    assert target.flatten().tolist() == pytest.approx([-0.5, 2.2, -1.0, 1.2])
    # (1.0, -2.2, 0, -0.2)² / 4
    assert squared_error(prediction, target).tolist() == pytest.approx([(1 + 4.84 + 0.04) / 4])


def test_each_sample_is_noised_at_its_own_timestep_and_has_its_own_error():
    unet = Recorder(torch.cat([GUESS, GUESS * 0]))
    both = torch.cat([LATENT, LATENT]), torch.cat([NOISE, NOISE])
    prediction, target = predict(unet, scheduler("epsilon"), *both, torch.tensor([0, 1]), caption(torch.zeros(2, 3, 5)))
    assert unet.given[0].flatten().tolist() == pytest.approx([1.1, -1.0, -0.2, 1.2, 1.0, -0.4, -0.5, 1.6])
    assert squared_error(prediction, target).tolist() == pytest.approx([0.5, (0.25 + 1 + 1 + 4) / 4])


def test_the_error_of_half_precision_predictions_is_taken_in_fp32():
    guess, target = torch.full((1, 1, 1, 2), 300.0, dtype=torch.float16), torch.zeros(1, 1, 1, 2)
    error = squared_error(guess, target)
    assert error.dtype == torch.float32
    assert error.tolist() == [90000.0]  # beyond fp16's 65504


def test_another_prediction_type_is_refused():
    with pytest.raises(ValueError, match="'sample'"):
        predict(Recorder(GUESS), scheduler("sample"), LATENT, NOISE, torch.tensor([0]), caption(torch.zeros(1, 3, 5)))


def sd15(kind: str) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)


def signal_to_noise(step: int) -> float:
    """ᾱ/(1 − ᾱ) of SD 1.5's schedule, from its definition: √β rises linearly."""
    kept = 1.0
    for i in range(step + 1):
        kept *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
    return kept / (1 - kept)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_follow_the_papers_formulas(kind, gamma):
    steps = [0, 10, 100, 250, 500, 900, 999]
    weights = min_snr_weights(sd15(kind), torch.tensor(steps), gamma)
    snr = [signal_to_noise(step) for step in steps]
    divisor = {"epsilon": 0, "v_prediction": 1}[kind]
    assert weights.tolist() == pytest.approx([min(s, gamma) / (s + divisor) for s in snr], rel=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers_training_scripts(kind):
    timesteps = torch.arange(0, 1000, 7)
    snr = compute_snr(sd15(kind), timesteps)
    theirs = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    theirs = theirs / snr if kind == "epsilon" else theirs / (snr + 1)
    assert torch.allclose(min_snr_weights(sd15(kind), timesteps, 5.0), theirs, rtol=1e-6)


def test_min_snr_weights_are_finite_where_no_signal_is_left():
    zero = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    assert min_snr_weights(zero, torch.tensor([999]), 5.0).tolist() == pytest.approx([0.0], abs=1e-6)
    assert math.isfinite(min_snr_weights(sd15("epsilon"), torch.tensor([999]), 5.0).item())


def test_offset_noise_adds_one_number_a_channel():
    shift = torch.tensor([[[[2.0]], [[-1.0]]]])
    noise = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert offset_noise(noise, shift, 0.1).flatten().tolist() == pytest.approx([0.2, 1.2, 2.2, 3.2, 3.9, 4.9, 5.9, 6.9])
    assert offset_noise(noise, shift, 0.0) is noise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_real_unet_gets_and_gives_what_diffusers_own_calls_would(run, kind):
    run.fresh_state()
    noise_scheduler, unet = sd15(kind), run.parts.unet
    g = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 4, 4, generator=g) for _ in range(2))
    context, timesteps = torch.randn(3, 16, 16, generator=g), torch.tensor([3, 400, 998])
    with torch.no_grad():
        prediction, target = predict(unet, noise_scheduler, latents, noise, timesteps, caption(context))
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        expected = unet(noisy, timesteps, encoder_hidden_states=context).sample
    assert torch.equal(prediction, expected)
    assert torch.equal(target, noise if kind == "epsilon" else noise_scheduler.get_velocity(latents, noise, timesteps))
    mse = torch.nn.functional.mse_loss(expected, target, reduction="none").mean(dim=(1, 2, 3))
    assert torch.allclose(squared_error(prediction, target), mse)
