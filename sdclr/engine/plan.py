"""What a run will do, from the config and the folder of images alone: no torch, no weights.

`check` prints the plan, `train` follows it, `range-test` borrows its way of splitting and sampling; so what is said before training is
what is done.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from sdclr.config.kinds import MAX_STEPS, Span
from sdclr.config.rates import CYCLIC
from sdclr.config.schema import RunConfig
from sdclr.config.source import LoadedConfig
from sdclr.data import masks, pairs
from sdclr.data.batches import Batches, Inputs
from sdclr.data.captions import tags_of
from sdclr.data.dataset import views
from sdclr.data.pairs import Pair, Split, printable
from sdclr.engine.fingerprint import differing, find_range_test, fingerprint, in_words, range_tests, sampled
from sdclr.errors import ConfigError, DataError, InputError
from sdclr.lr.exposure import steps_for
from sdclr.lr.schedule import Group, Schedule

TWO_FIFTHS = 0.4
"""Of twenty pictures eight are held out in a range test: S* is placed twice as well as by four, at the same cost (README)."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's length, schedule and cadence, in optimizer steps; `best_exposure`, `ceiling` and `source` are of the range test that was used.
    Of a run that goes on, `done` steps have collected the exposure `collected`, at rates which may differ from the schedule's."""

    schedule: Schedule
    steps: int
    validate_every: int
    save_every: int | None
    best_exposure: float | None
    ceiling: float | None
    source: Path | None
    done: int = 0
    collected: float = 0.0

    @property
    def exposure(self) -> float:
        return self.collected + float(self.schedule.rates()[self.done :].sum())

    @property
    def kappa(self) -> float | None:
        """Planned exposure in units of the best one, when a range test has measured that."""
        return self.exposure / self.best_exposure if self.best_exposure else None


class NoRangeTest(InputError):
    """The config leaves to a range test what none that fits can say."""


def read_inputs(
    loaded: LoadedConfig, rank: int = 0, processes: int = 1, fold: int = 0, measuring: bool = False
) -> Inputs:
    """Find and split the images, for training or, `measuring`, for a range test. Raises DataError or ConfigError with every problem,
    before torch is imported."""
    config = loaded.config
    if problems := _overlaps(loaded):
        raise ConfigError(problems)
    found = find_subject(config)
    fraction = held_out_share(config, len(found)) if measuring else config.validation.fraction
    split = pairs.split(found, fraction, config.run.seed, fold)
    prior = find_prior(config)
    size = 1 if config.batch.size == "auto" else config.batch.size  # commands that train settle it first
    problems = [*_idle(loaded, found), *_too_few(loaded, split, prior, size, processes, measuring)]
    if problems:
        raise ConfigError(problems)
    _refuse_leaks(split, prior)
    batches = Batches(
        seed=config.run.seed, images=len(split.train), views=len(views(config.data.crop, config.data.crops, config.data.flip)),
        size=size, accumulate=config.batch.accumulate, caption_dropout=config.data.caption_dropout,
        rank=rank, processes=processes,
        times=pairs.times(split.train, config.data.repeats) if config.data.repeats else (),
    )  # fmt: skip
    return Inputs(split, batches, prior)


def find_subject(config: RunConfig) -> list[Pair]:
    """The pictures that are trained on and held out, with their masks. Raises DataError with every problem."""
    found = pairs.find(config.data.images, config.data.caption)
    if config.mask.of_transparency:
        return masks.by_transparency(found)
    return masks.from_folder(found, config.mask.folder) if config.mask.folder else found


def find_prior(config: RunConfig) -> tuple[Pair, ...]:
    """The pictures to train on beside the subject's, if there are to be any. Raises DataError as `pairs.find`."""
    place = config.prior.images
    if place and not place.is_dir():
        hint = f'set prior.images to a folder of pictures, or draw some: sdclr draw CONFIG "a photo of a ..." --output {place}'
        raise DataError([f"{place}: there is no such image folder (prior.images)"], hint)
    return tuple(pairs.find(place, config.prior.caption)) if place else ()


def _overlaps(loaded: LoadedConfig) -> list[str]:
    """Folders that lie in one another: all pictures in the outer one would be taken."""
    config = loaded.config
    folders = {"data.images": config.data.images, "prior.images": config.prior.images, "mask.images": config.mask.folder}  # fmt: skip
    return [
        loaded.problem(key, f"and {other} ({there}) lie in one another, and all pictures in the outer one are taken: give them folders side by side")
        for (other, there), (key, here) in itertools.combinations(folders.items(), 2) if there and here and overlap(there, here)
    ]  # fmt: skip


