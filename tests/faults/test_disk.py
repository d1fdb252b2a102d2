"""A disk that is full, read-only, broken or gone, at any write: the run says so, goes on while it can, and can always be resumed."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from inject import BROKEN, NO_SPACE, QUOTA, READ_ONLY, Disk, Lab, Outcome, Tally, differences, every_fault, thinned


@pytest.fixture(scope="module")
def reference(lab: Lab) -> dict[str, str]:
    lab.reset()
    outcome = lab.train()
    assert outcome.kind == "done", outcome.text
    return lab.print_of()


@pytest.fixture(scope="module")
def operations(lab: Lab) -> list[tuple[str, str]]:
    lab.reset()
    return lab.train(disk=Disk(lab.runs)).ops


def judged(lab: Lab, outcome: Outcome, reference: dict[str, str]) -> tuple[list[str], str]:
    """What is wrong with how a run met its fault: it must end with a word, be resumable, and come to the same end.

    A step that was not kept while the run went on may miss its trough, when that was said; a deletion that fails costs only space.
    """
    wrong = []
    if outcome.kind not in ("done", "error") or outcome.code not in (0, 1, 2):
        wrong.append(f"{outcome.kind} {outcome.code}: {outcome.text}")
    said = "training goes on to the next save" in outcome.said
    kind = "went on" if outcome.kind == "done" else f"stopped with {outcome.code}"
    if outcome.kind != "done":
        outcome = lab.recover()
        said |= "training goes on to the next save" in outcome.said
    if outcome.kind != "done":
        wrong.append(f"not resumable: {outcome.kind} {outcome.text}")
    other = differences(lab.print_of(), reference)
    missed = {name for name in other if name.startswith("checkpoints/trough-") and said}
    spare = {
        name
        for name in other
        if name not in reference and ("/.step-" in name or "/.best-" in name or "/step-000003/" in name)
    }
    if set(other) - missed - spare:
        wrong.append(f"differs: {sorted(set(other) - missed - spare)}")
    return wrong, kind


@thinned(200)
def test_a_full_disk_from_any_write_on(lab: Lab, reference, operations, share: int) -> None:
    """From the k-th operation on nothing more can be written; then there is space again."""
    tally = Tally("disk: full from any write on", share)
    for number, half in every_fault(operations, share, first=share // 2):
        lab.reset()
        outcome = lab.train(disk=Disk(lab.runs, number, NO_SPACE, half, lasting=True))
        wrong, kind = judged(lab, outcome, reference)
        tally.add(f"{number}{' half' if half else ''} {operations[number - 1]}", *wrong, kind=kind)
    tally.report()


@thinned(200)
def test_a_full_disk_for_one_write(lab: Lab, reference, operations, share: int) -> None:
    """The k-th operation alone fails: full, read-only, broken or over quota in turn."""
    tally = Tally("disk: one operation fails", share)
    for turn, (number, half) in enumerate(every_fault(operations, share, first=share // 3)):
        lab.reset()
        code = (NO_SPACE, READ_ONLY, BROKEN, QUOTA)[turn % 4]
        outcome = lab.train(disk=Disk(lab.runs, number, code, half))
        wrong, kind = judged(lab, outcome, reference)
        tally.add(
            f"{os.strerror(code)} at {number}{' half' if half else ''} {operations[number - 1]}", *wrong, kind=kind
        )
    tally.report()


@thinned(300, 4)
def test_a_read_only_disk_while_resuming(lab: Lab, reference, operations, share: int) -> None:
    lab.reset()
    lab.train(
        disk=Disk(lab.runs, next(k for k, (n, p) in enumerate(operations, 1) if n == "replace" and "step-000003" in p))
    )
    before = lab.keep("unfinished")
    ops = lab.train(resume=True, disk=Disk(lab.runs)).ops
    tally = Tally("disk: read-only while resuming", share)
    for number, half in every_fault(ops, share, first=share // 3):
        lab.reset(before)
        outcome = lab.train(resume=True, disk=Disk(lab.runs, number, READ_ONLY, half, lasting=True))
        wrong, kind = judged(lab, outcome, reference)
        tally.add(f"{number}{' half' if half else ''} {ops[number - 1]}", *wrong, kind=kind)
    tally.report()


@thinned(400, 3)
def test_a_folder_that_vanishes(lab: Lab, reference, operations, share: int) -> None:
    """The run's folder is deleted under the run; it is made again, or the run ends with a word and can be started again."""

    class Vanishing(Disk):
        def touch(self, name, path, write_half=None, handle=None) -> None:
            before = len(self.log)
            super().touch(name, path)
            if len(self.log) == self.number and before < self.number:
                subprocess.run(["rm", "-rf", str(lab.folder)], check=True)

    tally = Tally("disk: the folder vanishes", share)
    closed = max(number for number, (_, path) in enumerate(operations, 1) if path == "tiny/metrics.jsonl")
    for number in range(1 + share // 2, len(operations), share):
        lab.reset()
        disk = Vanishing(lab.runs)
        disk.number = number
        outcome = lab.train(disk=disk)
        kind, ended = ("went on" if outcome.kind == "done" else f"stopped with {outcome.code}"), outcome
        if outcome.kind == "error":
            ended = lab.recover()
        lost = [
            name
            for name in differences(lab.print_of(), reference)
            if name.startswith("final/") or (name == "metrics.jsonl" and number <= closed)
        ]
        tally.add(
            f"{number} {operations[number - 1]}",
            "" if outcome.kind in ("done", "error") else outcome.text,
            "" if ended.kind == "done" else f"not recovered: {ended.text}",
            f"lost {lost}" if lost else "",
            kind=kind,
        )
    tally.report()


@pytest.mark.parametrize("lies", [False, True], ids=["asked", "unasked"])
@thinned(60)
def test_a_real_small_disk(lab: Lab, reference, share: int, lies: bool) -> None:
    """A tmpfs of every size from too small on, then enlarged. `unasked`: the free space is reported too high, as quotas do."""
    if os.geteuid() or subprocess.run(["mountpoint", "-q", "/"]).returncode not in (0, 32):
        pytest.skip("needs the right to mount")
    tally = Tally(f"disk: a real small one, {'free space unknown' if lies else 'free space known'}", share)

    def lie() -> None:
        shutil.disk_usage = lambda path: os.terminal_size((1, 1)) and type("Usage", (), {"free": 1 << 50})()

    cached = sum(p.stat().st_size + 4096 for p in lab.warm.rglob("*")) // 1024
    for size in range(cached + 8, cached + 5800, 120)[::share]:
        lab.reset()
        shutil.rmtree(lab.runs / ".cache")
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", lab.runs], capture_output=True
        ).returncode:
            pytest.skip("may not mount")
        try:
            shutil.copytree(lab.warm, lab.runs / ".cache")
            outcome = lab.train(before=lie if lies else None)
            subprocess.run(["mount", "-o", "remount,size=1g", lab.runs], check=True)
            wrong, kind = judged(lab, outcome, reference)
        finally:
            subprocess.run(["umount", "-l", lab.runs], check=True)
        tally.add(f"{size} KiB", *wrong, kind=kind)
    tally.report()


