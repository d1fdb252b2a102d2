"""Whether a run fits into memory, said before it starts; and what `batch.size: auto` and `gradient_checkpointing: auto` stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from sdclr.config import source
from sdclr.config.schema import RunConfig
from sdclr.config.source import LoadedConfig
from sdclr.data import pairs
from sdclr.data.batches import Inputs
from sdclr.engine import processes
from sdclr.engine.fingerprint import answers_in
from sdclr.engine.folder import RunFolder
from sdclr.engine.plan import find_prior, held_out_share
from sdclr.errors import ConfigError, InputError, SdclrError
from sdclr.report import console

if TYPE_CHECKING:
    from sdclr.engine.memory import Needs

SHARE = 0.9
"""Of the free memory that what is chosen here fills: kernels take some for themselves, and other programs live here too."""
GIB = 2**30
FOR_A_GPU = GIB
"""Bytes of weights that are not trained on a CPU for long."""
IN_RAM = "in RAM"


def settle_batch(loaded: LoadedConfig, resume: bool = False) -> LoadedConfig:
    """`batch.size: auto` as a number: the one this run (or its range test) has begun with, else the largest that fits.

    Raises ConfigError when not even one picture fits, or when several processes would have to agree.
    """
    config = loaded.config
    if config.batch.size != "auto":
        return loaded
    if processes.count() > 1:
        raise ConfigError([loaded.problem("batch.size", "auto is for one process; with several, name a number")])
    size, why = _begun_with(config, resume) or _largest(loaded)
    console.say(f"batch.size: auto is {size} ({why})")
    return dataclasses.replace(loaded, config=with_size(config, size))


def with_size(config: RunConfig, size: int) -> RunConfig:
    """The config with that batch size."""
    return config.model_copy(update={"batch": config.batch.model_copy(update={"size": size})})


def settle_memory(config: RunConfig, inputs: Inputs, keeps_base: bool = False, elsewhere: bool = False) -> RunConfig:
    """Say in one line what the run will need, and whether it fits; a warning when it does not. With `gradient_checkpointing: auto` it is
    turned on in the config returned, if the run might not fit without in one of the processes. With `elsewhere` it is also said what a
    GPU would need, where there is none and the model is one for it."""
    together = processes.Processes(inputs.batches.rank, inputs.batches.processes)
    foretold = _foretell(config, inputs, keeps_base)
    if elsewhere and foretold.where == IN_RAM and foretold.needs.parts["weights"] > FOR_A_GPU:
        console.say(_on_a_gpu(config, inputs))
    might_not_fit = config.model.gradient_checkpointing == "auto" and foretold.need > SHARE * foretold.free
    by_need = bool(together.agree(int(might_not_fit)))
    if by_need:
        config = _checkpointed(config)
        foretold = _foretell(config, inputs, keeps_base)
    text = foretold.in_words()
    if by_need:
        text += ", with gradient checkpointing"
    if config.sample.at_troughs and not keeps_base:
        text += f"; {_shown(foretold.while_drawing)} while it draws"
        if foretold.need <= foretold.free < foretold.while_drawing:
            console.warn(f"{text}, which might not fit: then training goes on without, and sdclr sample draws later")
            return config
    if foretold.need <= foretold.free:
        console.say(f"{text}, without which it might not fit" if by_need else text)
        return config
    smaller = _foretell(config, inputs, keeps_base, every_size=True).largest()
    ways = [f"batch.size: {smaller}"] if smaller else []
    ways += _ways_to_need_less(config, foretold.in_shares)
    if foretold.needs.recorded:
        ways.append("model.compile: off")
    console.warn(f"{text}: it will not fit; try {' or '.join(ways) or 'a machine with more'}")
    return config


@dataclasses.dataclass(frozen=True)
class _Foretold:
    """What each of so many processes needs, with `size` pictures of a batch, and what it may take, in bytes."""

    needs: Needs
    free: int
    where: str
    size: int
    processes: int
    in_shares: bool

    @property
    def need(self) -> int:
        return self.needs.at(self.size)

    @property
    def while_drawing(self) -> int:
        return self.needs.while_drawing(self.size)

    def largest(self) -> int:
        """The largest batch of all processes together below this one that fits; 0 if there is none, or it cannot be told."""
        return 0 if self.in_shares else self.needs.largest(self.free, self.size - 1) * self.processes

    def in_words(self) -> str:
        what = {**self.needs.parts, "gradients and activations": self.needs.working(self.size)}
        parts = ", ".join(f"{name} {_shown(value)}" for name, value in what.items() if value >= self.need / 100)
        about = "about " if self.in_shares else ""
        return f"memory: {about}{_shown(self.need)} of {_shown(self.free)} free {self.where} ({parts})"


def _foretell(config: RunConfig, inputs: Inputs, keeps_base: bool, every_size: bool = False) -> _Foretold:
    """Counted for the run's own batch size alone, which is faster, or for every one."""
    from sdclr.engine import sharding

    count, in_shares = inputs.batches.processes, sharding.asked()
    size = inputs.batches.size // count
    needs, free, where = _needs(config, *_pictures(inputs), keeps_base, None if every_size else size)
    if count > 1:
        needs = needs.shared(count) if in_shares else needs.side_by_side()
        if where == IN_RAM:  # which all processes of a machine take from
            free, where = free // processes.on_this_machine(), f"{IN_RAM} for each process"
    return _Foretold(needs, free, where, size, count, in_shares)


