"""Faults by fork and count.

The parent imports torch and loads the tiny model once. Each fault is a forked child that runs a command's own function; patched
file functions count every operation that changes something under the run's folder, and the k-th one kills the process, writes
half and kills it, or fails with the system's error. So every fault has a number, and the same number always hits the same place.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).with_name("results.json")
TIMEOUT = 120
"""Seconds after which a child counts as hung."""


# Children --------------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a child ended: `kind` is done, error (an SdclrError, or an interrupt), traceback, killed or hang; `code` the exit code
    the program would have had; `text` the message or traceback; `said` what went to stdout and stderr; `ops` what the disk saw."""

    kind: str
    code: int | None = None
    text: str = ""
    said: str = ""
    ops: list[tuple[str, str]] = field(default_factory=list)
    value: Any = None


def in_child(work: Callable[[], Any], disk: Disk | None = None, log: Path | None = None) -> Outcome:
    """Run `work` in a forked child under the faults of `disk`, and say how it ended."""
    log = log or Path(os.environ.get("TMPDIR", "/tmp"), f"faults-{os.getpid()}.log")
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            _be_the_child(work, disk, log, answer)
        finally:
            os._exit(70)
    _, status = os.waitpid(child, 0)
    said = log.read_text(errors="replace") if log.exists() else ""
    if answer.exists():
        return Outcome(said=said, **json.loads(answer.read_text()))
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    kind = {signal.SIGKILL: "killed", signal.SIGALRM: "hang"}.get(number, "traceback")
    return Outcome(kind, text=f"status {status}", said=said)


