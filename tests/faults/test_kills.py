"""SIGKILL, SIGINT and SIGTERM at any moment: the resumed run is, bit for bit, the one that was never stopped."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from inject import Disk, Lab, Tally, count_calls, differences, in_child, picks, thinned

KEEP_MORE = ("checkpoint.keep_last=3",)


@pytest.fixture(scope="module")
def reference(lab: Lab) -> dict[str, str]:
    """What the run leaves when nobody disturbs it."""
    lab.reset()
    outcome = lab.train()
    assert outcome.kind == "done", outcome.text
    return lab.print_of()


@pytest.fixture(scope="module")
def operations(lab: Lab) -> list[tuple[str, str]]:
    """Every file operation of the undisturbed run, in order."""
    lab.reset()
    return lab.train(disk=Disk(lab.runs)).ops


def recovered(lab: Lab, reference: dict[str, str], *overrides: str) -> tuple[str, str]:
    """Go on after a crash; what went wrong with going on, and what differs from the undisturbed run."""
    outcome = lab.recover(*overrides)
    other = differences(lab.print_of(), reference)
    return ("" if outcome.kind == "done" else f"{outcome.kind}: {outcome.text}"), f"differs: {other}" if other else ""


def tell(tally: Tally, deaths: list, go_on: Callable[[Path | None], tuple[str, ...]]) -> None:
    """Go on from the folder that each death left; folders that are the same to the byte are gone on from once."""
    known: dict[Path | None, tuple[str, ...]] = {}
    for what, kind, state in deaths:
        if state not in known:
            known[state] = go_on(state)
        tally.add(what, *known[state], kind=kind)
    tally.kinds["different folders left"] = len(known)
    tally.report()


@thinned(90)
def test_a_kill_at_every_file_operation_of_a_run(lab: Lab, reference, share: int) -> None:
    def go_on(state: Path | None) -> tuple[str, ...]:
        lab.reset(state)
        return recovered(lab, reference)

    tell(Tally("kills: every file operation of a run", share), lab.deaths(None, lab.train, share), go_on)


@thinned(110)
def test_a_kill_at_every_file_operation_of_a_resume(lab: Lab, share: int) -> None:
    """From the worst folder there is: the newest checkpoint damaged, earlier ones to fall back to, leftovers of a broken save and of
    a broken prune, metrics that run ahead, a trough that was never written."""
    lab.reset()
    assert lab.train(*KEEP_MORE).kind == "done"
    reference = lab.print_of()
    checkpoints = lab.folder / "checkpoints"
    shutil.copytree(checkpoints / "step-000002", checkpoints / ".step-000009.pruned")
    shutil.copytree(checkpoints / "step-000002/unet", checkpoints / ".step-000009.partial")
    (checkpoints / "step-000004/state.json").write_text("{}")
    (checkpoints / "step-000003/optimizer.safetensors").unlink()
    shutil.rmtree(next(checkpoints.glob("trough-000002*")))
    shutil.rmtree(lab.folder / "final")
    before = lab.keep("worst")

    def go_on(state: Path | None) -> tuple[str, ...]:
        lab.reset(state)
        return recovered(lab, reference, *KEEP_MORE)

    resume = functools.partial(lab.train, *KEEP_MORE, resume=True)
    tell(Tally("kills: every file operation of a resume", share), lab.deaths(before, resume, share), go_on)


@pytest.mark.faults
def test_a_kill_at_any_moment_of_training(lab: Lab, reference) -> None:
    """At calls of Python functions drawn from a seed: between any two lines of the loop, the losses, the saves."""
    from sdclr.commands.train import train

    def go_on(state: Path | None) -> tuple[str, ...]:
        lab.reset(state)
        return recovered(lab, reference)

    def counted() -> int:
        stop = count_calls()
        train(lab.config)
        return stop()

    lab.reset()
    calls = in_child(counted).value
    deaths = lab.deaths(None, lab.train, calls=picks(1, 400, calls))
    tell(Tally("kills: any moment of training", 1), deaths, go_on)


@pytest.mark.faults
def test_a_kill_at_any_moment_of_a_range_test(lab: Lab) -> None:
    """Run again, it goes on from its finished arms and comes to the same result."""
    from sdclr.commands.range_test import range_test
    from sdclr.errors import Inconclusive

    def counted() -> int:
        stop = count_calls()
        with contextlib.suppress(Inconclusive):
            range_test(lab.config)
        return stop()

    lab.reset()
    calls = in_child(counted)
    assert calls.kind == "done", calls.text
    reference = _measured(lab.folder)

    def go_on(state: Path | None) -> tuple[str, ...]:
        lab.reset(state)
        again = lab.range_test()
        other = differences(_measured(lab.folder), reference)
        return ("" if again.code in (0, 3) else f"{again.kind}: {again.text}"), f"differs: {other}" if other else ""

    deaths = lab.deaths(None, lab.range_test, calls=picks(2, 200, calls.value))
    tell(Tally("kills: any moment of a range test", 1), deaths, go_on)


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


@thinned(40)
def test_a_signal_stops_after_a_step_that_is_saved(lab: Lab, reference, operations, share: int) -> None:
    """SIGINT and SIGTERM at any operation of training: the step is finished and saved, 130 or 143, and resuming ends the same."""
    ops = operations
    first = next(k for k, (name, path) in enumerate(ops, 1) if path.endswith("tiny/metrics.jsonl"))
    last = max(k for k, (name, path) in enumerate(ops, 1) if path.endswith("tiny/metrics.jsonl"))
    closing = next(k for k, (name, path) in enumerate(ops, 1) if ".step-000003.partial" in path)
    tally = Tally("signals: one, at any operation of training", share)
    for turn, number in enumerate(range(first + 2, last, 5)[::share]):
        sent = (signal.SIGINT, signal.SIGTERM)[turn % 2]
        lab.reset()
        stopped = lab.train(disk=_Signals(lab.runs, {number: sent}))
        saved = (
            ""
            if stopped.code == 128 + sent
            or (stopped.kind == "done" and number >= closing)  # the step it finishes is the last
            else f"{stopped.kind} {stopped.code} {stopped.text}"
        )
        tally.add(
            f"{sent.name} at {number} {ops[number - 1]}",
            saved,
            *recovered(lab, reference),
            kind=f"{sent.name} {stopped.code}",
        )
    tally.report()


@thinned(40, 2)
def test_a_second_signal_within_the_save_leaves_the_checkpoint_before(
    lab: Lab, reference, operations, share: int
) -> None:
    ops = operations
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

    def touch(self, name, path, write_half=None, handle=None) -> None:
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


@pytest.mark.parametrize("step", [1, 3])
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