def _pictures(inputs: Inputs) -> tuple[int, int]:
    """How many are trained on, prior ones among them, and how many are held out."""
    return len(inputs.split.train) + len(inputs.prior), len(inputs.split.validation)


def _on_a_gpu(config: RunConfig, inputs: Inputs) -> str:
    """What the run would take of an NVIDIA GPU of the kind that computes in bf16, which is counted here without one."""
    import torch

    from sdclr.engine import memory

    size = inputs.batches.size

    def needed(config: RunConfig) -> str:
        return _shown(memory.count(config, *_pictures(inputs), torch.device("cuda"), only=size).at(size))

    text = f"memory: on an NVIDIA GPU {needed(config)}"
    if config.model.gradient_checkpointing is not True:
        text += f", or {needed(_checkpointed(config))} with model.gradient_checkpointing: true"
    return text


def out_of_memory(problem: BaseException) -> SdclrError | None:
    """The message for a GPU whose memory is full, which torch tells by an exception of that name; None for anything else."""
    if type(problem).__name__ != "OutOfMemoryError":
        return None
    return SdclrError(
        f"the GPU's memory is full: {str(problem).partition('. ')[0]}",
        hint="set model.gradient_checkpointing: true or model.compile: off (a run can be resumed with these), or start anew with a lower "
        "batch.size and a higher batch.accumulate, with optimizer.name: adamw8bit, model.precision: full_bf16 or lora.rank: 16; sdclr check says what a run needs",
    )


def _largest(loaded: LoadedConfig) -> tuple[int, str]:
    config = loaded.config
    every = pairs.find(config.data.images, config.data.caption)
    found = pairs.split(every, config.validation.fraction, config.run.seed)
    measured = len(every) - round(held_out_share(config, len(every)) * len(every))
    images = min(len(found.train), measured)
    prior = len(find_prior(config))
    most = min(images, prior) if prior else images
    # The range test trains on fewer images, and keeps a copy of the untouched weights; so that both commands settle on the same number,
    # train reckons with that too.
    by_need = [_checkpointed(config)] if config.model.gradient_checkpointing == "auto" else []
    for tried in (config, *by_need):
        needs, free, where = _needs(with_size(tried, 1), images + prior, len(every) - images, keeps_base=True)
        size = needs.largest(int(SHARE * free), max(1, most))
        if size:
            break
    if not size:
        raise ConfigError(
            [loaded.problem("batch.size", f"auto: not even one picture fits: {_shown(needs.at(1))} are needed, and of {_shown(free)} free {where} {SHARE:.0%} are taken")],
            hint=f"set {' or '.join([*_ways_to_need_less(config), 'a smaller data.resolution'])}",
        )  # fmt: skip
    if size < most:
        return size, f"{SHARE:.0%} of {_shown(free)} free {where}"
    if most < images:
        return size, "all prior pictures there are"
    return size, "all that the range test trains on" if images < len(found.train) else "all there are to train on"


def _begun_with(config: RunConfig, resume: bool) -> tuple[int, str] | None:
    folder = RunFolder(config.folder)
    if resume:
        stored = _snapshot(folder.config)
        return (stored.batch.size, "as the run was started with") if stored and stored.batch.size != "auto" else None
    for place in answers_in(folder.range_test):
        stored = _snapshot(place / "config.yaml")
        if stored and stored.batch.size != "auto" and _matters(stored) == _matters(config):
            return stored.batch.size, "as its range test was measured with"
    return None


def _ways_to_need_less(config: RunConfig, in_shares: bool = False) -> list[str]:
    """Settings that take less memory than the config's."""
    ways = ["model.gradient_checkpointing: true"] if not config.model.gradient_checkpointing else []
    if config.optimizer.name == "adamw" and not in_shares:
        ways.append("optimizer.name: adamw8bit")
    if config.model.precision != "full_bf16" and not in_shares and not config.lora.rank:
        ways.append("model.precision: full_bf16")
    if not config.lora.rank and not in_shares:
        ways.append("lora.rank: 16")
    return ways


def _checkpointed(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": True})})


def _matters(config: RunConfig) -> tuple[object, ...]:
    """What a batch's memory depends on."""
    optimizer = config.optimizer
    return (
        config.model, config.lora, config.data, config.mask, config.prior, optimizer.name, optimizer.fused_backward, config.validation.fraction
    )  # fmt: skip


def _snapshot(path: Path) -> RunConfig | None:
    try:
        return source.load(path).config if path.is_file() else None
    except InputError:
        return None


def _needs(
    config: RunConfig, images: int, held_out: int, keeps_base: bool, only: int | None = None
) -> tuple[Needs, int, str]:
    from accelerate.state import PartialState

    from sdclr.engine import memory

    device = PartialState().device
    where = "on the GPU" if device.type == "cuda" else IN_RAM
    return memory.count(config, images, held_out, device, keeps_base, only), memory.available(device), where


def _shown(size: int) -> str:
    return f"{size / GIB:.2g} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