@thinned(20)
def test_a_limit_on_the_size_of_files(lab: Lab, reference, share: int) -> None:
    """The system's own refusal in the midst of a tensor, an optimizer's state, a line."""
    tally = Tally("disk: files limited in size", share)
    for limit in (*range(2000, 30_000, 4000), 100_000, 200_000, 230_000, 231_000, 300_000, 462_000, 463_000)[::share]:
        lab.reset()
        outcome = lab.train(before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))  # noqa: B023
        wrong, kind = judged(lab, outcome, reference)
        tally.add(f"{limit} bytes", *wrong, kind=kind)
    tally.report()


def test_space_is_asked_for_before_writing(lab: Lab, reference) -> None:
    """With no space left no save begins; each is said, training goes on, and the last one ends the run with 1."""

    def full() -> None:
        shutil.disk_usage = lambda path: type("Usage", (), {"free": 1000})()

    lab.reset()
    outcome = lab.train(before=full, disk=Disk(lab.runs))
    assert outcome.code == 1 and "MiB left" in outcome.text and "no checkpoint has been kept yet" in outcome.text
    assert outcome.said.count("training goes on to the next save") == 3
    assert not [path for name, path in outcome.ops if ".partial/" in path]
    assert lab.recover().kind == "done"
    assert not differences(lab.print_of(), reference)


@pytest.mark.parametrize("message", ["No space left on device (os error 28)", "No such file or directory (os error 2)"])
def test_a_tokenizer_that_cannot_be_written(lab: Lab, reference, message: str) -> None:
    """tokenizers raises bare Exceptions; it writes last but one, so the export is cut short and made again by --resume."""

    def refuse() -> None:
        from transformers import CLIPTokenizer

        def save(*arguments: object, **options: object) -> None:
            raise Exception(message)

        CLIPTokenizer._save_pretrained = save  # type: ignore[method-assign]

    lab.reset()
    outcome = lab.train(before=refuse)
    assert outcome.kind == "error" and outcome.code == 1 and message in outcome.text, outcome
    assert lab.recover().kind == "done"
    assert not differences(lab.print_of(), reference)


def test_an_export_that_lost_a_part_is_not_published(lab: Lab, reference) -> None:
    """Its folder vanishes in the midst of it; the libraries make it again and write what is left."""

    def vanish() -> None:
        from transformers import CLIPTokenizer

        real = CLIPTokenizer._save_pretrained

        def save(self: object, save_directory: str, *arguments: object, **options: object) -> object:
            shutil.rmtree(Path(save_directory).parent / "vae", ignore_errors=True)
            return real(self, save_directory, *arguments, **options)

        CLIPTokenizer._save_pretrained = save  # type: ignore[method-assign]

    lab.reset()
    outcome = lab.train(before=vanish)
    assert outcome.code == 1 and "vae/ is missing" in outcome.text, outcome.text
    assert not (lab.folder / "best").exists() and not (lab.folder / "final").exists()
    assert lab.recover().kind == "done"
    assert not differences(lab.print_of(), reference)


def test_a_read_only_folder_is_said_at_once(lab: Lab) -> None:
    lab.reset()
    outcome = lab.train(disk=Disk(lab.runs, 1, READ_ONLY, lasting=True))
    assert outcome.code == 1 and "run.output_dir" in outcome.text, outcome


def test_nothing_is_written_outside_the_run_folder_and_the_cache(lab: Lab, operations) -> None:
    assert {Path(path).parts[0] for _, path in operations} == {"tiny"}
