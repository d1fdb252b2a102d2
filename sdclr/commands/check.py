"""`sdclr check`: read everything, train nothing, through the code that `train` uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdclr.config import source
from sdclr.engine.fit import settle_batch, settle_memory
from sdclr.engine.plan import NoRangeTest, make_plan, read_inputs
from sdclr.engine.telling import cautions, describe
from sdclr.report import console


def check(config_path: Path, overrides: Sequence[str] = (), need_plan: bool = False) -> None:
    """Print the plan, or every problem. With `need_plan` a missing range test is an error, else only said."""
    loaded = settle_batch(source.load(config_path, overrides))
    inputs = read_inputs(loaded)
    plan, missing = None, None
    try:
        plan = make_plan(loaded, inputs)
    except NoRangeTest as problem:
        if need_plan:
            raise
        missing = problem
    set_by_hand = loaded.config.range_test.fraction != "auto" or loaded.config.range_test.folds > 1
    if missing or set_by_hand:  # a range test will be run: its split must be possible
        read_inputs(loaded, measuring=True)
    settle_memory(loaded.config, inputs, elsewhere=True)
    if not need_plan:
        _check_pictures_and_model(loaded, inputs)
    console.table(describe(loaded.config, inputs, plan), title=f"plan of {loaded.config.run.name}")
    if plan:
        console.say(console.curve(plan.schedule.rates()))
        for caution in cautions(loaded.config, plan):
            console.warn(caution)
    if missing:
        console.warn(f"{missing.message}\n  {missing.hint}")
    console.result(f"{config_path}: config, images, captions{'' if need_plan else ' and model'} can be used")


def _check_pictures_and_model(loaded: source.LoadedConfig, inputs) -> None:
    """Decode every picture and load every weight, as a run would; say what model it is, and how much of it is trained."""
    from sdclr.engine.run import Run
    from sdclr.model import adapters

    run = Run(loaded.config, inputs, keep_base=False)
    trained = sum(p.numel() for module in run.modules.values() for p in adapters.trained(module))
    console.say(f"model: {run.parts.described()}; {trained:,} weights are trained")
