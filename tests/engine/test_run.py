"""What a Run hands to the loop: the optimizer of the config, fresh states, and a loss that is a function of the samples alone."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from sdclr.config import source
from sdclr.data.batches import Sample
from sdclr.engine.graph import Graph
from sdclr.engine.plan import read_inputs
from sdclr.engine.run import Run
from sdclr.errors import DataError, InputError
from sdclr.model.objective import min_snr_weights
from sdclr.seeding import generator

SAMPLES = [Sample(position=i, index=i, view=i % 2, drop_caption=i == 2) for i in range(4)]


def build(path: Path, *overrides: str) -> Run:
    loaded = source.load(path, overrides)
    return Run(loaded.config, read_inputs(loaded))


@pytest.fixture(scope="module")
def both(tmp_path_factory, model, pictures) -> Run:
    """A run that trains UNet and text encoder, with every setting of AdamW given."""
    from tiny import write_config

    folder = tmp_path_factory.mktemp("both")
    extra = "optimizer: {betas: [0.7, 0.95], eps: 1.0e-6, weight_decay: 0.03, text_encoder_scale: 0.5}\nloss: {min_snr_gamma: 5, noise_offset: 0.1}"
    path = write_config(folder / "run.yaml", model, pictures, folder / "runs", extra)
    return build(path, "model.train=[unet, text_encoder]")


def gradients(run: Run, batches: list[list[Sample]]) -> list[torch.Tensor]:
    run.fresh_state()
    parameters = [p for m in run.modules.values() for p in m.parameters()]
    for p in parameters:
        p.grad = None
    for batch in batches:
        (run.loss(run.prepare(batch)) / len(batches)).backward()
    return [p.grad.clone() for p in parameters]


def test_adamw_gets_the_configs_betas_eps_decay_and_one_group_a_module(both):
    optimizer = both.fresh_state().optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [g["lr_scale"] for g in optimizer.param_groups] == [1.0, 0.5]
    for group, module in zip(optimizer.param_groups, both.modules.values(), strict=True):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.7, 0.95), 1e-6, 0.03)
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
    assert list(both.modules) == ["unet", "text_encoder"]


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        ("{name: sgd, momentum: 0.5, weight_decay: 0.2}", torch.optim.SGD, {"momentum": 0.5, "weight_decay": 0.2}),
        ("{name: adafactor, weight_decay: 0.2}", torch.optim.Adafactor, {"weight_decay": 0.2}),
        ("{name: adamw, weight_decay: 0}", torch.optim.AdamW, {"weight_decay": 0, "betas": (0.9, 0.999), "eps": 1e-8}),
    ],
)
def test_the_optimizer_is_the_one_the_config_names(config, settings, kind, expected):
    optimizer = build(config(f"optimizer: {settings}")).fresh_state().optimizer
    assert type(optimizer) is kind
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


def test_a_fresh_state_has_the_files_weights_and_an_empty_optimizer_whatever_was_trained_before(run, model):
    from safetensors.torch import load_file

    state = run.fresh_state()
    run.loss(run.prepare(SAMPLES)).backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    stored = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(tensor, stored[name]) for name, tensor in run.modules["unet"].state_dict().items())
    fresh = run.fresh_state()
    assert (fresh.step, fresh.exposure) == (0, 0.0)
    assert not fresh.optimizer.state_dict()["state"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in run.modules["unet"].state_dict().items())


def test_a_loss_is_a_function_of_its_samples_and_not_of_what_ran_before(run):
    run.fresh_state()
    first = run.loss(run.prepare(SAMPLES)).item()
    run.loss(run.prepare(SAMPLES[1:])), run.losses(run.held_out, run.draws(run.held_out)), torch.rand(7)
    assert run.loss(run.prepare(SAMPLES)).item() == first
    assert (
        run.loss(run.prepare([SAMPLES[0]])).item()
        != run.loss(run.prepare([Sample(9, SAMPLES[0].index, 0, False)])).item()
    )


@pytest.mark.parametrize("which", ["run", "both"])
def test_four_micro_batches_of_one_give_the_gradients_of_one_batch_of_four(which, request):
    run = request.getfixturevalue(which)
    whole, parts = gradients(run, [SAMPLES]), gradients(run, [[s] for s in SAMPLES])
    for one, other in zip(whole, parts, strict=True):
        assert torch.linalg.vector_norm(one - other) <= 1e-5 * torch.linalg.vector_norm(one) + 1e-9
    assert sum(float(g.abs().sum()) for g in whole) > 0


def test_every_trained_parameter_gets_a_gradient(both):
    names = [f"{part}.{name}" for part, module in both.modules.items() for name, _ in module.named_parameters()]
    without = [n for n, g in zip(names, gradients(both, [SAMPLES]), strict=True) if not g.abs().sum() > 0]
    # attention's key bias cannot matter: softmax does not see a constant added to every score
    assert [n for n in without if not n.endswith("k_proj.bias")] == []


def draws_of(run: Run, sample: Sample, offset: bool = False):
    """The draws of one sample by their names: timestep, noise, spread of the latents, shift."""
    g, shape = generator(run.config.run.seed, "sample", sample.position), run.train.mean[sample.index].shape[1:]
    t = torch.randint(1000, (1,), generator=g)
    noise, spread = torch.randn(shape, generator=g)[None], torch.randn(shape, generator=g)[None]
    if offset:
        noise = noise + run.config.loss.noise_offset * torch.randn((4, 1, 1), generator=g)[None]
    return t, noise, run.train.mean[sample.index][sample.view][None] + run.train.std[sample.index][sample.view] * spread


def test_the_training_loss_is_the_mean_of_diffusers_own_calls_sample_by_sample(run):
    run.fresh_state()
    expected = []
    with torch.no_grad():
        for sample in SAMPLES:
            t, noise, latents = draws_of(run, sample)
            caption = "" if sample.drop_caption else run.train.pairs[sample.index].caption
            tokens = run.parts.tokenizer(
                caption, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
            )
            context = run.parts.text_encoder(tokens.input_ids)[0]
            noisy = run.parts.noise_scheduler.add_noise(latents, noise, t)
            prediction = run.parts.unet(noisy, t, encoder_hidden_states=context).sample
            expected.append(torch.nn.functional.mse_loss(prediction, noise).item())
        assert run.loss(run.prepare(SAMPLES)).item() == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_min_snr_and_noise_offset_enter_the_training_loss_and_leave_validation_alone(both, run):
    both.fresh_state(), run.fresh_state()
    expected = []
    with torch.no_grad():
        for sample in SAMPLES:
            t, noise, latents = draws_of(both, sample, offset=True)
            known = both.no_caption if sample.drop_caption else both.train.captions
            tokens = known["input_ids"][0 if sample.drop_caption else sample.index][None]
            noisy = both.parts.noise_scheduler.add_noise(latents, noise, t)
            prediction = both.parts.unet(noisy, t, encoder_hidden_states=both.parts.text_encoder(tokens)[0]).sample
            weight = min_snr_weights(both.parts.noise_scheduler, t, 5).item()
            expected.append(weight * torch.nn.functional.mse_loss(prediction, noise).item())
        assert both.loss(both.prepare(SAMPLES)).item() == pytest.approx(sum(expected) / 4, rel=1e-5)
    plain = run.losses(run.held_out, run.draws(run.held_out))
    assert both.losses(both.held_out, both.draws(both.held_out)) == pytest.approx(plain, rel=1e-6)


def test_latents_are_those_of_diffusers_vae_times_its_scale(run):
    from sdclr.data.dataset import View, look

    pair = run.inputs.split.train[3]
    with torch.no_grad():
        for number, view in enumerate((View(), View(flipped=True))):
            posterior = run.parts.vae.encode(torch.from_numpy(look(pair, 32, view).pixels)[None]).latent_dist
            assert torch.allclose(run.train.mean[3][number], posterior.mean[0] * 0.5, atol=1e-5)
            assert torch.allclose(run.train.std[3][number], posterior.std[0] * 0.5, atol=1e-5)


def test_a_second_run_reads_the_cache_and_a_changed_picture_alone_is_encoded_again(tmp_path, config, model):
    from PIL import Image
    from tiny import make_pictures

    from sdclr.data.cache import TensorCache
    from sdclr.report import console

    folder = make_pictures(tmp_path / "own", count=5)
    path = config(f"data: {{images: '{folder}', resolution: 32}}")
    encoded = []
    original, bar = TensorCache.put, console.progress
    counted = []

    def shown(what, total, done=0):
        counted.append(total)
        return bar(what, total, done)

    def counting(cache, entries):
        encoded.extend(entries)
        original(cache, entries)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorCache, "put", counting)
        patch.setattr(console, "progress", shown)
        first = build(path)
        assert len(encoded) == 5 + 5 + 1  # pictures, captions, the empty caption
        again = build(path, "schedule.max_lr=2e-3")
        assert len(encoded) == 11
        assert all(map(torch.equal, first.train.mean, again.train.mean))
        Image.new("RGB", (32, 32), "red").save(folder / "picture-02.png")
        build(path)
        assert len(encoded) == 12
    assert sum(counted) == 6  # a bar for what is encoded, none for what is found


def test_pictures_that_cannot_be_decoded_are_all_named_before_anything_is_trained(tmp_path, config):
    from tiny import make_pictures

    folder = make_pictures(tmp_path / "own", count=6)
    for number in (1, 4):
        path = folder / f"picture-{number:02d}.png"
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError) as problem:
        build(config(f"data: {{images: '{folder}', resolution: 32}}"))
    assert len(problem.value.problems) == 2
    assert "picture-01.png" in problem.value.message
    assert "picture-04.png" in problem.value.message


def test_gradient_checkpointing_recomputes_both_modules_and_gives_the_same_gradients(config):
    path = config()
    found = []
    for setting in ("false", "true"):
        run = build(path, "model.train=[unet, text_encoder]", f"model.gradient_checkpointing={setting}")
        calls = {"unet": 0, "text_encoder": 0}
        counted = {
            "unet": run.parts.unet.down_blocks[0].resnets[0],
            "text_encoder": first_layer(run.parts.text_encoder),
        }
        for name, module in counted.items():
            module.register_forward_pre_hook(
                lambda *args, calls=calls, name=name: calls.__setitem__(name, calls[name] + 1)
            )
        found.append((calls, gradients(run, [SAMPLES])))
    assert found[0][0] == {"unet": 1, "text_encoder": 1}
    assert found[1][0] == {"unet": 2, "text_encoder": 2}
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-8)


def first_layer(text_encoder: torch.nn.Module) -> torch.nn.Module:
    return next(m for name, m in text_encoder.named_modules() if name.endswith("layers.0.mlp"))


def test_bf16_on_the_cpu_trains_a_step_on_fp32_weights(config):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from sdclr.engine.loop import optimizer_steps

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run = build(config(), "model.precision=bf16")
        state = run.fresh_state()
        seen = []
        run.parts.unet.conv_in.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        before = {name: tensor.clone() for name, tensor in run.modules["unet"].state_dict().items()}
        (result,) = optimizer_steps(
            state, lambda s: [run.prepare(SAMPLES)], run.add_gradients, lambda s: 1e-3, 1, run.accelerator, 1.0
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        Accelerator(mixed_precision="no")  # the state that the other tests' accelerators share
    assert seen == [torch.bfloat16]
    assert result.loss > 0
    after = run.modules["unet"].state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_a_picture_is_encoded_to_does_not_depend_on_which_others_were_missing(config):
    path = config()
    whole = build(path)
    cache = path.parent / "runs" / ".cache"
    entries = sorted(cache.rglob("*.safetensors"))
    for some in (entries[::3], entries[1::2], entries[:1]):
        for entry in some:
            entry.unlink()
        again = build(path)
        for name in ("mean", "std", "sizes"):
            assert all(map(torch.equal, getattr(whole.train, name), getattr(again.train, name)))
        assert torch.equal(*(found.train.captions["encoder_hidden_states"] for found in (whole, again)))
    assert sorted(cache.rglob("*.safetensors")) == entries


def test_a_run_that_keeps_no_base_gives_one_state_only(config):
    loaded = source.load(config())
    run = Run(loaded.config, read_inputs(loaded), keep_base=False)
    run.fresh_state()
    with pytest.raises(AssertionError, match="keep_base"):
        run.fresh_state()


def steps_of(run: Run, steps: int = 3) -> list[torch.Tensor]:
    from sdclr.engine.loop import optimizer_steps

    state = run.fresh_state()
    list(optimizer_steps(state, run.batches, run.add_gradients, lambda step: 1e-2 / (1 + step), steps, run.accelerator))
    return [p.detach().clone() for p in state.parameters]


def test_only_the_newest_states_weights_are_updated_in_the_backward_on_whichever_split(config):
    fused = ("optimizer.fused_backward=true", "optimizer.max_grad_norm=null")
    run, plain = build(config(), *fused), build(config(), fused[1])
    wanted, other = steps_of(plain), run.on(run.inputs)
    for asked in (run, other, run):
        assert all(map(torch.equal, steps_of(asked), wanted))


def test_a_unet_that_cannot_be_compiled_is_refused_by_name_and_else_trained_as_it_is(config, monkeypatch):
    def broken(*args, **kwargs):
        def forward(*args, **kwargs):
            raise RuntimeError("no compiler was found\nhere")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    asked = build(config(), "model.compile=on")
    with pytest.raises(
        InputError, match=r"model\.compile: torch\.compile cannot compile the UNet here: no compiler was found$"
    ):
        asked.compile_for()
    run, plain = build(config()), build(config())
    run._compile()
    assert all(map(torch.equal, steps_of(run), steps_of(plain)))


@pytest.mark.parametrize(
    ("settings", "steps", "compiled"),
    [((), 1100, False), ((), 1300, True), (("batch.accumulate=2",), 700, True), (("model.compile=off",), 9999, False)],
)
def test_a_run_is_compiled_where_its_steps_as_they_are_timed_take_twenty_minutes(
    config, monkeypatch, settings, steps, compiled
):
    class OneSecond(Graph):
        def seconds(self, inputs, count, repeats=5):
            return 1.0

    run, asked = build(config(), "batch.size=2", *settings), []
    run.add_gradients = OneSecond(run.add_gradients, [])
    monkeypatch.setattr(run, "_compile", lambda: asked.append(True))
    run.compile_for(steps)
    assert bool(asked) == compiled
    run.compile_for()  # a range test's length is not known beforehand
    assert len(asked) == compiled


def test_a_recordings_inputs_are_copied_by_name_in_whatever_order_they_come():
    graph = Graph(lambda inputs, count: torch.zeros(()), [])
    graph.graph, graph.inputs = types.SimpleNamespace(replay=lambda: None), {"a": torch.zeros(2), "b": torch.zeros(3)}
    graph({"b": torch.ones(3), "a": torch.full((2,), 2.0)}, 1)
    assert graph.inputs["a"].tolist() == [2, 2]
    assert graph.inputs["b"].tolist() == [1, 1, 1]
