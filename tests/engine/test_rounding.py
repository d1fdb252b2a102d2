"""Weights in bf16: rounded without bias to a neighbour, updated by the optimizer's own arithmetic in fp32, and resumed to the same bits."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from nets import EVERY, Net, batches, groups_of, written_and_read
from safetensors.torch import load_file

from sdclr.commands.train import train
from sdclr.config import source
from sdclr.config.schema import OptimizerSection
from sdclr.engine import optimizers, rounding
from sdclr.engine.checkpoint import FULL, pack_optimizer, restore, save, snapshot, unpack_optimizer
from sdclr.engine.loop import TrainState, gradients_of, optimizer_steps
from sdclr.engine.optimizers import InBackward
from sdclr.engine.plan import read_inputs
from sdclr.engine.processes import Processes
from sdclr.engine.rounding import Rounded, rounded
from sdclr.engine.run import Run
from sdclr.errors import InputError

EDGES = [0.0, -0.0, 1.0, -3.5, 2.0**-126, -(2.0**-133), 255 * 2.0**120, math.inf, -math.inf]


def neighbours(value: float) -> set[float]:
    """The bf16 numbers on both sides of a float, found with torch's own rounding."""
    nearest = torch.tensor(value).bfloat16()
    away = torch.tensor(math.inf if float(nearest) < value else -math.inf, dtype=torch.bfloat16)
    return {float(nearest), value if float(nearest) == value else float(torch.nextafter(nearest, away))}


@pytest.mark.parametrize("value", [1.001, -0.0123456, 7e-39, -2.99e38, 0.3333333])
def test_a_number_becomes_one_of_its_neighbours_so_that_the_mean_is_kept(value):
    many = 200_000
    exact = torch.full((many,), value)
    found = rounded(exact, torch.Generator().manual_seed(0))
    below, above = sorted(neighbours(float(exact[0])))
    assert set(found.tolist()) == {below, above}
    share = (float(exact[0].double()) - below) / (above - below)
    up = float((found == above).double().mean())
    assert abs(up - share) < 5 * math.sqrt(share * (1 - share) / many) + 1e-9


def test_what_bf16_can_hold_is_left_alone():
    exact = torch.cat([torch.tensor(EDGES), torch.randn(1000).bfloat16().float()])
    assert torch.equal(rounded(exact, None), exact)
    assert torch.equal(torch.signbit(rounded(exact, None)), torch.signbit(exact))
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32)  # the second as a GPU writes it
    assert rounded(torch.cat([bits.view(torch.float32), torch.tensor([math.nan])]), None).isnan().all()


def test_updates_too_small_for_bf16_add_up():
    lr, steps = 1e-5, 500
    weights = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = Rounded(lambda groups: torch.optim.SGD(groups, lr=lr), [{"params": [weights]}], seed=1)
    for step in range(steps):
        weights.grad = torch.ones_like(weights)
        optimizer.begin(step)
        optimizer.step()
    assert float((torch.ones(1, dtype=torch.bfloat16) - lr).float()) == 1  # each of them alone is lost
    # In a step a weight goes down by 2⁻⁸ with a chance of lr·2⁸: mean and spread of so many coins.
    spread = 2**-8 * math.sqrt(steps * lr * 2**8) / math.sqrt(4000)
    assert abs(float(weights.detach().float().mean()) - (1 - lr * steps)) < 5 * spread


def trained(name: str, fused: bool, steps: int = 9, net: Net | None = None, state: TrainState | None = None, seed: int = 7):  # fmt: skip
    """As test_optimizers does it, in bf16."""
    net = net or Net().bfloat16()
    state = state or state_of(net, name, fused, seed)
    accelerator = Accelerator(cpu=True)
    done = list(optimizer_steps(state, in_bf16, gradients_of(net.loss, accelerator), lambda step: 1e-2 / (1 + step / 10), steps, accelerator))  # fmt: skip
    return net, state, done


def state_of(net: Net, name: str, fused: bool, seed: int = 7) -> TrainState:
    optimizer = Rounded(functools.partial(optimizers.new, OptimizerSection(name=name)), groups_of(net), seed)
    return TrainState({"net": net}, optimizer, in_backward=InBackward(optimizer) if fused else None)


def in_bf16(step: int) -> list[torch.Tensor]:
    return [batch.bfloat16() for batch in batches(step)]


@pytest.mark.parametrize("name", EVERY)
def test_an_update_is_the_optimizers_own_on_fp32_copies_and_then_rounded(name):
    net, copies = Net().bfloat16(), Net().bfloat16().float()
    ours = Rounded(functools.partial(optimizers.new, OptimizerSection(name=name)), groups_of(net), seed=3)
    theirs = optimizers.new(OptimizerSection(name=name), groups_of(copies))
    for step in range(3):
        net.loss(in_bf16(step)[0]).backward()
        with torch.no_grad():
            for own, copy in zip(net.parameters(), copies.parameters(), strict=True):
                copy.copy_(own)
                copy.grad = own.grad.float()
        theirs.step()
        ours.begin(step)
        ours.step()
        places = {id(copy): own for own, copy in zip(net.parameters(), copies.parameters(), strict=True)}
        for number, copy in enumerate(copy for group in theirs.param_groups for copy in group["params"]):
            draws = torch.Generator().manual_seed(rounding.derive(3, "rounding", step, number))
            assert torch.equal(places[id(copy)].float(), rounded(copy.detach(), draws))
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in net.parameters())
    mine, torchs = pack_optimizer(ours), pack_optimizer(theirs)
    assert mine[1] == torchs[1]
    assert all(torch.equal(mine[0][key], value) for key, value in torchs[0].items())


