"""The range test as a user would run it, many times over, held against the truth; and the run that it recommends, trained.

The program's own functions do the testing (`commands.range_test.measure` and `as_result`); a finished test is repeated when their source
has changed.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stage import Judge, Place, log_points

import sdclr
from sdclr.commands.range_test import as_result, measure
from sdclr.config.schema import RangeTestSection, RunConfig, ValidationSection
from sdclr.data.batches import Inputs
from sdclr.engine.plan import make_schedule, read_inputs
from sdclr.engine.pool import Pool, make_pool
from sdclr.engine.run import Run
from sdclr.report import console

FIRST_SEED = 101
METHOD = (
    "commands/range_test.py",
    "engine/arms.py",
    "engine/pool.py",
    "engine/validation.py",
    "lr/bounds.py",
    "lr/measured.py",
    "lr/paired.py",
    "lr/schedule.py",
)


_SOURCE = b"".join((Path(sdclr.__file__).parent / name).read_bytes() for name in METHOD)
"""As it was when it was imported: the answers are that code's, even where a file is edited while a bench runs."""


def method() -> str:
    """A short hash of the source that makes up the range test, and of its settings where a config says nothing."""
    settings = f"{RangeTestSection()!r} {ValidationSection()!r}".encode()
    return hashlib.blake2b(_SOURCE + settings, digest_size=4).hexdigest()


def range_test(
    place: Place,
    seed: int,
    name: str,
    extra: Sequence[str] = (),
    inputs_of: Callable[[Inputs], Inputs] = lambda inputs: inputs,
    prepare: Callable[[Run], None] = lambda run: None,
    base: Callable[[], Path] | None = None,
) -> dict[str, Any]:
    """One range test with the program's functions: result.json's contents. `inputs_of`, `prepare` and another `base` spoil it, for
    the nulls.

    A test that breaks is a result too: verdict "crashed", its error the only reason.
    """

    def make() -> dict[str, Any]:
        settings = [*extra, *([f"model.base={base()}"] if base else [])]
        with console.progress(name, total=None) as bar:
            bench, config, inputs = bench_of(place, seed, name, settings, inputs_of, prepare, bar.advance)
            try:
                return as_result(measure(bench, config.range_test), bench, config, inputs)
            except Exception as error:  # whatever it is, it is the range test's bug, and the other tests go on
                return _crashed(error, bench)

    return place.piece(name, make, [method(), list(extra)])


def bench_of(
    place: Place,
    seed: int,
    name: str,
    settings: Sequence[str] = (),
    inputs_of: Callable[[Inputs], Inputs] = lambda inputs: inputs,
    prepare: Callable[[Run], None] = lambda run: None,
    heard: Callable[[str], None] = lambda numbers: None,
) -> tuple[Pool, RunConfig, Inputs]:
    """What a range test of the case asks for its arms; those that have been finished under this name are there already."""
    loaded, inputs = place.load(seed, settings)
    run = Run(loaded.config, inputs_of(read_inputs(loaded, measuring=True)))
    assert run.held_out is not None
    prepare(run)
    folder = place.folder / "arms" / f"{name}-{method()}"
    return make_pool(run, loaded, folder, None, None, heard), loaded.config, inputs


def _crashed(error: Exception, bench: Pool) -> dict[str, Any]:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return {
        "verdict": "crashed",
        "reasons": [{"code": "crashed", "text": text, "remedy": ""}],
        **dict.fromkeys(("ceiling", "best_exposure", "gain", "recommended", "reference")),
        "arms": [],
        "cost": {"train_steps": bench.train_steps, "validation_forwards": bench.forwards, "seconds": 0.0},
    }


def trial(place: Place, seed: int, truth: dict[str, Any]) -> dict[str, Any]:
    """One range test against the truth, and its recommended run's regret."""
    result = range_test(place, seed, f"test-{seed}")
    loaded, inputs = place.load(seed)
    record = against(truth, result, loaded.config, inputs)
    plan = result["recommended"]
    if plan:
        name = f"run-{seed}-{plan['max_lr']:.3e}-{plan['steps']}"
        record |= regret(
            truth, place.piece(name, lambda: train(Judge(place, seed), name, plan["max_lr"], plan["steps"]))
        )
    return record


