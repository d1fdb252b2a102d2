"""On an NVIDIA GPU: the recorded step is the step, at any precision training is training, and a recording that fails costs speed alone.

pytest -m gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageOps

from sdclr.config import source
from sdclr.engine.graph import Graph
from sdclr.engine.loop import optimizer_steps
from sdclr.engine.painter import of_run
from sdclr.engine.plan import read_inputs
from sdclr.engine.run import Run
from sdclr.errors import DivergenceError, InputError
from sdclr.model import adapters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Kernels that give the same bits each time, and an accelerator for every test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before
    AcceleratorState._reset_state(reset_partial_state=True)


def build(path: Path, *overrides: str) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    loaded = source.load(path, overrides)
    return Run(loaded.config, read_inputs(loaded))


def train(run: Run, steps: int = 6, lr: float = 1e-3) -> list[torch.Tensor]:
    """The trained weights after some steps from the untouched ones."""
    state = run.fresh_state()
    norm = run.config.optimizer.max_grad_norm
    for _ in optimizer_steps(state, run.batches, run.add_gradients, lambda step: lr, steps, run.accelerator, norm):
        pass
    return [p.detach().clone() for p in state.parameters]


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor], base: list[torch.Tensor]) -> float:
    """How far two trainings ended from one another, as a share of how far they went."""
    difference = sum(float((a - b).double().square().sum()) for a, b in zip(ours, theirs, strict=True))
    way = sum(float((b - c).double().square().sum()) for b, c in zip(theirs, base, strict=True))
    return (difference / way) ** 0.5


SETTINGS = [
    (),
    ("batch.size=2", "batch.accumulate=2"),
    ("model.train=[unet, text_encoder]",),
    ("model.gradient_checkpointing=true",),
    ("loss.min_snr_gamma=5", "loss.noise_offset=0.1"),
    ("optimizer.name=adafactor",),
    ("model.precision=full_bf16",),
    ("lora.rank=4",),
    (f"prior.images={ROOT / 'data' / 'mochi'}", "prior.weight=0.5"),
    ("model.train=[unet, text_encoder]", "model.gradient_checkpointing=true", "model.precision=fp32"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_a_recorded_step_trains_as_one_whose_kernels_are_started_one_by_one(config, settings):
    recorded, plain = build(config(), *settings), build(config(), *settings, "model.compile=off")
    assert isinstance(recorded.add_gradients, Graph)
    assert not isinstance(plain.add_gradients, Graph)
    base = [p.detach().clone() for m in plain.modules.values() for p in adapters.trained(m)]
    ours, theirs = train(recorded), train(plain)
    assert recorded.add_gradients.graph is not None
    print(settings, "the same bits:", all(map(torch.equal, ours, theirs)), apart(ours, theirs, base))
    assert apart(ours, theirs, base) < 1e-3


def test_a_recorded_step_weighs_what_masks_say(config, pictures, tmp_path):
    (tmp_path / "masks").mkdir()
    for number, path in enumerate(sorted(pictures.glob("*.png"))):
        mask = Image.new("L", Image.open(path).size)
        mask.paste(255, (0, 0, 4 * (number % 8 + 1), mask.height))
        mask.save(tmp_path / "masks" / path.name)
    settings = (f"mask.images={tmp_path / 'masks'}", "mask.outside=0.1")
    test_a_recorded_step_trains_as_one_whose_kernels_are_started_one_by_one(config, settings)


def test_pictures_of_many_shapes_train_as_one_by_one(config, pictures, tmp_path):
    """A bucketed step is never recorded; it is the mean over its pictures, as it is where each is a micro-batch of its own."""
    for number, path in enumerate(sorted(pictures.glob("*.png"))):
        shape = [(32, 32), (64, 32), (32, 64)][number % 3]
        ImageOps.fit(Image.open(path), shape).save(tmp_path / path.name)
        (tmp_path / path.with_suffix(".txt").name).write_text(path.with_suffix(".txt").read_text())
    settings = (f"data.images={tmp_path}", "data.aspect=buckets", "model.precision=fp32", "optimizer.name=sgd")
    batched = build(config(), *settings, "batch.size=4")
    singly = build(config(), *settings, "batch.size=1", "batch.accumulate=4")
    assert not isinstance(batched.add_gradients, Graph)
    assert len({mean.shape for mean in batched.train.mean}) == 3
    base = [p.detach().clone() for p in batched.modules["unet"].parameters()]
    assert apart(train(batched), train(singly), base) < 1e-2


@pytest.mark.skipif(find_spec("xformers") is None, reason="xformers is not installed")
@pytest.mark.parametrize("compiling", ["auto", "off"])
def test_xformers_attention_trains_as_torchs(config, compiling):
    settings = ("model.precision=bf16", f"model.compile={compiling}")
    try:
        theirs = build(config(), *settings, "model.attention=xformers")
    except InputError as error:  # a build for another torch, of which a user is told just that
        pytest.skip(str(error))
    torchs = build(config(), *settings)
    base = [p.detach().clone() for p in torchs.modules["unet"].parameters()]
    difference = apart(train(theirs), train(torchs), base)
    print("xformers apart", compiling, difference)
    assert difference < 0.1  # bf16 rounds elsewhere; AdamW's first steps make much of little


def test_sdxls_step_is_recorded_and_serves_another_split(tmp_path, xl, pictures):
    from tiny import write_config

    path = write_config(tmp_path / "run.yaml", xl, pictures, tmp_path / "runs")
    recorded, plain = build(path), build(path, "model.compile=off")
    base = [p.detach().clone() for p in plain.modules["unet"].parameters()]
    split = recorded.inputs.split
    moved = replace(split, train=split.validation + split.train[2:], validation=split.train[:2])
    others = [run.on(replace(run.inputs, split=moved)) for run in (recorded, plain)]
    assert apart(train(recorded), train(plain), base) < 1e-3
    assert apart(*map(train, others), base) < 1e-3
    assert recorded.add_gradients.graph is not None


def test_one_recording_serves_every_state_and_validation_between_steps(config):
    run = build(config())
    first = train(run)
    assert run.held_out
    losses = run.losses(run.held_out, run.draws(run.held_out))
    second = train(run)
    assert all(map(torch.equal, first, second))
    assert (run.losses(run.held_out, run.draws(run.held_out)) == losses).all()


PROBLEMS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB."),
    RuntimeError("operation not permitted"),
]


def test_drawing_between_steps_leaves_a_recorded_step_as_it_is(config):
    drawing, plain = build(config()), build(config())
    state = drawing.fresh_state()
    for _ in drawing.steps(state, lambda step: 1e-3, 6):
        with of_run(drawing) as painter:
            painter.draw("disc", 1)
    assert drawing.add_gradients.graph is not None
    assert all(map(torch.equal, [p.detach() for p in state.parameters], train(plain)))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_where_a_step_cannot_be_recorded_its_kernels_are_started_one_by_one(config, capsys, problem):
    run, plain = build(config()), build(config(), "model.compile=off")
    real = run.add_gradients.add_gradients

    def full(inputs, count):
        if torch.cuda.is_current_stream_capturing():
            real(inputs, count)
            raise problem
        return real(inputs, count)

    run.add_gradients.add_gradients = full
    base = [p.detach().clone() for p in run.modules["unet"].parameters()]
    assert apart(train(run), train(plain), base) < 1e-3
    assert "started one by one" in "".join(capsys.readouterr())


def test_a_rate_without_measure_diverges_and_the_next_state_starts_afresh(config):
    run = build(config())
    first = train(run)
    with pytest.raises(DivergenceError):
        train(run, 50, lr=1e30)
    assert all(map(torch.equal, train(run), first))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd"])
def test_an_update_inside_the_backward_is_the_update_after_it(config, name):
    settings = (f"optimizer.name={name}", "optimizer.max_grad_norm=null", "model.compile=off")
    plain, fused = build(config(), *settings), build(config(), *settings, "optimizer.fused_backward=true")
    base = [p.detach().clone() for p in plain.modules["unet"].parameters()]
    assert apart(train(fused), train(plain), base) < 1e-3


def test_every_precision_learns_what_fp32_learns():
    found = {}
    for precision in ("fp32", "bf16", "fp16", "full_bf16"):
        run = build(ROOT / "configs" / "demo.yaml", f"model.precision={precision}", "run.output_dir=build/gpu")
        assert run.held_out
        draws = run.draws(run.held_out)
        run.fresh_state()
        before = run.losses(run.held_out, draws).mean()
        train(run, 200, lr=5e-5)
        found[precision] = before, run.losses(run.held_out, draws).mean()
    print(found)
    gain = found["fp32"][0] - found["fp32"][1]
    assert gain > 0
    for before, after in found.values():
        assert abs((before - after) - gain) < 0.05 * gain


@pytest.mark.parametrize(
    "settings", [(), ("optimizer.name=adamw8bit",), (f"prior.images={ROOT / 'data' / 'mochi'}",)], ids=" ".join
)
def test_a_compiled_step_trains_as_a_plain_one(config, settings):
    compiled, plain = build(config(), "model.compile=on", *settings), build(config(), "model.compile=off", *settings)
    compiled.compile_for()
    assert compiled.denoiser is not compiled.modules["unet"]
    base = [p.detach().clone() for p in plain.modules["unet"].parameters()]
    difference = apart(train(compiled), train(plain), base)
    print("compiled apart", difference)
    assert difference < 0.1  # bf16 rounds elsewhere; AdamW's first steps make much of little