@pytest.mark.parametrize("name", EVERY)
def test_some_at_a_time_leave_the_bits_of_all_at_once(name, monkeypatch):
    whole = trained(name, False)[0]
    monkeypatch.setattr(rounding, "TOGETHER", 100)
    parts = trained(name, False)[0]
    assert all(map(torch.equal, parts.state_dict().values(), whole.state_dict().values()))
    other = trained(name, False, seed=8)[0]
    assert not all(map(torch.equal, other.state_dict().values(), whole.state_dict().values()))


def test_those_updated_together_are_as_many_as_fit(monkeypatch):
    monkeypatch.setattr(rounding, "TOGETHER", 10)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (4, 6, 1, 25, 3, 3)]
    found = [[p.numel() for p in some] for some in rounding.together(parameters)]
    assert found == [[4, 6], [1], [25], [3, 3]]
    assert list(rounding.together([])) == []


@pytest.mark.parametrize("name", EVERY)
def test_an_update_inside_the_backward_leaves_the_bits_of_one_after_it(name):
    plain, _, one = trained(name, False)
    fused, _, other = trained(name, True)
    assert all(map(torch.equal, plain.state_dict().values(), fused.state_dict().values()))
    assert [r.grad_norm for r in one] == pytest.approx([r.grad_norm for r in other], rel=1e-5)


def test_the_models_parameters_stay_the_ones_that_others_have_hooked_on(monkeypatch):
    """As the exchange between processes does, on what adds up a parameter's gradient."""
    net, heard = Net().bfloat16(), []
    adders = [p.view_as(p).grad_fn.next_functions[0][0] for p in net.parameters()]
    for adder in adders:
        adder.register_hook(lambda *_: heard.append(True))
    trained("adamw", False, steps=3, net=net)
    assert len(heard) == 3 * len(adders)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_a_state_that_was_written_and_read_goes_on_with_the_same_bits(name, fused, tmp_path):
    whole, _, _ = trained(name, fused, steps=9)
    net, state, _ = trained(name, fused, steps=5)
    tensors, numbers = written_and_read(state.optimizer, tmp_path)
    assert not any(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    again = Net().bfloat16()
    again.load_state_dict(net.state_dict())
    resumed = state_of(again, name, fused)
    resumed.step = 5
    unpack_optimizer(resumed.optimizer, tensors, numbers)
    trained(name, fused, steps=9, net=again, state=resumed)
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))


def test_the_norm_that_is_told_is_summed_up_in_fp32():
    net = Net().bfloat16()
    (result,) = trained("sgd", False, steps=1, net=net)[2]
    again = Net().bfloat16()
    again.loss(in_bf16(0)[0]).backward()
    exact = sum(float(p.grad.double().square().sum()) for p in again.parameters()) ** 0.5
    assert result.grad_norm == pytest.approx(exact, rel=1e-6)


def test_different_cards_in_one_run_are_refused(monkeypatch):
    class Two(Processes):
        def agree(self, value: int) -> int:
            return max(value, other if value == own else -other)

    own, other = (rounding.derive(0, name) for name in ("a card", "another card"))
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    with pytest.raises(InputError, match="the same GPU in all processes"):
        rounding.refuse_mixed_cards(gpu, Two(0, 2))
    other = own
    rounding.refuse_mixed_cards(gpu, Two(0, 2))
    rounding.refuse_mixed_cards(gpu, Two(0, 1))


@pytest.fixture
def bf16(config):
    """Builds runs with full_bf16; accelerate has one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def build(*overrides: str) -> Run:
        loaded = source.load(config(), ["model.precision=full_bf16", *overrides])
        return Run(loaded.config, read_inputs(loaded))

    yield build
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(mixed_precision="no")


def go_on(run: Run, state: TrainState, until: int) -> list[torch.Tensor]:
    list(optimizer_steps(state, run.batches, run.add_gradients, lambda step: 1e-3, until, run.accelerator, 1.0))
    return [p.detach().clone() for p in state.parameters]


@pytest.mark.parametrize("settings", [(), ("model.train=[unet, text_encoder]",), ("model.gradient_checkpointing=true",)], ids=" ".join)  # fmt: skip
def test_a_run_in_full_bf16_trains_and_is_resumed_to_the_same_bits(bf16, tmp_path, settings):
    run = bf16(*settings)
    base = go_on(run, run.fresh_state(), 0)
    whole = go_on(run, run.fresh_state(), 6)
    state = run.fresh_state()
    go_on(run, state, 4)
    kept = save(tmp_path, FULL, snapshot(state, run.modules), run.modules, {"kappa": None})
    other = run.fresh_state()
    restore(kept, other, run.modules)
    assert all(map(torch.equal, go_on(run, other, 6), whole))
    assert all(tensor.dtype == torch.bfloat16 for tensor in whole)
    assert not any(map(torch.equal, whole, base))


def test_what_it_leaves_is_drawn_by_diffusers_pipeline(bf16, config):
    settings = ["model.precision=full_bf16", "model.train=[unet, text_encoder]", "checkpoint.average=true"]
    train(config(), settings)
    run = config().parent / "runs" / "tiny"
    drawn = StableDiffusionPipeline.from_pretrained(run / "final")
    assert drawn.unet.dtype == drawn.text_encoder.dtype == torch.float32
    drawn("disc", num_inference_steps=1, height=32, width=32)
    (average,) = (run / "checkpoints").glob("average-*")
    for checkpoint in (average, *(run / "checkpoints").glob("trough-*")):
        assert {t.dtype for t in load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors").values()} == {torch.bfloat16}  # fmt: skip


def test_no_cast_copy_of_a_weight_is_kept_for_a_second_use(bf16):
    run = bf16("model.precision=bf16")
    seen = []
    run.parts.unet.conv_in.register_forward_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    go_on(run, run.fresh_state(), 1)
    assert seen == [False]
