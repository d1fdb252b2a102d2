"""The loop on a line with two parameters: what it does to weights and rates can be computed by hand or by torch itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from accelerate import Accelerator

from sdclr.engine.loop import TrainState, gradients_of, optimizer_steps
from sdclr.errors import DivergenceError

X = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
Y = torch.tensor([[2.0], [3.0], [5.0], [9.0]])


class Line(torch.nn.Module):
    """y = slope·x + offset."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([[0.5]]))
        self.offset = torch.nn.Parameter(torch.tensor([0.25]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.slope + self.offset

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (self(batch[0]) - batch[1]).square().mean()


def whole(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(X, Y)]


def one_by_one(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(X[i : i + 1], Y[i : i + 1]) for i in range(len(X))]


def adamw(line: Line) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [{"params": [line.slope], "lr_scale": 1.0}, {"params": [line.offset], "lr_scale": 0.25}], lr=1e-3
    )


def sgd(line: Line) -> torch.optim.SGD:
    return torch.optim.SGD(line.parameters(), lr=1e-3)


def steps_of(state, batches, loss_fn, lr_at, until, max_grad_norm=None):
    accelerator = Accelerator(cpu=True)
    add_gradients = gradients_of(loss_fn, accelerator)
    return list(optimizer_steps(state, batches, add_gradients, lr_at, until, accelerator, max_grad_norm))


def gradients_at_update(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """Filled with each update's gradients, as the optimizer gets them."""
    seen: list[list[torch.Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda opt, args, kwargs: seen.append([p.grad.clone() for g in opt.param_groups for p in g["params"]])
    )
    return seen


def test_every_update_uses_the_schedules_rate_times_the_groups_scale():
    line = Line()
    optimizer = adamw(line)
    used: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: used.append([g["lr"] for g in opt.param_groups]))
    rates = [0.0, 3e-4, 1e-3, 7e-5]
    results = steps_of(TrainState({"line": line}, optimizer), whole, line.loss, rates.__getitem__, 4)
    assert used == [[rate, rate * 0.25] for rate in rates]
    assert [r.lr for r in results] == rates


def test_a_state_that_has_done_steps_goes_on_with_the_next_steps_rate_and_batch():
    line, asked = Line(), []

    def batches(step: int):
        asked.append(step)
        return whole(step)

    state = TrainState({"line": line}, sgd(line), step=5, exposure=0.5)
    results = steps_of(state, batches, line.loss, lambda step: step / 100, 7)
    assert asked == [5, 6]
    assert [(r.step, r.lr) for r in results] == [(6, 0.05), (7, 0.06)]
    assert results[-1].exposure == state.exposure == pytest.approx(0.5 + 0.05 + 0.06)


def test_steps_are_those_of_torch_alone():
    ours, theirs = Line(), Line()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1.0, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    mine = torch.optim.AdamW(ours.parameters(), lr=1.0, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    rates = [1e-2, 3e-2, 1e-3]
    steps_of(TrainState({"line": ours}, mine), whole, ours.loss, rates.__getitem__, 3)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        theirs.loss((X, Y)).backward()
        optimizer.step()
    assert torch.equal(ours.slope, theirs.slope)
    assert torch.equal(ours.offset, theirs.offset)


def test_one_sgd_step_is_the_one_computed_by_hand():
    # errors 0.75-2, 1.25-3, 1.75-5, 2.25-9 = -1.25 -1.75 -3.25 -6.75; d/dslope = 2·mean(x·e) = -20.75, d/doffset = 2·mean(e) = -6.5
    line = Line()
    state = TrainState({"line": line}, sgd(line))
    (result,) = steps_of(state, whole, line.loss, lambda step: 0.01, 1)
    assert line.slope.item() == pytest.approx(0.5 + 0.2075)
    assert line.offset.item() == pytest.approx(0.25 + 0.065)
    assert result.loss == pytest.approx((1.25**2 + 1.75**2 + 3.25**2 + 6.75**2) / 4)
    assert result.grad_norm == pytest.approx(math.hypot(20.75, 6.5))
    assert (result.step, state.step, state.exposure) == (1, 1, 0.01)


def test_four_micro_batches_of_one_give_the_gradients_and_loss_of_one_batch_of_four():
    found = []
    for batches in (whole, one_by_one):
        line = Line()
        optimizer = sgd(line)
        seen = gradients_at_update(optimizer)
        (result,) = steps_of(TrainState({"line": line}, optimizer), batches, line.loss, lambda step: 0.01, 1)
        found.append((result.loss, [g.flatten().tolist() for g in seen[0]]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_gradients_do_not_leak_from_one_step_into_the_next():
    line = Line()
    optimizer = sgd(line)
    seen = gradients_at_update(optimizer)
    steps_of(TrainState({"line": line}, optimizer), whole, line.loss, lambda step: 0.0, 3)
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][0], seen[2][0])


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0])
def test_clipping_is_torchs_and_the_norm_told_is_the_one_before_it(max_norm):
    line, reference = Line(), Line()
    optimizer = sgd(line)
    seen = gradients_at_update(optimizer)
    (result,) = steps_of(TrainState({"line": line}, optimizer), whole, line.loss, lambda step: 0.01, 1, max_norm)
    reference.loss((X, Y)).backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    assert result.grad_norm == float(norm)
    for ours, theirs in zip(seen[0], reference.parameters(), strict=True):
        assert torch.equal(ours, theirs.grad)


def test_without_clipping_gradients_arrive_untouched():
    line, reference = Line(), Line()
    optimizer = sgd(line)
    seen = gradients_at_update(optimizer)
    steps_of(TrainState({"line": line}, optimizer), whole, line.loss, lambda step: 0.01, 1, None)
    reference.loss((X, Y)).backward()
    assert torch.equal(seen[0][0], reference.slope.grad)
    assert torch.equal(seen[0][1], reference.offset.grad)


def nan_loss(line: Line, batch) -> torch.Tensor:
    return line.loss(batch) * math.nan


def infinite_loss(line: Line, batch) -> torch.Tensor:
    return line.loss(batch) + math.inf


def nan_gradient(line: Line, batch) -> torch.Tensor:
    """A loss of 1 whose gradient is not a number: the root's slope at zero."""
    return 1 + (line.slope * 0).sqrt().sum()


@pytest.mark.parametrize(
    ("broken", "named"), [(nan_loss, "loss"), (infinite_loss, "loss"), (nan_gradient, "gradient norm")]
)
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_divergence_is_raised_before_the_update_and_changes_nothing(broken, named, max_norm):
    line = Line()
    optimizer = adamw(line)
    state = TrainState({"line": line}, optimizer)
    steps_of(state, whole, line.loss, lambda step: 1e-2, 2)
    weights, stored = copy.deepcopy(line.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(DivergenceError, match=rf"the {named} of step 3 is (nan|inf)") as problem:
        steps_of(state, whole, lambda batch: broken(line, batch), lambda step: 1e-2, 3, max_norm)
    assert problem.value.exit_code == 1
    assert "0.01" in problem.value.message
    assert (state.step, state.exposure) == (2, pytest.approx(2e-2))
    assert all(torch.equal(line.state_dict()[k], v) for k, v in weights.items())
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(now[i][k], v) for i, values in stored.items() for k, v in values.items())


def test_divergence_in_one_of_several_micro_batches_is_seen():
    line = Line()
    state = TrainState({"line": line}, sgd(line))
    with pytest.raises(DivergenceError):
        steps_of(
            state, one_by_one, lambda b: line.loss(b) * (math.nan if b[0][0] == 3 else 1), lambda step: 0.01, 1, 1.0
        )
    assert line.slope.item() == 0.5


def test_training_after_a_divergence_is_as_if_it_had_not_happened():
    line, untouched = Line(), Line()
    with pytest.raises(DivergenceError):
        steps_of(
            TrainState({"line": line}, sgd(line)), whole, lambda b: nan_gradient(line, b), lambda step: 0.01, 1, 1.0
        )
    for model in (line, untouched):
        steps_of(TrainState({"line": model}, sgd(model)), whole, model.loss, lambda step: 0.01, 2, 1.0)
    assert torch.equal(line.slope, untouched.slope)
    assert torch.equal(line.offset, untouched.offset)
