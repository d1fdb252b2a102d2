"""Several processes on one run, as `accelerate launch` and `torchrun` start them: one writes and talks, all hear how it went.

Every process walks through the same story. What touches the disk is done by the main one while the others wait (`on_main`); what
one process alone may know, a signal or the clock, is asked of all at the same place (`agree`). An error that the main process
meets is raised in every process; the one that fails first tells the user, and the others end without a word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from sdclr.errors import InputError, SdclrError

T = TypeVar("T")

COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they start: torch's own, then those of MPI that accelerate reads."""
PATIENCE = datetime.timedelta(hours=12)
"""How long a process waits for another that is still at work, such as the main one encoding many pictures; one that dies ends the wait."""
TELLING = datetime.timedelta(seconds=10)
"""How long a process that fails waits for the one that tells why."""


def count() -> int:
    """How many processes were started together, by the environment alone: known before torch is imported."""
    given = [os.environ.get(name, "") for name in COUNTS]
    return max([1, *(int(value) for value in given if value.isdigit())])


def on_this_machine() -> int:
    """How many of them share this machine: as torch's launchers say, else all."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(local) if local.isdigit() and int(local) else count()


def refuse_several(what: str) -> None:
    """Raise InputError if `what`, which several processes would do over one another, was started in several."""
    if count() > 1:
        raise InputError(
            f"{what} runs in one process, and {count()} were started", hint=f"start it without a launcher: {what} ..."
        )


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process's place among those that were started together. Alone, each method does the work and nothing else."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the main process do some work while the others wait: all return its result, or raise its SdclrError.

        Every process must come to the same place; the work must not itself ask the others for anything.
        """
        if self.count == 1:
            return work()
        from accelerate.state import PartialState
        from accelerate.utils import broadcast_object_list

        PartialState().wait_for_everyone()
        heard: list[Any] = [None, None]
        if self.main:
            try:
                heard[0] = work()
            except SdclrError as problem:
                heard[1] = problem
        result, refusal = broadcast_object_list(heard)
        if refusal is not None:
            raise refusal
        return result

    def agree(self, value: int) -> int:
        """The largest value that any process gives; every process must ask at the same place."""
        if self.count == 1:
            return value
        import torch
        from accelerate.state import PartialState
        from accelerate.utils import gather

        return int(gather(torch.tensor([value], device=PartialState().device)).max())

    @contextlib.contextmanager
    def held_by_main(self, context: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        """A context that the main process alone enters, and leaves at the end; its refusal is everybody's."""
        with contextlib.ExitStack() as held:
            self.on_main(lambda: held.enter_context(context))
            yield


def join() -> Processes:
    """Take this process's place among those started with it; all but the main one talk no more. Alone, torch is not imported.

    Raises InputError when accelerate sees fewer than were started: each would take itself for the only one.
    """
    together = count()
    if together == 1:
        if "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
            from sdclr.report import console

            console.warn(
                "accelerate launch was asked for several processes and started one, as it does with --cpu; "
                "several on CPUs: torchrun --nproc-per-node 2 -m sdclr ..."
            )
        return Processes()
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    if state.num_processes != together:
        raise InputError(
            f"{together} processes were started, and accelerate joins {state.num_processes} on {state.device}",
            hint="start them with accelerate launch or torchrun; on CPUs set ACCELERATE_USE_CPU=true",
        )
    from sdclr.report import console

    console.muted = state.process_index > 0
    return Processes(state.process_index, state.num_processes)


def leave() -> None:
    """At the end of a command that went well."""
    if count() > 1:
        from accelerate.state import PartialState

        PartialState().destroy_process_group()


@contextlib.contextmanager
def telling() -> Iterator[bool]:
    """Around the message of a failure: true in the process that failed first, which tells; the others wait until it has.

    They agree through the launcher's store: it is there before they have joined, and still when one of them hangs or has died.
    Where it cannot be asked, the process tells: rather twice than not at all.
    """
    store = _store() if count() > 1 else None
    if store is None:
        yield True
        return
    failed, told = (f"sdclr/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{name}" for name in ("failed", "told"))
    first = store.add(failed, 1) == 1
    try:
        yield first
    finally:
        with contextlib.suppress(Exception):  # the store has gone: so has whoever would have told
            if first:
                store.set(told, "")
            else:
                store.wait([told], TELLING)


def loss_of_another(problem: Exception) -> SdclrError | None:
    """What a failed exchange between processes means: one of them has died. None for every other exception."""
    from torch.distributed import DistError

    if not isinstance(problem, DistError) and "gloo/transport" not in str(problem):
        return None
    return SdclrError(
        "another process of this run has ended without a word: it was killed, or its machine has no memory left",
        hint="the launcher's own lines say which; what was saved is kept: sdclr train CONFIG --resume",
    )


def _store() -> Any:
    """The store that the launcher's processes share, or None."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=TELLING, wait_for_workers=False
        )
    except (KeyError, ValueError, RuntimeError):
        return None
