"""The update inside the backward is the optimizer's own, and eight bits a number are enough to learn with."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from nets import EVERY, Net, batches, groups_of, written_and_read

from sdclr.config.schema import OptimizerSection
from sdclr.engine import fit, optimizers
from sdclr.engine.checkpoint import pack_optimizer, unpack_optimizer
from sdclr.engine.loop import TrainState, gradients_of, optimizer_steps
from sdclr.engine.optimizers import InBackward
from sdclr.errors import DivergenceError, InputError


def trained(name: str, fused: bool, steps: int = 12, net: Net | None = None, state: TrainState | None = None):
    net = net or Net()
    if state is None:
        optimizer = optimizers.new(OptimizerSection(name=name), groups_of(net))
        state = TrainState({"net": net}, optimizer, in_backward=InBackward(optimizer) if fused else None)
    accelerator = Accelerator(cpu=True)
    done = list(optimizer_steps(state, batches, gradients_of(net.loss, accelerator), lambda step: 1e-2 / (1 + step / 10), steps, accelerator))  # fmt: skip
    return net, state, done


@pytest.mark.parametrize("name", EVERY)
def test_an_update_inside_the_backward_leaves_the_bits_of_one_after_it(name):
    plain, plainly, one = trained(name, fused=False)
    fused, fusedly, other = trained(name, fused=True)
    assert all(map(torch.equal, plain.state_dict().values(), fused.state_dict().values()))
    assert [r.grad_norm for r in one] == pytest.approx([r.grad_norm for r in other], rel=1e-5)
    for ours, theirs in zip(pack_optimizer(fusedly.optimizer), pack_optimizer(plainly.optimizer), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in ours)


def test_no_two_gradients_lie_there_together():
    net = Net()
    optimizer = optimizers.new(OptimizerSection(name="sgd"), groups_of(net))
    inside = InBackward(optimizer)
    most = 0

    def count(*_):
        nonlocal most
        most = max(most, sum(p.grad is not None for p in net.parameters()))

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    net.loss(batches(0)[0]).backward()
    assert most <= 1
    assert all(p.grad is None for p in net.parameters())
    inside.end()
    net.loss(batches(0)[0]).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_a_state_that_was_written_and_read_goes_on_with_the_same_bits(name, fused, tmp_path):
    whole, _, _ = trained(name, fused, steps=9)
    net, state, _ = trained(name, fused, steps=5)
    tensors, numbers = written_and_read(state.optimizer, tmp_path)
    again = Net()
    again.load_state_dict(net.state_dict())
    optimizer = optimizers.new(OptimizerSection(name=name), groups_of(again))
    resumed = TrainState({"net": again}, optimizer, step=5, in_backward=InBackward(optimizer) if fused else None)
    unpack_optimizer(optimizer, tensors, numbers)  # as train does: when all is there
    trained(name, fused, steps=9, net=again, state=resumed)
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))


def test_eight_bits_learn_what_thirty_two_do():
    def after(name: str, steps: int) -> float:
        net = trained(name, False, steps)[0]
        return float(sum(net.loss(batches(1000 + i)[0]) for i in range(20)) / 20)

    start, whole, short = after("adamw", 0), after("adamw", 300), after("adamw8bit", 300)
    assert whole < 0.8 * start
    assert short - whole < 0.05 * (start - whole)


def test_a_gradient_that_is_not_finite_is_named_with_what_it_has_done():
    net = Net()
    optimizer = optimizers.new(OptimizerSection(name="sgd"), groups_of(net))
    state = TrainState({"net": net}, optimizer, in_backward=InBackward(optimizer))
    net.narrow.weight.register_hook(lambda grad: grad * math.nan)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(
        DivergenceError, match=r"gradient norm of step 1 is nan .*fused_backward has put it into the weights"
    ):
        next(optimizer_steps(state, batches, gradients_of(net.loss, accelerator), lambda step: 1e-2, 5, accelerator))


def test_what_cannot_run_is_refused_with_the_way_out(monkeypatch):
    with pytest.raises(InputError, match="several must add up"):
        optimizers.refuse_what_cannot_run(OptimizerSection(fused_backward=True, max_grad_norm=None), "no", 2)
    with pytest.raises(InputError, match="fp16"):
        optimizers.refuse_what_cannot_run(OptimizerSection(fused_backward=True, max_grad_norm=None), "fp16", 1)
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="bitsandbytes, which is not installed"):
        optimizers.refuse_what_cannot_run(OptimizerSection(name="adamw8bit"), "no", 1)
    optimizers.refuse_what_cannot_run(OptimizerSection(), "fp16", 2)


def test_a_full_gpu_is_a_message_and_not_a_traceback():
    told = fit.out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"))
    assert told is not None
    assert told.exit_code == 1
    assert "Tried to" not in told.message
    assert fit.out_of_memory(RuntimeError("CUDA out of memory")) is None