def _idle(loaded: LoadedConfig, found: Sequence[Pair]) -> list[str]:
    """Settings of the data that say nothing about these pictures."""
    data, problems = loaded.config.data, []
    folders = {folder for pair in found for folder in pairs.folders_of(pair)}
    unknown = [name for name in data.repeats if name not in folders]
    if unknown:
        there = f"those that do: {printable(', '.join(sorted(folders)[:10]))}" if folders else "no subfolder holds any"
        problems.append(loaded.problem("data.repeats", f"names {printable(', '.join(unknown))}, and no picture of {data.images} lies in such a subfolder ({there})"))  # fmt: skip
    if data.tag_orders > 1 and not any(len(tags_of(pair.caption)) > data.keep_tags + 1 for pair in found):
        beyond = f" beyond the {data.keep_tags} that are kept in place" if data.keep_tags else ""
        problems.append(loaded.problem("data.tag_orders", f"has nothing to order: no caption has two tags{beyond}"))
    return problems


def _too_few(
    loaded: LoadedConfig, split: Split, prior: Sequence[Pair], size: int, processes: int, measuring: bool
) -> list[str]:
    """Numbers of pictures, of a batch and of processes that do not go together."""
    config, problems = loaded.config, []
    key = "range_test.fraction" if measuring else "validation.fraction"
    train, held_out = len(split.train), len(split.validation)
    every, folds = train + held_out, config.range_test.folds
    if size % processes:
        problems.append(loaded.problem("batch.size", _uneven(size, processes)))
    if train < size:
        held = f"; {held_out} of {every} are held out" if held_out else ""
        place = "batch.size" if not held_out or every < size else key
        problems.append(
            loaded.problem(place, f"leaves {_counted(train, 'image')} to train on, and a batch needs {size}{held}")
        )
    if (measuring or config.validation.fraction > 0) and not held_out:
        instead = "raise it" if measuring else "raise it, or set 0 to train without validation"
        problems.append(loaded.problem(key, f"of {every} images is none; {instead}"))
    if measuring and held_out and folds * held_out > every:
        problems.append(loaded.problem("range_test.folds", f"is {folds}: {held_out} of {every} images held out each time leave {every // held_out} splits that do not overlap"))  # fmt: skip
    if config.prior.images and len(prior) < size:
        problems.append(loaded.problem("prior.images", f"holds {_counted(len(prior), 'picture')}, and a batch needs {size}: add more (sdclr draw), or lower batch.size"))  # fmt: skip
    return problems


def overlap(one: Path, other: Path) -> bool:
    """Whether one of two folders is, or holds, the other."""
    a, b = one.resolve(), other.resolve()
    return a.is_relative_to(b) or b.is_relative_to(a)


