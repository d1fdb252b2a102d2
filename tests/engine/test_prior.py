"""Prior pictures (prior.images): every step also learns from as many of them, by DreamBooth's arithmetic, and what is measured stays the subject's."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import again
import pytest
import torch
from PIL import Image, ImageOps
from tiny import built, write_config

from sdclr.commands.range_test import range_test
from sdclr.commands.train import train
from sdclr.config import source
from sdclr.engine import memory
from sdclr.engine.fit import settle_batch
from sdclr.engine.plan import make_plan, read_inputs
from sdclr.engine.telling import describe
from sdclr.errors import CheckpointError, ConfigError, DataError, Inconclusive, InputError

pytestmark = pytest.mark.usefixtures("no_figure")


@pytest.fixture
def others(tmp_path: Path, pictures: Path) -> Path:
    """Six pictures of something else, with captions of their own, one of them wide."""
    folder = tmp_path / "others"
    folder.mkdir()
    for number, path in enumerate(sorted(pictures.glob("*.png"))[:6]):
        picture = ImageOps.invert(Image.open(path).convert("RGB"))
        (picture.resize((64, 32)) if number == 3 else picture).save(folder / f"other-{number}.png")
        (folder / f"other-{number}.txt").write_text(f"no {number}")
    return folder


@pytest.fixture
def write(tmp_path: Path, model: Path, pictures: Path, others: Path) -> Callable[..., Path]:
    """Writes a config with these prior pictures: write("train: {steps: 3}", folder="other", weight=0.5)."""

    def write(extra: str = "", folder: str = ".", weight: float = 0.5, subject: Path = pictures) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        settings = f"prior: {{images: '{others}', weight: {weight}}}\n{extra}"
        return write_config(tmp_path / folder / "run.yaml", model, subject, tmp_path / folder / "runs", settings)

    return write


def test_a_step_has_the_gradient_of_dreambooths_script(write):
    """train_dreambooth.py: subject and class in one batch, the prediction cut in two, mse + prior_loss_weight · mse."""
    run = built(write(weight=0.7))
    run.fresh_state()
    unet, parameters = run.modules["unet"], list(run.modules["unet"].parameters())
    subject, prior = run.batches(3)
    latents, noise, t = (
        torch.cat([getattr(b, part) for b in (subject, prior)]) for part in ("latents", "noise", "timesteps")
    )
    hidden = torch.cat([b.told["encoder_hidden_states"] for b in (subject, prior)])
    noisy = run.parts.noise_scheduler.add_noise(latents, noise, t)
    predicted, predicted_prior = unet(noisy, t, hidden).sample.chunk(2)
    target, target_prior = noise.chunk(2)
    mse = torch.nn.functional.mse_loss
    expected = mse(predicted, target) + 0.7 * mse(predicted_prior, target_prior)
    gradients = torch.autograd.grad(expected, parameters)
    loss = sum(float(run.add_gradients(each, 2)) for each in (subject, prior))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.linalg.vector_norm(parameter.grad - gradient) <= 1e-5 * torch.linalg.vector_norm(gradient) + 1e-8


@pytest.mark.parametrize("aspect", ["square", "buckets"])
def test_a_step_is_the_mean_of_its_subject_and_the_weighted_mean_of_its_prior_picture_by_picture(write, aspect):
    run = built(write(), "batch.size=4", "batch.accumulate=2", f"data.aspect={aspect}")
    run.fresh_state()
    parameters = list(run.modules["unet"].parameters())
    micro_batches = run.batches(1)
    assert len(micro_batches) == (4 if aspect == "square" else 5)
    loss = sum(float(run.add_gradients(each, len(micro_batches))) for each in micro_batches)
    summed, total = [torch.zeros_like(p) for p in parameters], 0.0
    for stream, weight in zip(run.streams, (1, 0.5), strict=True):
        samples = [sample for micro_batch in stream.batches(1) for sample in micro_batch]
        assert len(samples) == 8
        for each in samples:
            one = run.loss(run.prepare([each], stream=stream)) * weight / 8
            total += one.item()
            for so_far, gradient in zip(summed, torch.autograd.grad(one, parameters), strict=True):
                so_far += gradient
    assert loss == pytest.approx(total, rel=1e-5)
    for parameter, expected in zip(parameters, summed, strict=True):
        assert torch.linalg.vector_norm(parameter.grad - expected) <= 1e-5 * torch.linalg.vector_norm(expected) + 1e-8


def test_prior_pictures_take_turns_and_have_noise_of_their_own(write):
    run = built(write())
    _, prior = run.streams
    seen = Counter(s.index for step in range(6) for batch in prior.batches(step) for s in batch)
    assert seen == Counter(dict.fromkeys(range(6), 2))
    ours, theirs = run.batches(0)
    assert not torch.equal(ours.noise, theirs.noise)
    assert not torch.equal(ours.timesteps, theirs.timesteps)


def test_what_is_measured_is_the_subject_alone(write, config):
    with_prior, without = built(write()), built(config())
    assert [p.key for p in with_prior.held_out.pairs] == [p.key for p in without.held_out.pairs]
    assert with_prior.inputs.steps_per_epoch == without.inputs.steps_per_epoch
    losses = [run.losses(run.held_out, run.draws(run.held_out)) for run in (with_prior, without)]
    assert losses[0].tolist() == losses[1].tolist()


def test_the_subject_keeps_its_order_noise_and_timesteps(write, config):
    ours, theirs = built(write()).batches(2)[0], built(config()).batches(2)[0]
    for part in ("latents", "noise", "timesteps"):
        assert torch.equal(getattr(ours, part), getattr(theirs, part))


def test_a_resumed_run_has_the_same_bits(write):
    again.resumes_to_the_same_bits(write())


def test_two_processes_come_to_the_same_weights(write, tmp_path):
    again.two_processes_come_to_the_same_weights(
        lambda folder: write("batch: {size: 4, accumulate: 2}", folder=folder), tmp_path
    )


def test_a_range_test_trains_with_them_and_answers_for_no_other_run(write, others):
    path = write("range_test: {max_steps: 12, lr: [1e-5, 1e-2]}")
    with pytest.raises(Inconclusive):
        range_test(path)
    result = json.loads((path.parent / "runs" / "tiny" / "range-test" / "result.json").read_text())
    assert result["fingerprint"]["prior"]["weight"] == 0.5
    with pytest.raises(InputError, match=r"the range test was inconclusive"):
        train(path, ["schedule.max_lr=auto"])
    with pytest.raises(InputError, match=r"differs in prior\.weight \(0\.5 there, 1\.0 here\)"):
        train(path, ["schedule.max_lr=auto", "prior.weight=1"])
    with pytest.raises(InputError, match=r"differs in prior pictures \(some there, none here\)"):
        train(path, ["schedule.max_lr=auto", "prior.images=null", "prior.weight=1"])
    (others / "other-1.txt").write_text("another caption")
    with pytest.raises(InputError, match=r"differs in prior pictures or their captions$"):
        train(path, ["schedule.max_lr=auto"])


def test_a_resumed_run_must_have_them_as_they_were(write, others):
    path = write()
    train(path, ["checkpoint.every=3"])
    run = path.parent / "runs" / "tiny"
    (run / "final").rename(run / "gone")
    with pytest.raises(CheckpointError, match=r"prior\.weight is 2\b.*started with 0\.5"):
        train(path, ["checkpoint.every=3", "prior.weight=2"], resume=True)
    (others / "other-2.png").unlink()
    with pytest.raises(CheckpointError, match=r"others: its pictures or captions are not those"):
        train(path, ["checkpoint.every=3"], resume=True)


def test_an_automatic_batch_is_no_larger_than_there_are_prior_pictures(write, others, capsys):
    (others / "other-0.png").unlink()
    loaded = settle_batch(source.load(write(), ["batch.size=auto"]))
    assert loaded.config.batch.size == 5
    assert "batch.size: auto is 5" in (said := capsys.readouterr().err)
    assert "all prior pictures there are" in said
    assert len(read_inputs(loaded, measuring=True).prior) == 5


def test_folders_in_one_another_are_refused(write, pictures, tmp_path):
    inner = shutil.copytree(pictures, tmp_path / "outer" / "inner")
    for subject, prior in ((inner, inner), (inner.parent, inner), (inner, inner.parent)):
        with pytest.raises(ConfigError, match=r"prior\.images and data\.images .*lie in one another"):
            read_inputs(
                source.load(
                    write(subject=subject), [f"prior.images={prior}", "validation.fraction=0", "checkpoint.best=false"]
                )
            )


def test_a_compiled_steps_trial_is_one_of_as_many_micro_batches_as_a_step_has(write):
    run, counts = built(write()), []
    run.add_gradients = lambda batch, count: counts.append(count)
    assert run._cannot_train() is None
    assert counts == [len(run.batches(0))] == [2]


def test_memory_is_counted_with_the_gradient_that_a_second_backward_meets(write):
    def training(*overrides: str) -> memory.Needs:
        loaded = source.load(write(), overrides)
        return memory.count(loaded.config, 8, 2, torch.device("cpu"), only=2)

    both, alone, twice = training(), training("prior.images=null", "prior.weight=1"), training("prior.images=null", "prior.weight=1", "batch.accumulate=2")  # fmt: skip
    assert both.training.peak(2) == twice.training.peak(2)
    assert alone.training.peak(2) < both.training.peak(2) <= alone.training.peak(2) + both.trained_bytes


def test_in_full_bf16_half_as_many_gradients_are_summed_up(write):
    settings = ["model.precision=full_bf16", "batch.accumulate=33"]
    with pytest.raises(ConfigError, match=r"must be at most 32 .* with prior\.images"):
        source.load(write(), settings)
    source.load(write(), [*settings, "prior.images=null", "prior.weight=1"])


def test_a_caption_for_all_stands_where_there_is_no_file(write, others):
    for file in others.glob("*.txt"):
        file.unlink()
    inputs = read_inputs(source.load(write(), ["prior.caption=a disc"]))
    assert {pair.caption for pair in inputs.prior} == {"a disc"}
    assert "a disc" not in {pair.caption for pair in inputs.split.train}


def test_the_plan_says_how_many_there_are(write, others):
    loaded = source.load(write())
    inputs = read_inputs(loaded)
    rows = dict(describe(loaded.config, inputs, make_plan(loaded, inputs)))
    assert rows["prior"] == f"6 pictures of {others}: a step takes 2 of them too, weighted 0.5"


def test_a_held_out_picture_among_them_is_refused(write, others, pictures):
    held = read_inputs(source.load(write())).split.validation[0].path
    shutil.copy(held, others / "leak.png")
    with pytest.raises(DataError, match=rf"others/leak\.png and .*{held.name} are the same picture"):
        read_inputs(source.load(write()))


@pytest.mark.parametrize(
    ("overrides", "place", "words"),
    [
        (["prior.images=null"], "prior.weight", "has no effect: prior.images is null"),
        (["optimizer.fused_backward=true", "optimizer.max_grad_norm=null"], "optimizer.fused_backward", "prior.images"),
        (["batch.size=7"], "prior.images", "holds 6 pictures, and a batch needs 7"),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_what_cannot_be_together_is_refused_at_its_key(write, overrides, place, words):
    with pytest.raises(ConfigError) as caught:
        read_inputs(source.load(write(), overrides))
    assert place in str(caught.value)
    assert words in str(caught.value)


def test_a_folder_that_is_not_there_or_holds_a_damaged_picture_is_named(write, others):
    with pytest.raises(DataError, match=r"nowhere: there is no such image folder") as caught:
        read_inputs(source.load(write(), ["prior.images=nowhere"]))
    assert "sdclr draw" in caught.value.hint
    whole = (others / "other-0.png").read_bytes()
    (others / "other-0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"other-0\.png: cannot be"):
        train(write())