def against(truth: dict[str, Any], result: dict[str, Any], config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Errors in decades (log10 of estimate over truth), coverage, cost in train steps and as a share of the recommended run."""
    steps = steps_of(result, inputs)
    record: dict[str, Any] = {
        "seed": config.run.seed,
        "verdict": result["verdict"],
        "reasons": [reason["code"] for reason in result["reasons"]],
        "ceiling": result["ceiling"],
        "best_exposure": result["best_exposure"],
        "recommended": result["recommended"],
        "cost_steps": round(steps, 1),
        "seconds": result["cost"]["seconds"],
    }
    ceiling, best, plan = result["ceiling"], result["best_exposure"], result["recommended"]
    if ceiling and truth["ceiling"]:
        low, high = ceiling["bracket"]
        record["ceiling_error"] = math.log10(ceiling["lr"] / truth["ceiling"])
        record["bracket_holds"] = bool(low <= truth["ceiling"] <= high)
        record["bracket_decades"] = math.log10(high / low)
    if best:
        low, high = best["interval"]
        record["exposure_error"] = math.log10(best["value"] / truth["best_exposure"])
        record["exposure_holds"] = bool(low <= truth["best_exposure"] <= high)
        record["exposure_flat"] = bool(truth["flat"][0] <= best["value"] <= truth["flat"][1])
    if plan:
        record["cost_share"] = steps / plan["steps"]
    return record


def steps_of(result: dict[str, Any], inputs: Inputs) -> float:
    """What a test cost in train steps: three forwards of a batch count as one."""
    cost = result["cost"]
    return float(cost["train_steps"] + cost["validation_forwards"] / (3 * inputs.batches.samples_per_step))


def train(judge: Judge, name: str, max_lr: float, steps: int) -> dict[str, Any]:
    """The case's schedule with peaks at `max_lr`, over so many steps, on the user's training split."""
    schedule = make_schedule(judge.config, judge.inputs.steps_per_epoch, steps, max_lr)
    points = {*log_points(steps, max(1, steps // 20)), *schedule.troughs()}
    return judge.short_curve(name, schedule, steps, points)


def regret(truth: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """How far a run's final and best held-out losses stay above the best that brute force reached, as shares of the gain."""
    if run["diverged"] or not run["losses"]:
        return {"final_regret": None, "best_regret": None, "diverged": True}
    share = (np.array(run["losses"]) - truth["best"]) / truth["gain"]
    return {"final_regret": float(share[-1]), "best_regret": float(share.min())}


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, medians and rates over the tests of one case; errors of conclusive tests only, as a user would act on no others."""
    sure = [record for record in records if record["verdict"] == "conclusive"]

    def values(key: str) -> list[float]:
        return [float(record[key]) for record in sure if record.get(key) is not None]

    def median(key: str) -> float | None:
        return statistics.median(values(key)) if values(key) else None

    def mean(key: str) -> float | None:
        return statistics.fmean(values(key)) if values(key) else None

    errors = values("ceiling_error")
    return {
        "tests": len(records),
        "conclusive": len(sure),
        "reasons": sorted({code for record in records for code in record["reasons"]}),
        "ceiling_bias": mean("ceiling_error"),
        "ceiling_error": statistics.median(map(abs, errors)) if errors else None,
        "ceiling_spread": statistics.stdev(errors) if len(errors) > 1 else None,
        "bracket_holds": mean("bracket_holds"),
        "bracket_decades": median("bracket_decades"),
        "exposure_bias": mean("exposure_error"),
        "exposure_error": statistics.median(map(abs, values("exposure_error"))) if values("exposure_error") else None,
        "exposure_holds": mean("exposure_holds"),
        "cost_steps": statistics.median(record["cost_steps"] for record in records) if records else None,
        "cost_share": median("cost_share"),
        "final_regret": median("final_regret"),
        "best_regret": median("best_regret"),
    }
