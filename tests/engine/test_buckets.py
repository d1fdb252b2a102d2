"""Pictures of many shapes (data.aspect: buckets): each step and each validation is the mean over its pictures, whatever shapes they have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import again
import pytest
import torch
from PIL import Image, ImageOps
from tiny import built, write_config

from sdclr.commands.range_test import range_test
from sdclr.commands.sample import sample
from sdclr.commands.train import train
from sdclr.config import source
from sdclr.data.dataset import View, look
from sdclr.engine import rounding
from sdclr.engine.checkpoint import Checkpoint
from sdclr.engine.plan import make_plan, read_inputs
from sdclr.engine.run import Run
from sdclr.engine.telling import describe
from sdclr.errors import CheckpointError, ConfigError, Inconclusive, InputError

pytestmark = pytest.mark.usefixtures("no_figure")
SIZES = [(32, 32), (64, 32), (32, 64), (40, 24), (96, 96), (30, 58), (48, 17), (33, 31), (100, 60), (24, 40)]
SETTINGS = """data: {{images: '{pictures}', resolution: 32, aspect: buckets, flip: true, caption_dropout: 0.3}}
batch: {{size: 4, accumulate: 2}}
validation: {{fraction: 0.3, every: 2, timesteps_per_image: 3}}"""


@pytest.fixture(scope="module")
def many(tmp_path_factory, pictures: Path) -> Path:
    """The ten pictures, each cut to a shape of its own."""
    folder = tmp_path_factory.mktemp("many")
    for path, size in zip(sorted(pictures.glob("*.png")), SIZES, strict=True):
        ImageOps.fit(Image.open(path), size).save(folder / path.name)
        (folder / path.with_suffix(".txt").name).write_text(path.with_suffix(".txt").read_text())
    return folder


@pytest.fixture
def write(tmp_path: Path, model: Path, many: Path) -> Callable[..., Path]:
    """Writes a config of the settings above: write("train: {steps: 3}", folder="other")."""

    def write(extra: str = "", folder: str = ".", base: Path = model, pictures: Path = many) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        settings = SETTINGS.format(pictures=pictures)
        return write_config(tmp_path / folder / "run.yaml", base, pictures, tmp_path / folder / "runs", f"{settings}\n{extra}")  # fmt: skip

    return write


def gradients(run: Run, step: int) -> tuple[list[torch.Tensor], float]:
    """Of one step, as the loop adds them up, and the step's loss."""
    run.fresh_state()
    parameters = list(run.modules["unet"].parameters())
    for parameter in parameters:
        parameter.grad = None
    micro_batches = run.batches(step)
    loss = sum(float(run.add_gradients(each, len(micro_batches))) for each in micro_batches)
    return [p.grad.clone() for p in parameters], loss


@pytest.mark.parametrize("step", range(3))
def test_a_step_is_the_mean_over_its_pictures_one_by_one(write, step):
    run = built(write())
    found, loss = gradients(run, step)
    parameters = list(run.modules["unet"].parameters())
    samples = [sample for micro_batch in run.inputs.batches(step) for sample in micro_batch]
    summed, losses = [torch.zeros_like(p) for p in parameters], []
    for each in samples:
        one = run.loss(run.prepare([each]))
        losses.append(one.item())
        for total, gradient in zip(summed, torch.autograd.grad(one, parameters), strict=True):
            total += gradient / len(samples)
    assert loss == pytest.approx(sum(losses) / len(samples), rel=1e-5)
    for ours, expected in zip(found, summed, strict=True):
        assert torch.linalg.vector_norm(ours - expected) <= 1e-5 * torch.linalg.vector_norm(expected) + 1e-8


