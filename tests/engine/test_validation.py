"""The held-out loss: fixed draws, measured without a trace."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from sdclr.commands.train import train
from sdclr.engine.validation import Draws, evaluate, evaluation_mode, fixed_draws
from sdclr.engine.watch import Watch
from sdclr.errors import DivergenceError
from sdclr.report import metrics

KEYS = ["a.png", "b.png", "c.png"]


def draws_of(keys: list[str], per_image: int, shape: tuple[int, ...], timesteps: int, seed: int) -> Draws:
    return fixed_draws(keys, per_image, [shape] * len(keys), timesteps, seed)


def noise_of(draws: Draws) -> torch.Tensor:
    return torch.stack(draws.noise)


def weights_of(folder: Path) -> bytes:
    return (folder / "final" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize(("per_image", "timesteps"), [(1, 1000), (4, 1000), (7, 1000), (250, 1000), (8, 10)])
def test_each_image_has_one_timestep_in_each_stratum(per_image, timesteps):
    draws = draws_of(KEYS, per_image, (4, 2, 2), timesteps, seed=3)
    for k, column in enumerate(draws.timesteps.reshape(len(KEYS), per_image).T.tolist()):
        assert all(int(timesteps * k / per_image) <= t <= timesteps * (k + 1) / per_image for t in column)
        assert all(0 <= t < timesteps for t in column)


def test_timesteps_are_spread_over_their_stratum_and_noise_is_standard_normal():
    draws = draws_of([f"{i}.png" for i in range(500)], 4, (4, 2, 2), 1000, seed=3)
    first = draws.timesteps.reshape(500, 4)[:, 0]
    assert first.float().mean().item() == pytest.approx(124.5, abs=5 * 72 / 500**0.5)
    assert (first.min().item(), first.max().item()) == (pytest.approx(0, abs=5), pytest.approx(249, abs=5))
    assert noise_of(draws).shape == (2000, 4, 2, 2)
    assert noise_of(draws).mean().item() == pytest.approx(0, abs=5 / 32000**0.5)
    assert noise_of(draws).std().item() == pytest.approx(1, abs=5 / 64000**0.5)


def test_another_image_changes_no_other_images_draws():
    before, after = (draws_of(keys, 4, (4, 2, 2), 1000, seed=3) for keys in (KEYS, ["0.png", "aa.png", *KEYS]))
    assert torch.equal(before.timesteps, after.timesteps[8:])
    assert torch.equal(noise_of(before), noise_of(after)[8:])


def test_another_seed_gives_other_draws_and_images_differ():
    draws, others = (draws_of(KEYS, 4, (4, 2, 2), 1000, seed=seed) for seed in (3, 4))
    assert not torch.equal(noise_of(draws), noise_of(others))
    assert not torch.equal(draws.timesteps, others.timesteps)
    assert not torch.equal(noise_of(draws)[:4], noise_of(draws)[4:8])


def test_one_model_measured_twice_gives_the_same_bits(run):
    run.fresh_state()
    draws = run.draws(run.held_out)
    losses = run.losses(run.held_out, draws)
    assert losses.shape == (2, 4)
    assert losses.dtype == np.float64
    assert losses.tobytes() == run.losses(run.held_out, run.draws(run.held_out)).tobytes()


def test_losses_are_the_mean_squared_errors_of_diffusers_own_calls(run):
    run.fresh_state()
    draws, held = run.draws(run.held_out), run.held_out
    expected = []
    with torch.no_grad():
        for i in range(len(draws)):
            image, t, noise = draws.image_of(i), draws.timesteps[i : i + 1], draws.noise[i][None]
            noisy = run.parts.noise_scheduler.add_noise(held.mean[image][:1], noise, t)
            prediction = run.parts.unet(
                noisy, t, encoder_hidden_states=held.captions["encoder_hidden_states"][image : image + 1]
            ).sample
            expected.append(float(torch.nn.functional.mse_loss(prediction, noise)))
    assert run.losses(held, draws).flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_measuring_leaves_every_random_state_as_it_was(run):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    run.losses(run.held_out, run.draws(run.held_out))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1][1])
    assert np.random.get_state()[2:] == before[1][2:]
    assert random.getstate() == before[2]


def test_measuring_changes_neither_weights_nor_gradients(run):
    run.fresh_state()
    unet = run.modules["unet"]
    unet.zero_grad(set_to_none=True)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    run.losses(run.held_out, run.draws(run.held_out))
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in unet.parameters())


def test_batches_are_always_the_same_and_cover_every_draw_once_in_order():
    draws, calls = draws_of(KEYS, 3, (1,), 1000, seed=3), []

    def losses_of(images, timesteps, noise):
        calls.append((images, timesteps.tolist()))
        assert torch.is_inference_mode_enabled()
        return timesteps.float()

    found = [evaluate([], losses_of, draws, 4, Accelerator(cpu=True)) for _ in range(2)]
    assert [images for images, _ in calls] == [[0, 0, 0, 1], [1, 1, 2, 2], [2]] * 2
    assert found[0].tolist() == draws.timesteps.reshape(3, 3).tolist() == found[1].tolist()


@pytest.mark.parametrize("failing", [False, True])
def test_every_module_and_submodule_returns_to_its_own_mode(failing):
    def layers() -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Dropout(0.5)))

    training, evaluating, mixed = layers().train(), layers().eval(), layers().train()
    mixed[1].eval()
    inside = []
    try:
        with evaluation_mode([training, evaluating, mixed]):
            inside = [m.training for top in (training, evaluating, mixed) for m in top.modules()]
            if failing:
                raise KeyError
    except KeyError:
        pass
    assert inside == [False] * 12
    assert [m.training for m in training.modules()] == [True] * 4
    assert [m.training for m in evaluating.modules()] == [False] * 4
    assert [m.training for m in mixed.modules()] == [True, True, False, False]


@pytest.mark.parametrize(
    "cadence", ["validation: {fraction: 0.2, every: 3, timesteps_per_image: 2}", "checkpoint: {every: 5}"]
)
def test_how_often_a_run_validates_or_saves_leaves_its_weights_as_they_are_bit_for_bit(config, trained, cadence):
    path = config(cadence)
    train(path)
    other = path.parent / "runs" / "tiny"
    assert weights_of(other) == weights_of(trained)
    steps = [[r for r in metrics.read(f / "metrics.jsonl") if r["kind"] == "step"] for f in (trained, other)]
    assert steps[0] == steps[1]


def test_a_held_out_loss_that_is_not_finite_is_a_divergence_and_no_new_best(run):
    run.fresh_state()
    watch = Watch(run, run.held_out, run.stabilised, keep_best=True)
    watch.look(0, 0.0)
    with torch.no_grad():
        run.modules["unet"].conv_out.bias.fill_(float("inf"))
    with pytest.raises(DivergenceError, match=r"held-out loss after step 5 is (nan|inf)"):
        watch.look(5, 1e-3)
    assert watch.best.step == 0
    assert watch.best_weights is None


def test_a_loss_of_training_images_that_is_not_finite_is_a_divergence(run, monkeypatch):
    run.fresh_state()
    watch = Watch(run, run.held_out, run.stabilised, keep_best=True)
    measured = run.losses
    monkeypatch.setattr(
        run, "losses", lambda seen, draws: measured(seen, draws) * (np.nan if seen is run.stabilised else 1)
    )
    with pytest.raises(DivergenceError, match="loss of the training images after step 5 is nan"):
        watch.look(5, 1e-3)
    assert watch.best is None


def test_a_watch_knows_its_best_look_how_long_ago_that_was_and_the_weights_of_then(run):
    run.fresh_state()
    watch = Watch(run, run.held_out, run.stabilised, keep_best=True)
    bias = run.modules["unet"].conv_out.bias
    base = watch.look(0, 0.0)
    assert (base["vs_base"], base["vs_base_low"], base["vs_base_high"]) == (0, 0, 0)
    records = []
    untouched = bias.detach().clone()
    for step, shift in enumerate((1.0, 0.5, 0.75, 2.0), 1):
        with torch.no_grad():
            bias.copy_(untouched + shift)
        records.append(watch.look(step, step * 1e-3))
    losses = [r["loss"] for r in records]
    assert watch.best.loss == min([base["loss"], *losses])
    assert watch.best.step == int(np.argmin([base["loss"], *losses]))
    assert watch.since_best == 4 - watch.best.step
    for record in records:
        images = np.array(list(record["images"].values()))
        assert record["loss"] == pytest.approx(images.mean())
        assert record["loss"] == pytest.approx(np.mean(record["bins"]))
        assert record["gap"] == pytest.approx(record["loss"] - record["train_loss"])
        assert record["vs_base"] == pytest.approx(record["loss"] - base["loss"])


def test_a_restored_watch_goes_on_as_the_stored_one_would(run):
    run.fresh_state()
    watches = [Watch(run, run.held_out, run.stabilised, keep_best=False) for _ in range(2)]
    watches[0].look(0, 0.0)
    watches[0].look(2, 1e-3)
    watches[1].restore(watches[0].state(), None)
    assert watches[1].look(4, 2e-3) == watches[0].look(4, 2e-3)
    assert watches[1].state() == watches[0].state()
