"""SIGKILL, SIGINT and SIGTERM at any moment: the resumed run is, bit for bit, the one that was never stopped."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import thinned
from inject import Disk, Lab, Tally, count_calls, differences, every_fault, in_child, kill_after_calls, picks

KEEP_MORE = ("checkpoint.keep_last=3",)


@pytest.fixture(scope="module")
def reference(lab: Lab) -> dict[str, str]:
    """What the run leaves when nobody disturbs it."""
    lab.reset()
    outcome = lab.train()
    assert outcome.kind == "done", outcome.text
    return lab.print_of()


def recovered(lab: Lab, reference: dict[str, str], *overrides: str) -> tuple[str, str]:
    """Go on after a crash; what went wrong with going on, and what differs from the undisturbed run."""
    outcome = lab.recover(*overrides)
    other = differences(lab.print_of(), reference)
    return ("" if outcome.kind == "done" else f"{outcome.kind}: {outcome.text}"), f"differs: {other}" if other else ""


@thinned(24)
def test_a_kill_at_every_file_operation_of_a_run(lab: Lab, reference, share: int) -> None:
    lab.reset()
    ops = lab.train(disk=Disk(lab.runs)).ops
    tally = Tally("kills: every file operation of a run", share)
    for number, half in every_fault(ops, share, first=share // 2):
        lab.reset()
        killed = lab.train(disk=Disk(lab.runs, number, half=half))
        name, path = ops[number - 1]
        alive = "" if killed.kind == "killed" else f"was not killed but {killed.kind} {killed.text}"
        tally.add(f"{number}{' half' if half else ''} {name} {path}", alive, *recovered(lab, reference), kind=name)
    tally.report()


@thinned(24)
def test_a_kill_at_every_file_operation_of_a_resume(lab: Lab, share: int) -> None:
    """From the worst folder there is: the newest checkpoint damaged, its best too, an earlier one to fall back to, leftovers of a
    broken save and a broken prune, metrics that run ahead, a trough that was never written."""
    lab.reset()
    assert lab.train(*KEEP_MORE).kind == "done"
    reference = lab.print_of()
    lab.reset()
    lab.train(*KEEP_MORE, disk=Disk(lab.runs, _operation(lab, "replace", "step-000003")))
    checkpoints = lab.folder / "checkpoints"
    shutil.copytree(checkpoints / "step-000002", checkpoints / ".step-000009.pruned")
    shutil.copytree(checkpoints / "step-000002", checkpoints / "step-000003")
    (checkpoints / "step-000003/state.json").write_text("{}")
    shutil.rmtree(next(checkpoints.glob("trough-000002*")))
    before = lab.keep("worst")
    lab.reset(before)
    ops = lab.train(*KEEP_MORE, resume=True, disk=Disk(lab.runs)).ops
    tally = Tally("kills: every file operation of a resume", share)
    tally.add("undisturbed", f"{differences(lab.print_of(), reference) or ''}".strip("[]"))
    for number, half in every_fault(ops, share, first=share // 3):
        lab.reset(before)
        killed = lab.train(*KEEP_MORE, resume=True, disk=Disk(lab.runs, number, half=half))
        name, path = ops[number - 1]
        alive = "" if killed.kind == "killed" else f"was not killed but {killed.kind} {killed.text}"
        tally.add(
            f"{number}{' half' if half else ''} {name} {path}", alive, *recovered(lab, reference, *KEEP_MORE), kind=name
        )
    tally.report()


@functools.cache
def _operations(lab: Lab) -> list[tuple[str, str]]:
    lab.reset()
    return lab.train(*KEEP_MORE, disk=Disk(lab.runs)).ops


def _operation(lab: Lab, name: str, path: str) -> int:
    """The number of the first operation of that name on such a path."""
    ops = list(_operations(lab))
    lab.reset()
    return next(number for number, (n, p) in enumerate(ops, 1) if n == name and path in p)


@thinned(20)
def test_a_kill_at_any_moment_of_training(lab: Lab, reference, share: int) -> None:
    """At calls of Python functions drawn from a seed: between any two lines of the loop, the losses, the saves."""
    from sdclr.commands.train import train

    lab.reset()
    calls = in_child(lambda: count_calls(lambda: train(lab.config))).value
    tally = Tally("kills: any moment of training", share)
    for moment in picks(1, 160, calls)[::share]:
        lab.reset()
        killed = lab.train(before=lambda: kill_after_calls(moment))  # noqa: B023 (called before the next turn)
        tally.add(
            f"call {moment} of {calls}",
            killed.text if killed.kind == "traceback" else "",
            *recovered(lab, reference),
            kind=killed.kind,
        )
    tally.report()


@thinned(20)
def test_a_kill_at_any_moment_of_a_range_test(lab: Lab, share: int) -> None:
    """Run again, it goes on from its finished arms and comes to the same result."""
    from sdclr.commands.range_test import range_test
    from sdclr.errors import Inconclusive

    def undisturbed() -> int:
        def work() -> None:
            try:
                range_test(lab.config)
            except Inconclusive:
                pass

        return count_calls(work)

    lab.reset()
    counted = in_child(undisturbed)
    assert counted.kind == "done", counted.text
    reference = _measured(lab.folder)
    tally = Tally("kills: any moment of a range test", share)
    for moment in picks(2, 60, counted.value)[::share]:
        lab.reset()
        killed = lab.range_test(before=lambda: kill_after_calls(moment))  # noqa: B023
        again = lab.range_test()
        ended = "" if again.code in (0, 3) else f"{again.kind}: {again.text}"
        other = differences(_measured(lab.folder), reference)
        tally.add(f"call {moment} of {counted.value}", ended, f"differs: {other}" if other else "", kind=killed.kind)
    tally.report()


def _measured(folder: Path) -> dict[str, str]:
    """What a range test leaves, without the seconds it took."""
    found = {}
    for path in sorted((folder / "range-test").rglob("*.json")):
        content = json.loads(path.read_text())
        content.pop("seal", None)
        if path.name == "result.json":
            content["cost"].pop("seconds")
        found[path.name] = json.dumps(content, sort_keys=True)
    return found


@thinned(6)
def test_a_signal_stops_after_a_step_that_is_saved(lab: Lab, reference, share: int) -> None:
    """SIGINT and SIGTERM at any operation of training: the step is finished and saved, 130 or 143, and resuming ends the same."""
    lab.reset()
    ops = lab.train(disk=Disk(lab.runs)).ops
    first = next(k for k, (name, path) in enumerate(ops, 1) if path.endswith("tiny/metrics.jsonl"))
    last = max(k for k, (name, path) in enumerate(ops, 1) if path.endswith("tiny/metrics.jsonl"))
    tally = Tally("signals: one, at any operation of training", share)
    for turn, number in enumerate(range(first + 2, last, 5)[::share]):
        sent = (signal.SIGINT, signal.SIGTERM)[turn % 2]
        lab.reset()
        stopped = lab.train(disk=_Signals(lab.runs, {number: sent}))
        saved = (
            ""
            if stopped.code == 128 + sent or (stopped.kind == "done" and number > last - 40)
            else f"{stopped.kind} {stopped.code} {stopped.text}"
        )
        tally.add(
            f"{sent.name} at {number} {ops[number - 1]}",
            saved,
            *recovered(lab, reference),
            kind=f"{sent.name} {stopped.code}",
        )
    tally.report()


@thinned(8)
def test_a_second_signal_within_the_save_leaves_the_checkpoint_before(lab: Lab, reference, share: int) -> None:
    lab.reset()
    ops = lab.train(disk=Disk(lab.runs)).ops
    inside = [
        k for k, (name, path) in enumerate(ops, 1) if ".step-000003.partial" in path or ".step-000001.pruned" in path
    ]
    tally = Tally("signals: a second one, at each operation of a save", share)
    for turn, number in enumerate(inside[::share]):
        sent = (signal.SIGINT, signal.SIGTERM)[turn % 2]
        lab.reset()
        stopped = lab.train(disk=_Signals(lab.runs, {number - 1: sent, number: sent}))
        left = [p.name for p in (lab.folder / "checkpoints").glob(".*.partial")]
        tally.add(
            f"{sent.name} twice at {number} {ops[number - 1]}",
            "" if stopped.code == 130 else f"{stopped.kind} {stopped.code} {stopped.text}",
            f"left {left}" if left else "",
            *recovered(lab, reference),
            kind=sent.name,
        )
    tally.report()


class _Signals(Disk):
    """Sends this process a signal before given operations, and breaks nothing."""

    def __init__(self, root: Path, at: dict[int, signal.Signals]):
        super().__init__(root)
        self.signals = at

    def touch(self, name, path, write_half=None) -> None:
        before = len(self.log)
        super().touch(name, path)
        if len(self.log) > before and len(self.log) in self.signals:
            os.kill(os.getpid(), self.signals[len(self.log)])


def test_two_processes_in_one_folder(lab: Lab, reference) -> None:
    """The second is told who holds it and exits with 2; a holder that was killed holds nothing."""
    from sdclr.engine.folder import RunFolder

    lab.reset()
    holder = os.fork()
    if holder == 0:
        try:
            with RunFolder(lab.folder).locked("train"):
                time.sleep(60)
        finally:
            os._exit(0)
    while not (lab.folder / ".lock").is_file() or not (lab.folder / ".lock").read_text():
        time.sleep(0.01)
    refused = [lab.train(), lab.train(resume=True), lab.range_test()]
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    for outcome in refused:
        assert outcome.code == 2 and f"process {holder}" in outcome.text, outcome
    assert lab.train().kind == "done"
    assert not differences(lab.print_of(), reference)


def test_the_clock_may_jump(lab: Lab, reference) -> None:
    """A clock that leaps years forward and back changes nothing that is written."""

    def leap() -> None:
        real, turn = time.time, [0]

        def jumping() -> float:
            turn[0] += 1
            return real() + (1e9 if turn[0] % 2 else -1e9)

        time.time = jumping

    lab.reset()
    assert lab.train(before=leap).kind == "done"
    assert not differences(lab.print_of(), reference)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("what", ["loss", "gradient", "update"])
def test_numbers_that_are_not_finite_are_never_saved(lab: Lab, what: str, step: int) -> None:
    """A loss, a gradient or an update that is not finite ends the run with 1, names the last good checkpoint, and leaves it whole."""
    import torch

    from sdclr.engine.checkpoint import newest_sound
    from sdclr.engine.run import Run

    def spoil() -> None:
        real_loss, calls = Run.loss, [0]

        def loss(self, samples):
            calls[0] += 1
            value = real_loss(self, samples)
            if calls[0] == step and what == "loss":
                return value * float("nan")
            if calls[0] == step and what == "gradient":
                parameter = next(self.modules["unet"].parameters())
                return value + (parameter * 0).sum().sqrt()  # its value is 0 and its derivative is not a number
            return value

        Run.loss = loss
        real_step, steps = torch.optim.AdamW.step, [0]

        def update(self, *args, **kwargs):
            real_step(self, *args, **kwargs)
            steps[0] += 1
            if steps[0] == step and what == "update":
                self.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")

        torch.optim.AdamW.step = update

    lab.reset()
    outcome = lab.train("validation.every=100", "checkpoint.best=false", before=spoil)
    assert outcome.kind == "error" and outcome.code == 1, outcome
    kept, skipped = newest_sound(lab.folder / "checkpoints")
    assert not skipped
    assert (kept.step if kept else 0) == step - 1
    assert (str(kept.path) if kept else "no checkpoint") in outcome.text
