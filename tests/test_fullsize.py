"""One training step of the true SD 1.5 UNet, on the CPU: the shape is right, it fits into 20 GiB, and its state can be saved."""

from __future__ import annotations

import resource
import time

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel

from sdclr.engine.checkpoint import FULL, save, snapshot, verify
from sdclr.engine.loop import TrainState, gradients_of, optimizer_steps
from sdclr.model.objective import predict, squared_error


@pytest.mark.fullsize
def test_one_adamw_step_of_sd_1_5_at_256_pixels_stays_below_20_gib_and_its_state_is_saved(tmp_path):
    torch.manual_seed(0)
    # the config of stable-diffusion-v1-5's UNet; the weights are random
    unet = UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
        cross_attention_dim=768, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    unet.enable_gradient_checkpointing()
    noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, fused=True)
    g = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(1, 4, 32, 32, generator=g) for _ in range(2))
    context, timesteps = torch.randn(1, 77, 768, generator=g), torch.tensor([500])

    def loss_fn(batch: None) -> torch.Tensor:
        return squared_error(
            *predict(unet, noise_scheduler, latents, noise, timesteps, {"encoder_hidden_states": context})
        ).mean()

    before, started = unet.conv_in.weight.detach().clone(), time.monotonic()
    state = TrainState({"unet": unet}, optimizer)
    accelerator = Accelerator(cpu=True)
    add_gradients = gradients_of(loss_fn, accelerator)
    (result,) = optimizer_steps(state, lambda s: [None], add_gradients, lambda s: 1e-6, 1, accelerator, 1.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory {peak:.1f} GiB, {time.monotonic() - started:.0f} s, loss {result.loss:.4f}")
    assert result.loss == pytest.approx(1, abs=0.5)
    assert result.grad_norm > 0
    moved = (unet.conv_in.weight - before).abs()
    # AdamW's first step moves each weight by its rate, whatever the gradient's size
    assert moved.max().item() == pytest.approx(1e-6, rel=0.1)
    assert peak <= 20

    started = time.monotonic()
    kept = save(tmp_path, FULL, snapshot(state, {"unet": unet}), {"unet": unet}, {"kappa": None})
    seconds, size = (
        time.monotonic() - started,
        sum(file.stat().st_size for file in kept.path.rglob("*") if file.is_file()),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"saved {size / 2**30:.1f} GiB, synced and with its sha256, in {seconds:.0f} s; peak memory {peak:.1f} GiB")
    started = time.monotonic()
    assert verify(kept) == []
    print(f"verified in {time.monotonic() - started:.0f} s")
    assert size > 3 * 4 * 859_520_964  # weights and two moments, fp32