def test_a_step_goes_forward_once_for_each_shape_and_batch_and_sees_every_sample_once(write):
    run = built(write())
    for step in range(6):
        samples = [sample for micro_batch in run.inputs.batches(step) for sample in micro_batch]
        micro_batches = run.batches(step)
        shapes = [tuple(each.latents.shape[1:]) for each in micro_batches]
        assert sum(len(each.latents) for each in micro_batches) == len(samples) == 8
        assert max(len(each.latents) for each in micro_batches) <= 4
        of_shape = {shape: sum(tuple(run.train.mean[s.index].shape[1:]) == shape for s in samples) for shape in shapes}
        assert len(shapes) == sum(-(-count // 4) for count in of_shape.values())
        assert len(of_shape) > 1
        assert sum(float(each.share) for each in micro_batches) == pytest.approx(len(micro_batches))


@torch.no_grad()
def test_the_held_out_losses_are_those_of_diffusers_own_calls_draw_by_draw(write):
    run = built(write("batch: {size: 1}"), "validation.fraction=0.6")
    run.fresh_state()
    draws, held = run.draws(run.held_out), run.held_out
    assert len({noise.shape for noise in draws.noise}) > 2
    expected = []
    for draw in range(len(draws)):
        image, t, noise = draws.image_of(draw), draws.timesteps[draw : draw + 1], draws.noise[draw][None]
        noisy = run.parts.noise_scheduler.add_noise(held.mean[image][:1], noise, t)
        context = held.captions["encoder_hidden_states"][image : image + 1]
        expected.append(torch.nn.functional.mse_loss(run.parts.unet(noisy, t, context).sample, noise).item())
    assert run.losses(held, draws).flatten().tolist() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_latents_are_those_of_the_whole_picture_by_diffusers_vae_and_come_from_the_cache_again(write):
    run, again = built(write()), built(write())
    for pair, mean, cached in zip(run.train.pairs, run.train.mean, again.train.mean, strict=True):
        pixels = torch.from_numpy(look(pair, 32, View(), aspect="buckets").pixels)[None]
        assert torch.allclose(mean[0], run.parts.vae.encode(pixels).latent_dist.mean[0] * 0.5, atol=1e-5)
        assert torch.equal(mean, cached)


def test_where_all_pictures_are_square_buckets_change_nothing(write, pictures):
    weights = []
    for folder, aspect in (("a", "square"), ("b", "buckets")):
        path = write(folder=folder, pictures=pictures)
        train(path, [f"data.aspect={aspect}"])
        weights.append((path.parent / "runs" / "tiny" / again.WEIGHTS).read_bytes())
    assert weights[0] == weights[1]


def test_a_resumed_run_has_the_same_bits(write):
    again.resumes_to_the_same_bits(write())


def test_two_processes_come_to_the_same_weights(write, tmp_path):
    again.two_processes_come_to_the_same_weights(lambda folder: write(folder=folder), tmp_path)


def test_sdxl_is_told_the_shape(write, xl):
    run = built(write(base=xl))
    for each in run.batches(0):
        height, width = (4 * side for side in each.latents.shape[2:])
        assert each.told["time_ids"][:, 4:].tolist() == [[height, width]] * len(each.latents)


def test_a_range_test_measures_them_and_its_answer_is_not_that_of_squares(write):
    path = write("range_test: {max_steps: 12, lr: [1e-5, 1e-2]}")
    with pytest.raises(Inconclusive):
        range_test(path)
    result = json.loads((path.parent / "runs" / "tiny" / "range-test" / "result.json").read_text())
    assert result["fingerprint"]["aspect"] == "buckets"
    assert result["arms"]
    with pytest.raises(InputError, match=r"aspect \(buckets there, none here\)"):
        train(path, ["data.aspect=square", "schedule.max_lr=auto"])


def test_the_plan_says_what_the_pictures_are_cut_to_and_of_squares_what_they_lose(write):
    rows = {}
    for aspect in ("buckets", "square"):
        loaded = source.load(write(), [f"data.aspect={aspect}"])
        inputs = read_inputs(loaded)
        rows[aspect] = dict(describe(loaded.config, inputs, make_plan(loaded, inputs)))["shapes"]
    assert rows["buckets"] == "3 of 32×32, 3 of 40×24, 3 of 24×40, 1 of 48×16: 94% of the pictures is seen"
    assert rows["square"] == "squares, which show 66% of the pictures; data.aspect: buckets would show 94%"


def test_a_run_that_is_older_than_a_key_is_resumed_as_what_the_key_stands_for(write, pictures, monkeypatch):
    path = write(pictures=pictures)
    train(path, ["data.aspect=square", "checkpoint.every=3"])
    run = path.parent / "runs" / "tiny"
    (run / "final").rename(run / "gone")
    told = Checkpoint.info

    def older(checkpoint: Checkpoint) -> dict:
        info = told(checkpoint)
        for section, key in (("data", "aspect"), ("data", "repeats"), ("data", "tag_orders"), ("data", "keep_tags"), ("sample", "size")):  # fmt: skip
            del info["config"][section][key]
        del info["config"]["lora"], info["config"]["mask"]
        return info

    monkeypatch.setattr(Checkpoint, "info", older)
    train(path, ["data.aspect=square", "checkpoint.every=3"], resume=True)
    (run / "final").rename(run / "gone again")
    with pytest.raises(CheckpointError, match=r"data\.aspect is buckets in the config, and .* with square"):
        train(path, ["checkpoint.every=3"], resume=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("optimizer: {fused_backward: true, max_grad_norm: null}\nbatch: {size: 4}", "batch.size"),
        ("model: {{base: '{model}', compile: 'on'}}", "data.aspect"),
        ("sample: {prompts: [disc], size: [32, 36]}", "must be a multiple of 8"),
    ],
)
def test_what_cannot_be_together_is_refused(write, model, settings, words):
    path = write(settings.format(model=model) if "{model}" in settings else settings)
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        source.load(path)


def test_updates_in_the_backward_are_possible_one_picture_at_a_time(write):
    final = {}
    for name, fused in (("fused", "true"), ("plain", "false")):
        path = write(f"optimizer: {{fused_backward: {fused}, max_grad_norm: null}}\nbatch: {{size: 1}}", folder=name)
        train(path)
        final[name] = (path.parent / "runs" / "tiny" / again.WEIGHTS).read_bytes()
    assert final["fused"] == final["plain"]


def test_samples_have_the_size_that_is_asked_for(write):
    path = write("sample: {prompts: [disc], seeds: [1], steps: 2, size: [48, 32]}")
    train(path)
    sample(path)
    samples = path.parent / "runs" / "tiny" / "samples"
    assert {Image.open(cell).size for cell in (samples / "cells").glob("*.png")} == {(48, 32)}
    assert json.loads((samples / "grid.json").read_text())["settings"]["size"] == [48, 32]


def test_no_more_gradients_are_summed_in_bf16_than_it_can_hold(write, monkeypatch):
    rounding.refuse_many_sums(64)
    with pytest.raises(InputError, match="sums up 64 gradients at most, and a step has up to 65"):
        rounding.refuse_many_sums(65)
    run, counted = built(write()), []
    most = max(len(run.batches(step)) for step in range(20))
    monkeypatch.setattr(rounding, "refuse_many_sums", counted.append)
    run.config = run.config.model_copy(update={"model": run.config.model.model_copy(update={"precision": "full_bf16"})})
    run._encode()
    assert counted == [2 + len({mean.shape for mean in run.train.mean}) - 1]
    assert most <= counted[0]
