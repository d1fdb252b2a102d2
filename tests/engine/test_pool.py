"""Arms over several splits and seeds: the same numbers as each split on its own, laid side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdclr.config import source
from sdclr.engine.arms import Bench
from sdclr.engine.plan import read_inputs
from sdclr.engine.pool import Pool, make_pool, pooled
from sdclr.engine.run import Run
from sdclr.errors import ConfigError
from sdclr.lr.measured import Measured, at_steps

RATES = [3e-3, 1e-2, 2e-2, 1e-2]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, model, pictures) -> Any:
    from tiny import write_config

    folder = tmp_path_factory.mktemp("pool")
    extra = "range_test: {fraction: 0.2, folds: 3, seeds: 2}\nvalidation: {timesteps_per_image: 2}"
    return source.load(write_config(folder / "run.yaml", model, pictures, folder / "runs", extra))


@pytest.fixture(scope="module")
def pool(loaded, tmp_path_factory) -> Pool:
    return make_pool(Run(loaded.config, read_inputs(loaded, measuring=True)), loaded, tmp_path_factory.mktemp("arms"))


def arm_of(bench: Any) -> Measured:
    """Four steps, measured after the second and the last."""
    return bench.arm("a", 2e-2, lambda step: RATES[step], at_steps([2, 4]))


def test_every_split_holds_out_other_images(pool, loaded):
    held = [row[0].held_out.pairs for row in pool.benches]
    keys = [pair.key for pairs in held for pair in pairs]
    assert len(held) == 3 and len(keys) == len(set(keys)) == 6
    assert [row[0].run.inputs.split for row in pool.benches] == [
        read_inputs(loaded, fold=f, measuring=True).split for f in range(3)
    ]


def test_each_split_and_seed_gives_what_a_run_of_its_own_gives(pool, loaded, tmp_path):
    together = arm_of(pool)
    rows = []
    for row in pool.benches:
        alone = []
        for bench in row:
            fresh = Run(loaded.config, bench.run.inputs)
            alone.append(arm_of(Bench(fresh, fresh.held_out, loaded.config, tmp_path / str(id(bench)))).losses)
        assert not np.array_equal(*alone)  # the seeds do train otherwise
        rows.append(np.mean(alone, axis=0))
    assert np.array_equal(together.losses, np.concatenate(rows, axis=1))
    assert together.steps.tolist() == [2, 4] and np.allclose(together.exposure, np.cumsum(RATES)[[1, 3]])
    assert pool.train_steps == 4 * 6


def test_the_untouched_model_is_measured_once_for_each_split(pool, loaded):
    separate = []
    for row in pool.benches:
        fresh = Run(loaded.config, row[0].run.inputs)
        separate.append(fresh.losses(fresh.held_out, fresh.draws(fresh.held_out)))
    assert np.array_equal(pool.base(), np.concatenate(separate))


def measured(points: int, diverged: bool = False, images: int = 2) -> Measured:
    steps = np.arange(1.0, points + 1)
    losses = np.ones((points, images, 3)) * steps[:, None, None]
    return Measured("a", 1.0, steps, steps * 0.5, losses, steps, np.full((images, 3), 2.0), diverged)


def test_an_arm_that_ends_early_in_one_split_counts_up_to_there_and_as_diverged():
    arm = pooled([[measured(4)], [measured(2, diverged=True)]])
    assert arm.diverged and arm.losses.shape == (2, 4, 3) and arm.steps.tolist() == [1, 2]
    assert arm.rises.tolist() == [[-1.0] * 4, [0.0] * 4]


def test_one_bench_alone_is_itself():
    assert dataclasses.astuple(pooled([[measured(3)]]))[2].tolist() == [1, 2, 3]
    assert np.array_equal(pooled([[measured(3)]]).losses, measured(3).losses)


def test_more_splits_than_images_can_be_held_out_are_refused(loaded):
    with pytest.raises(
        ConfigError, match=r"range_test\.folds is 6: 2 of 10 images .* leave 5 splits that do not overlap"
    ):
        read_inputs(source.load(Path(loaded.source), ["range_test.folds=6"]), measuring=True)
    assert read_inputs(source.load(Path(loaded.source), ["range_test.folds=5"]), measuring=True)


def test_a_range_test_holds_out_two_fifths_or_what_splits_and_a_batch_leave(loaded):
    def held(*overrides: str) -> int:
        return len(read_inputs(source.load(Path(loaded.source), overrides), measuring=True).split.validation)

    auto = ("range_test.fraction=auto", "range_test.folds=1")
    assert held(*auto) == 4
    assert held(*auto, "validation.fraction=0.5") == 5
    assert held(*auto, "validation.fraction=0") == 4
    assert held(*auto, "batch.size=7") == 3
    assert held("range_test.fraction=auto", "range_test.folds=4") == 2
    assert held(*auto[1:], "range_test.fraction=0.1") == 1