def _be_the_child(work: Callable[[], Any], disk: Disk | None, log: Path, answer: Path) -> None:
    import torch

    from sdclr.errors import SdclrError
    from sdclr.report import console

    signal.alarm(TIMEOUT)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    torch.set_num_threads(1)
    real_open, real_dump = builtins.open, json.dumps
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout = sys.stderr = real_open(1, "w", buffering=1, closefd=False, errors="backslashreplace")
    console.console = type(console.console)(stderr=True, highlight=False, width=200)
    console.quiet = True
    result: dict[str, Any] = {"kind": "done", "code": 0}
    try:
        with disk.installed() if disk else contextlib.nullcontext():
            result["value"] = work()
    except SdclrError as problem:
        result = {"kind": "error", "code": problem.exit_code, "text": f"{problem.message}\n{problem.hint or ''}"}
        if not problem.message.strip():
            result["kind"] = "traceback"  # an error without a word is no better
    except KeyboardInterrupt:
        result = {"kind": "error", "code": 130, "text": "interrupted"}
    except BaseException:
        result = {"kind": "traceback", "text": traceback.format_exc()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.stdout.flush()
    if disk:
        result["ops"] = disk.log
    with real_open(answer, "w") as file:
        file.write(real_dump(result))
    os._exit(0)


# The disk --------------------------------------------------------------------------------------------------------------------


class Disk:
    """Counts the operations that change something under `root`; at the `at`-th one `fault` happens (and, if `lasting`, at every
    later one). A fault is "kill", or the number of a system error; `half`: half of what was to be written is written first."""

    WRITES = ("write", "save_file")

    def __init__(self, root: Path, at: int = 0, fault: str | int = "kill", half: bool = False, lasting: bool = False):
        self.root, self.at, self.fault, self.half, self.lasting = root.resolve(), at, fault, half, lasting
        self.log: list[tuple[str, str]] = []

    def touch(
        self, name: str, path: Any, write_half: Callable[[], Any] | None = None, handle: int | None = None
    ) -> None:
        """An operation is about to happen; `handle` is the open file's, where there is one."""
        place = self._under_root(path)
        if place is None:
            return
        self.log.append((name, place))
        count = len(self.log)
        if count != self.at and not (self.lasting and self.at and count > self.at):
            return
        if self.half and write_half:
            write_half()
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        assert isinstance(self.fault, int)
        if name == "save_file":  # as safetensors says it
            from safetensors import SafetensorError

            raise SafetensorError(
                f"Error while serializing: I/O error: {os.strerror(self.fault)} (os error {self.fault})"
            )
        raise OSError(self.fault, os.strerror(self.fault), str(path))

    def _under_root(self, path: Any) -> str | None:
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        full = os.path.abspath(os.fspath(path))  # noqa: PTH100 (resolve would follow links)
        return os.path.relpath(full, self.root) if full.startswith(f"{self.root}/") else None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Patch every way by which the program and its libraries write files from Python."""
        self._patch_os()
        self._patch_open()
        self._patch_safetensors()
        yield

    def _patch_os(self) -> None:
        touch = self.touch

        def at(path: Any, dir_fd: int | None) -> Any:
            return path if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink() / os.fspath(path)

        def one(name: str) -> None:
            real = getattr(os, name)

            def patched(path: Any, *args: Any, **kwargs: Any) -> Any:
                touch(name, at(path, kwargs.get("dir_fd")))
                return real(path, *args, **kwargs)

            setattr(os, name, patched)

        for name in ("mkdir", "unlink", "remove", "rmdir", "fsync", "ftruncate", "truncate", "rename", "replace"):
            one(name)
        real_open, real_pwrite = os.open, os.pwrite

        def patched_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                touch("open", at(path, kwargs.get("dir_fd")))
            return real_open(path, flags, *args, **kwargs)

        def patched_pwrite(handle: int, data: bytes, offset: int) -> int:
            touch("write", handle, lambda: real_pwrite(handle, data[: len(data) // 2], offset), handle)
            return real_pwrite(handle, data, offset)

        os.open, os.pwrite = patched_open, patched_pwrite  # type: ignore[assignment]

    def _patch_open(self) -> None:
        touch, real = self.touch, builtins.open

        class File:
            """A file opened for writing, as it was, but every write is an operation."""

            def __init__(self, file: Any, path: Any):
                self.file, self.path = file, path

            def write(self, data: Any) -> Any:
                def half() -> None:
                    self.file.write(data[: len(data) // 2])
                    self.file.flush()

                touch("write", self.path, half, self.file.fileno())
                return self.file.write(data)

            def __enter__(self) -> File:
                return self

            def __exit__(self, *exc: Any) -> None:
                self.file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

        def patched(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, int) or not set(mode) & set("wax+"):
                return real(path, mode, *args, **kwargs)
            touch("open", path)
            return File(real(path, mode, *args, **kwargs), path)

        class FileIO(io.FileIO):
            def __init__(self, path: Any, mode: str):
                touch("open", path)
                super().__init__(path, mode)

            def write(self, data: Any) -> int:
                touch("write", self.name, lambda: super(FileIO, self).write(data[: len(data) // 2]), self.fileno())
                return super().write(data)

        builtins.open = io.open = patched  # type: ignore[assignment]
        io.FileIO = FileIO  # type: ignore[misc]

    def _patch_safetensors(self) -> None:
        import safetensors.torch
        import transformers.modeling_utils

        from sdclr.data import cache
        from sdclr.engine import checkpoint

        real = safetensors.torch.save_file

        def patched(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            def half() -> None:
                real(tensors, path, *args, **kwargs)
                Path(path).write_bytes(Path(path).read_bytes()[: Path(path).stat().st_size // 2])

            self.touch("save_file", path, half)
            real(tensors, path, *args, **kwargs)

        for module, name in (
            (safetensors.torch, "save_file"), (transformers.modeling_utils, "safe_save_file"), (cache, "save_file"), (checkpoint, "save_file"),
        ):  # fmt: skip
            if hasattr(module, name):
                setattr(module, name, patched)


def every_fault(ops: list[tuple[str, str]], share: int, first: int = 0) -> list[tuple[int, bool]]:
    """(number, half) for every operation, and for every write the half of it too; thinned to one in `share`."""
    faults = [
        (k, half) for k, (name, _) in enumerate(ops, 1) for half in (False, True) if not half or name in Disk.WRITES
    ]
    return faults[first::share]


class Deaths(Disk):
    """At every operation (or at given numbers of Python calls) a fork of the process dies by SIGKILL there, and the run goes on.

    What each death left of the run's folder is kept under `states`, one copy of those that are the same to the byte; the list of
    deaths is in its index.json.
    """

    def __init__(self, root: Path, folder: Path, states: Path, share: int = 1, calls: Sequence[int] = ()):
        super().__init__(root)
        self.folder, self.states, self.share, self.calls = folder, states, share, set(calls)
        self.deaths: list[tuple[str, str, str]] = []
        shutil.rmtree(states, ignore_errors=True)
        states.mkdir()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        if self.calls:
            count_calls(at=lambda number: self._die(f"call {number}", "call") if number in self.calls else None)
        else:
            self._patch_os()
            self._patch_open()
            self._patch_safetensors()
        try:
            yield
        finally:
            sys.setprofile(None)
            (self.states / "index.json").write_text(json.dumps(self.deaths))

    def touch(
        self, name: str, path: Any, write_half: Callable[[], Any] | None = None, handle: int | None = None
    ) -> None:
        before = len(self.log)
        super().touch(name, path, write_half, handle)
        if len(self.log) == before or (len(self.log) + self.share // 2) % self.share:
            return
        what = f"{len(self.log)} {name} {self.log[-1][1]}"
        self._die(what, name)
        if write_half:
            self._die(
                f"{what}, half", name, write_half, f"/proc/self/fd/{handle}" if handle is not None else path, handle
            )

    def _die(
        self,
        what: str,
        kind: str,
        write_half: Callable[[], Any] | None = None,
        path: Any = None,
        handle: int | None = None,
    ) -> None:
        before = Path(path).stat().st_size if write_half and Path(path).exists() else None
        at = os.lseek(handle, 0, os.SEEK_CUR) if handle is not None else 0
        child = os.fork()
        if child == 0:
            if write_half:
                write_half()
            os.kill(os.getpid(), signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, f"{what}: lived"
        self.deaths.append((what, kind, self._keep()))
        if write_half:  # the run that lives has not written this
            Path(path).unlink() if before is None else os.truncate(path, before)
            if handle is not None:
                os.lseek(handle, at, os.SEEK_SET)

    def _keep(self) -> str:
        if not self.folder.is_dir():
            return "nothing"
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            digest.update(
                f"{path.relative_to(self.folder)}\0".encode() + (path.read_bytes() if path.is_file() else b"folder")
            )
        state = digest.hexdigest()[:16]
        if not (self.states / state).exists():
            shutil.copytree(self.folder, self.states / state)
        return state


def count_calls(at: Callable[[int], Any] = lambda number: None) -> Callable[[], int]:
    """From now on count the calls of Python functions, tell `at` of each, and give the count when asked."""
    calls = [0]

    def heard(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            calls[0] += 1
            at(calls[0])

    sys.setprofile(heard)

    def stop() -> int:
        sys.setprofile(None)
        return calls[0]

    return stop


# The laboratory --------------------------------------------------------------------------------------------------------------


class Lab:
    """A tiny model, pictures and a run folder that is made anew for each fault; the model is loaded and figures are drawn once."""

    def __init__(self, root: Path, extra: str):
        from tiny import make_model, make_pictures, write_config

        self.root, self.runs = root, root / "runs"
        self.folder = self.runs / "tiny"
        self.pictures = make_pictures(root / "pictures")
        self.model = make_model(root / "model")
        self.config = write_config(root / "run.yaml", self.model, self.pictures, self.runs, extra)
        self.warm = root / "warm"
        self._warm_up()
        shutil.copytree(self.runs / ".cache", self.warm)

    def _warm_up(self) -> None:
        """Children inherit the loaded model, one picture of curves, and kernels that have run once: none of these is what breaks
        here, and all are slow. The first run also fills the cache of latents."""
        import torch

        from sdclr.commands.train import train
        from sdclr.config import source
        from sdclr.model import components
        from sdclr.report import console, figures

        torch.set_num_threads(1)
        self.true_load, self.true_curves = components.load, figures.training
        parts = components.load(source.load(self.config).config.model)
        weights = {
            name: {k: v.clone() for k, v in part.state_dict().items()}
            for name, part in parts.trainable(("unet", "text_encoder")).items()
        }

        def loaded(config: Any, to_train: bool = False) -> Any:
            for name, part in parts.trainable(("unet", "text_encoder")).items():
                part.load_state_dict(weights[name])
            return parts

        self.stand_ins: list[tuple[Any, str, Any]] = [
            (components, "load", loaded),
            (figures, "training", lambda *arguments: b"curves"),
            (figures, "range_test", lambda *arguments: b"curves"),
        ]
        with pytest.MonkeyPatch.context() as patch:
            for place in (*self.stand_ins, (console, "quiet", True)):
                patch.setattr(*place)
            train(self.config)

    def reset(self, kept: Path | None = None) -> None:
        """An empty run folder with a warm cache, or the state kept earlier."""
        shutil.rmtree(self.runs, ignore_errors=True)
        self.runs.mkdir()
        shutil.copytree(self.warm, self.runs / ".cache")
        if kept:
            shutil.copytree(kept, self.folder, symlinks=True)

    def keep(self, name: str) -> Path:
        """A copy of the run folder as it is now."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        return Path(shutil.copytree(self.folder, self.root / name, symlinks=True))

    def train(self, *overrides: str, resume: bool = False, disk: Disk | None = None, before: Callable[[], Any] | None = None,
              checkpoint: Path | None = None) -> Outcome:  # fmt: skip
        """`sdclr train` in a child."""
        from sdclr.commands.train import train

        def work() -> None:
            if before:
                before()
            train(self.config, overrides, resume=resume, checkpoint=checkpoint)

        return in_child(work, disk, self.root / "child.log")

    def range_test(self, *overrides: str, disk: Disk | None = None, before: Callable[[], Any] | None = None) -> Outcome:
        """`sdclr range-test` in a child."""
        from sdclr.commands.range_test import range_test

        def work() -> None:
            if before:
                before()
            range_test(self.config, overrides)

        return in_child(work, disk, self.root / "child.log")

    def deaths(
        self, start: Path | None, work: Callable[..., Outcome], share: int = 1, calls: Sequence[int] = ()
    ) -> list[tuple[str, str, Path | None]]:
        """Every death of a run that begins from `start`: what died where, the kind of place, and the state of the folder it left."""
        self.reset(start)
        states = self.root / "states"
        outcome = work(disk=Deaths(self.runs, self.folder, states, share, calls))
        assert outcome.code in (0, 3), outcome.text
        index = json.loads((states / "index.json").read_text())
        return [(what, kind, None if state == "nothing" else states / state) for what, kind, state in index]

    def recover(self, *overrides: str) -> Outcome:
        """What a user does after a crash: resume, or start when nothing had been kept yet."""
        outcome = self.train(*overrides, resume=True)
        if outcome.kind == "error" and "start it: sdclr train" in outcome.text:
            return self.train(*overrides)
        return outcome

    def print_of(self) -> dict[str, str]:
        """Digests of all that a run leaves: checkpoints, exports, metrics, config. Leftovers of broken saves would show too."""
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name not in (".lock", "report.html")
        }


