"""Several processes of the program as `torchrun` starts them, without its seconds of imports: forks of this one around one store.

As torchrun does, the first to end in failure takes the others with it (SIGTERM, and SIGKILL when that does not help); unlike it,
after two seconds instead of at once, so that one that is ending by itself shows its own exit code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

PATIENCE = 120
"""Seconds after which processes that have not ended are held to hang."""
GRACE = 2
"""Seconds that the others have to end by themselves after one has failed."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How each process ended (its exit code; minus the signal's number if one killed it) and what they wrote, all together."""

    codes: tuple[int, ...]
    out: str
    err: str


def command(*arguments: object) -> Callable[[], None]:
    """The program with these arguments."""

    def run() -> None:
        from sdclr import cli

        sys.argv = ["sdclr", *map(str, arguments)]
        cli.main()

    return run


def launch(count: int, work: Callable[[], None], folder: Path) -> Ended:
    """Do some work in `count` processes at once; what they write goes through files in `folder`."""
    from torch.distributed import TCPStore

    folder.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out, err = folder / "out.txt", folder / "err.txt"
    for path in (out, err):
        path.write_bytes(b"")
    started = [_fork(rank, count, store.port, work, out, err) for rank in range(count)]
    codes = _watch(started)
    return Ended(tuple(codes[pid] for pid in started), out.read_text(), err.read_text())


def _fork(rank: int, count: int, port: int, work: Callable[[], None], out: Path, err: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        _begin(rank, count, port)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def _begin(rank: int, count: int, port: int) -> None:
    """The state that a process would have that the launcher has just started."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from sdclr.report import console

    torch.set_num_threads(1)  # the parent's OpenMP threads have not come along
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    console.console = type(console.console)(stderr=True, highlight=False, file=sys.stderr, width=400)
    if count > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
        )  # fmt: skip


def _watch(started: list[int]) -> dict[int, int]:
    codes: dict[int, int] = {}
    begun, failed, terminated = time.monotonic(), 0.0, False
    while len(codes) < len(started):
        for pid in started:
            if pid in codes:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        running = [pid for pid in started if pid not in codes]
        if any(codes.values()) and not failed:
            failed = time.monotonic()
        if failed and not terminated and time.monotonic() - failed > GRACE:
            terminated = True
            for pid in running:
                os.kill(pid, signal.SIGTERM)
        if time.monotonic() - (failed or begun) > (30 if failed else PATIENCE):
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    return codes
