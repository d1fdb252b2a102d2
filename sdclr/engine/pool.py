"""Several benches as one: the same arms over rotating splits and over training seeds.

The spread between images dominates a range test's interval. With `range_test.folds` every split holds out other images, whose
losses are laid side by side; with `range_test.seeds` every split is trained several times, and an image's losses are averaged.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdclr.config.source import LoadedConfig
from sdclr.engine.arms import Bench
from sdclr.engine.plan import read_inputs
from sdclr.engine.run import Run
from sdclr.lr.measured import Measured, NextPoint, at_steps
from sdclr.seeding import derive


class Pool:
    """Asked as one Bench is. `benches` holds one row for each split, each of one Bench for each seed.

    The first bench decides how long an arm is and where it is measured; the others follow it step for step, so that all have
    the same exposures.
    """

    def __init__(self, benches: Sequence[Sequence[Bench]]):
        self.benches = benches
        self.config = benches[0][0].config
        self.finished: dict[str, Measured] = {}
        self.started = time.monotonic()

    @property
    def train_steps(self) -> int:
        return sum(bench.train_steps for row in self.benches for bench in row)

    @property
    def forwards(self) -> int:
        return sum(bench.forwards for row in self.benches for bench in row)

    def base(self) -> np.ndarray:
        """Losses of the untouched model, (images of all splits, K)."""
        return np.concatenate([row[0].base() for row in self.benches])

    def arm(
        self,
        name: str,
        lr: float,
        lr_at: Callable[[int], float],
        next_point: NextPoint,
    ) -> Measured:
        """The arm of every bench, as one. Raises OutOfTime between measurements."""
        if name not in self.finished:
            first = self.benches[0][0].arm(name, lr, lr_at, next_point)
            followed = at_steps(map(int, first.steps) if len(first.steps) else [len(first.rates)])

            def arm(bench: Bench) -> Measured:
                return first if bench is self.benches[0][0] else bench.arm(name, lr, lr_at, followed)

            self.finished[name] = pooled([[arm(bench) for bench in row] for row in self.benches])
        return self.finished[name]


def make_pool(run: Run, loaded: LoadedConfig, folder: Path, *options: Any) -> Pool:
    """One bench for every split and seed of the config's range_test section; `options` are passed on to each."""
    settings = loaded.config.range_test

    def row(fold: int) -> Iterator[Bench]:
        ours = (run.processes.rank, run.processes.count)
        split = run.on(read_inputs(loaded, *ours, fold, measuring=True)) if fold else run
        for number in range(settings.seeds):
            seed = derive(loaded.config.run.seed, "range-test", number) if number else loaded.config.run.seed
            batches = dataclasses.replace(split.inputs.batches, seed=seed)
            one = split.on(dataclasses.replace(split.inputs, batches=batches))
            assert one.held_out is not None  # read_inputs saw to it
            place = folder / f"split-{fold}-seed-{number}" if fold or number else folder
            yield Bench(one, one.held_out, loaded.config, place, *options)

    return Pool([list(row(fold)) for fold in range(settings.folds)])


def pooled(arms: Sequence[Sequence[Measured]]) -> Measured:
    """One arm from those of several splits (rows) and seeds: images of all splits, losses averaged over seeds, at the steps at which all
    were measured."""
    flat = [arm for row in arms for arm in row]
    steps = functools.reduce(np.intersect1d, (arm.steps for arm in flat))

    def where_all_were_measured(arm: Measured, values: np.ndarray) -> np.ndarray:
        return values[np.isin(arm.steps, steps)]

    losses = np.concatenate(
        [np.mean([where_all_were_measured(arm, arm.losses) for arm in row], axis=0) for row in arms], axis=1
    )
    base = np.concatenate([row[0].base for row in arms])
    first: dict[str, Any] = {
        "steps": steps,
        "exposure": where_all_were_measured(flat[0], flat[0].exposure),
        "losses": losses,
    }
    return dataclasses.replace(flat[0], **first, base=base, diverged=any(arm.diverged for arm in flat))