def differences(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Files that differ between two prints."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


# Figures ---------------------------------------------------------------------------------------------------------------------


class Tally:
    """Counts what was tried and what held; prints a line, and keeps the full runs' figures in results.json."""

    def __init__(self, name: str, share: int):
        self.name, self.share, self.tried, self.failed = name, share, 0, []
        self.kinds: dict[str, int] = {}
        self.started = time.monotonic(), _cpu()

    def add(self, what: str, *problems: str, kind: str = "") -> None:
        """One trial; it held when no problem is named."""
        self.tried += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        found = [problem for problem in problems if problem]
        if found:
            self.failed.append(f"{what}: {'; '.join(found)}")

    def report(self) -> None:
        """Print the figures, then fail if anything did not hold."""
        wall, cpu = time.monotonic() - self.started[0], _cpu() - self.started[1]
        held = self.tried - len(self.failed)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()) if kind)
        sample = "" if self.share == 1 else f" (a sample, one in {self.share})"
        print(
            f"\n{self.name:<44}{held:>6} of {self.tried:<6}{wall:7.0f} s{sample}" + (f"\n    {kinds}" if kinds else "")
        )
        if self.share == 1:
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results[self.name] = {
                "tried": self.tried,
                "held": held,
                "cpu_seconds": round(cpu),
                **({"of": self.kinds} if kinds else {}),
            }
            RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        assert not self.failed, f"{len(self.failed)} of {self.tried} did not hold:\n" + "\n".join(self.failed[:20])


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def picks(seed: int, count: int, limit: int) -> list[int]:
    """`count` reproducible numbers in 1 … limit."""
    draw = random.Random(seed)
    return [draw.randint(1, limit) for _ in range(count)]


NO_SPACE, READ_ONLY, BROKEN, GONE, QUOTA = errno.ENOSPC, errno.EROFS, errno.EIO, errno.ENOENT, errno.EDQUOT


def thinned(thin: int, full: int = 1):
    """A test's `share`: one in `thin` of its trials in `make test`, one in `full` (all of them) in `make test-faults`."""
    return pytest.mark.parametrize(
        "share", [pytest.param(thin, id="sample"), pytest.param(full, id="all", marks=pytest.mark.faults)]
    )
