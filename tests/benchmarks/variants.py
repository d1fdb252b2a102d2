"""What moves the answer, and what limits it: the same range tests, on the same seeds and splits, with one setting changed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import trials
from stage import Place

ONE_FIFTH = "range_test.fraction=0.2"
VARIANTS: dict[str, tuple[str, ...]] = {
    "nothing": (ONE_FIFTH,),
    "twice the arms": (ONE_FIFTH, "range_test.arms_per_decade=8"),
    "arms twice as long": (ONE_FIFTH, "range_test.test_exposure=1"),
    "two fifths held out": (),
    "four times the draws": (ONE_FIFTH, "validation.timesteps_per_image=64"),
    "two training seeds": (ONE_FIFTH, "range_test.seeds=2"),
    "three splits": (ONE_FIFTH, "range_test.folds=3"),
}
"""All start from what was the default before this table showed that two fifths are better."""


def run(name: str, place: Place, seed: int, truth: dict[str, Any]) -> dict[str, Any]:
    """One changed test against the truth, and by how many decades its ceiling lies from that of the unchanged one."""
    changed = VARIANTS[name]
    plain, result = (
        trials.range_test(place, seed, f"variant-{each.replace(' ', '-')}-{seed}", VARIANTS[each])
        for each in ("nothing", name)
    )
    loaded, inputs = place.load(seed, changed)
    record = {"variant": name, **trials.against(truth, result, loaded.config, inputs)}
    if result["verdict"] == plain["verdict"] == "conclusive":
        record["moved"] = math.log10(result["ceiling"]["lr"] / plain["ceiling"]["lr"])
    if plain["cost"]["train_steps"]:
        record["times_the_cost"] = record["cost_steps"] / trials.steps_of(plain, inputs)
    return record


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As of the unchanged tests, with the median move of the ceiling (decades, without its sign) and the median cost."""
    moves = [abs(record["moved"]) for record in records if "moved" in record]
    costs = [record["times_the_cost"] for record in records if "times_the_cost" in record]
    return trials.summary(records) | {
        "moved": statistics.median(moves) if moves else None,
        "times_the_cost": statistics.median(costs) if costs else None,
    }