def held_out_share(config: RunConfig, images: int) -> float:
    """What a range test holds out: more than training does, for the spread between held-out images is what limits its answers, and
    what it trains is thrown away."""
    given = config.range_test.fraction
    if given != "auto":
        return given
    size = 1 if config.batch.size == "auto" else config.batch.size
    wanted = round(max(TWO_FIFTHS, config.validation.fraction) * images)
    held_out = max(1, min(wanted, images // config.range_test.folds, images - size))
    return held_out / images


def make_plan(loaded: LoadedConfig, inputs: Inputs) -> Plan:
    """Resolve every `auto` and every epoch into numbers. Raises InputError when a range test is needed and none fits."""
    config, per_epoch = loaded.config, inputs.steps_per_epoch
    measured = find_range_test(config, inputs)
    max_lr = config.schedule.max_lr
    if max_lr == "auto" or config.train.steps == "auto":
        if measured is None:
            raise NoRangeTest(_no_range_test(config, inputs), hint=f"measure it first: sdclr range-test {loaded.typed}")
        if measured[1]["verdict"] != "conclusive":
            raise NoRangeTest(
                f"{measured[0]}: the range test was inconclusive, so schedule.max_lr and train.steps cannot follow from it",
                hint="see its reasons and remedies there, or set schedule.max_lr and train.steps yourself",
            )
    if measured and measured[1]["verdict"] != "conclusive":
        measured = None  # the config says all that it might have said, and its S* is not to be relied on
    best = measured[1]["best_exposure"]["value"] if measured else None
    peak = peak_below(measured[1]["ceiling"]["lr"]) if measured and max_lr == "auto" else float(max_lr)
    steps = _steps(config, per_epoch, peak, best)
    if steps > MAX_STEPS:
        raise ConfigError([loaded.problem("train.steps", f"comes to {steps:,} optimizer steps; at most {MAX_STEPS:,}")])
    schedule = make_schedule(config, per_epoch, steps, peak)
    if not schedule.rates().any():
        raise ConfigError(
            [
                loaded.problem(
                    "schedule", f"collects no exposure: all of its {steps} steps are at a rate of 0; {_shape(schedule)}"
                )
            ]
        )
    problem = peak_end(config, schedule)
    if problem:
        raise ConfigError(
            [loaded.problem("schedule", problem)], hint="or accept it: --set schedule.allow_peak_end=true"
        )
    return Plan(
        schedule=schedule,
        steps=steps,
        validate_every=config.validation.every.in_steps(per_epoch),
        save_every=config.checkpoint.every.in_steps(per_epoch) if config.checkpoint.every else None,
        best_exposure=best,
        ceiling=measured[1]["ceiling"]["lr"] if measured else None,
        source=measured[0] if measured else None,
    )


def peak_below(ceiling: float) -> float:
    """What `schedule.max_lr: auto` means: a whole run meets the ceiling at every peak, and should not live there."""
    return ceiling / 2


def make_schedule(config: RunConfig, steps_per_epoch: float, steps: int, max_lr: float) -> Schedule:
    """The config's schedule for a run of `steps` steps. Raises InputError when a measured peak lies below `base_lr`."""
    s = config.schedule
    if max_lr <= s.base_lr:  # a peak that was given is above: the schema saw to it
        raise InputError(
            f"schedule.base_lr is {s.base_lr:.3g}, and half of the ceiling that was measured is {max_lr:.3g}",
            hint="lower schedule.base_lr, or set schedule.max_lr yourself",
        )
    groups = tuple(Group(g.cycles, g.scale) for g in s.groups or ())
    cycles = s.cycles or sum(g.cycles for g in groups)
    step_size = float(s.step_size.in_steps(steps_per_epoch)) if s.step_size else steps / (2 * cycles) if cycles else 0.0
    warmup = s.warmup if isinstance(s.warmup, int) else 0
    if s.policy == "everydream" and s.warmup == "auto":
        warmup = int(step_size / 50)  # EveryDream2's default, from its lr_decay_steps
    return Schedule(
        s.policy,
        max_lr,
        steps,
        s.base_lr,
        step_size if s.policy in CYCLIC else 0.0,
        s.start,
        s.gamma or 1.0,
        groups,
        warmup,
    )


def _no_range_test(config: RunConfig, inputs: Inputs) -> str:
    what = " and ".join(
        name
        for name, value in (("schedule.max_lr", config.schedule.max_lr), ("train.steps", config.train.steps))
        if value == "auto"
    )
    text = f"{what}: auto needs a range test of this model, these images and this optimizer, and {config.run.output_dir} holds none that fits"
    ours = fingerprint(config, inputs)
    for path, result in range_tests(config)[:3]:
        unlike = [in_words(*each) for each in differing(result.get("fingerprint") or {}, ours)]
        text += f"\n  {path}: differs in {', '.join(unlike)}"
    return text


def _steps(config: RunConfig, per_epoch: float, peak: float, best: float | None) -> int:
    if isinstance(config.train.steps, Span):
        return config.train.steps.in_steps(per_epoch)
    assert best is not None  # make_plan saw to it
    return steps_to_exposure(config, per_epoch, peak, config.train.kappa * best)


def steps_to_exposure(config: RunConfig, per_epoch: float, peak: float, target: float) -> int:
    """The length at which the config's schedule, with peaks at `peak`, has collected the exposure `target` and ends at a trough."""
    shape = make_schedule(config, per_epoch, 1, peak)
    fixed = config.schedule.step_size is not None and shape.half_cycle > 0  # else the cycles stretch with the run
    return steps_for(
        target,
        lambda steps: make_schedule(config, per_epoch, steps, peak),
        multiple=2 * shape.half_cycle if fixed else 1.0,
        first=shape.first_trough if fixed else None,
    )


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def peak_end(config: RunConfig, schedule: Schedule) -> str | None:
    """What is wrong with a schedule that ends near its peak, unless the config accepts that."""
    if not schedule.ends_near_peak or config.schedule.allow_peak_end:
        return None
    whole = "a whole number of cycles" if schedule.start == "low" else "a whole number of cycles and a half"
    better = (
        "give it fewer: a cycle of less than 4 steps cannot rise and fall"
        if schedule.half_cycle < 2
        else f"give it {whole}"
    )
    return f"ends near its peak: the last step would be at {schedule(schedule.steps - 1):.3g} of {schedule.max_lr:.3g}; {_shape(schedule)}; {better}"  # fmt: skip


def _shape(schedule: Schedule) -> str:
    return f"{_counted(schedule.steps, 'step')} are {schedule.cycles:.4g} cycles of {2 * schedule.half_cycle:.4g} steps that start {schedule.start}"


def _uneven(size: int, processes: int) -> str:
    below = size - size % processes
    fitting = f"{below} or {below + processes}" if below else f"{processes}"
    return f"is {size}, which {processes} processes cannot share evenly; take {fitting}, or another number of processes"


def _refuse_leaks(split: Split, prior: Sequence[Pair]) -> None:
    """A picture that is both held out and trained on would make validation measure memory."""
    if not split.validation:
        return
    held = {_content(pair): pair for pair in split.validation}
    same = [(pair, held[_content(pair)]) for pair in (*split.train, *prior) if _content(pair) in held]
    if same:
        raise DataError(
            [
                f"{printable(a.path)} and {printable(b.path)} are the same picture, one to train on and one held out: remove one"
                for a, b in same
            ],
            hint="a picture in both halves makes the validation loss meaningless",
        )


def _content(pair: Pair) -> tuple[int, bytes]:
    return pair.path.stat().st_size, sampled(pair.path)
