"""Cases with nothing to find: the right answer is "inconclusive", for the right reason. A conclusive one is the worst a test can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trials
from stage import Place, curve

from sdclr.data import pairs
from sdclr.data.batches import Inputs
from sdclr.data.pairs import Split
from sdclr.engine.loop import TrainState
from sdclr.engine.run import Run

NO_GAIN = ("no_gain",)
MOST, FEW = 1000, 200
"""Steps that a reference arm may take at most where the model moves, and where it cannot."""


@dataclasses.dataclass(frozen=True)
class Null:
    """`right` are the reasons any of which is the right one."""

    name: str
    right: tuple[str, ...]
    test: Callable[[Place, int, dict[str, Any]], dict[str, Any]]


def strangers(place: Place, seed: int, truth: dict[str, Any]) -> dict[str, Any]:
    """The held-out pictures are another subject's, with captions that belong to none of them."""

    def swapped(inputs: Inputs) -> Inputs:
        held = tuple(pairs.find(place.folder / "strangers"))[: len(inputs.split.validation)]
        return dataclasses.replace(inputs, split=Split(inputs.split.train, held))

    return trials.range_test(place, seed, f"null-strangers-{seed}", [f"range_test.max_steps={MOST}"], inputs_of=swapped)


def frozen(place: Place, seed: int, truth: dict[str, Any]) -> dict[str, Any]:
    """An optimizer without effect: every rate acts on nothing."""

    def still(run: Run) -> None:
        fresh = run.fresh_state

        def without_effect() -> TrainState:
            state = fresh()
            state.optimizer.step = lambda *args, **kwargs: None  # type: ignore[method-assign]
            return state

        run.fresh_state = without_effect  # type: ignore[method-assign]

    return trials.range_test(place, seed, f"null-frozen-{seed}", [f"range_test.max_steps={FEW}"], prepare=still)


def tiny_rates(place: Place, seed: int, truth: dict[str, Any]) -> dict[str, Any]:
    """A grid four to six decades below the ceiling."""
    top = (truth["ceiling"] or truth["screen_top"]) / 1e4
    extra = [f"range_test.lr=[{top / 100:.3g}, {top:.3g}]", f"range_test.max_steps={FEW}"]
    return trials.range_test(place, seed, f"null-tiny-rates-{seed}", extra)


def learned(place: Place, seed: int, truth: dict[str, Any]) -> dict[str, Any]:
    """The base has already been trained on all of the user's pictures, to twice S*."""
    folder = place.folder / "learned"

    def base() -> Path:
        if (folder / "model_index.json").exists():
            return folder
        lr = (truth["ceiling"] or truth["screen_top"] / 10) / 4
        steps = max(1, min(2 * MOST, round(2 * truth["best_exposure"] / lr)))
        loaded, inputs = place.load(0, ["validation.fraction=0"])
        run = Run(loaded.config, inputs)
        curve(run, "learned", lambda step: lr, steps, (), lambda exposure, losses: False, lambda: 0.0)
        run.parts.save_pipeline(folder)
        return folder

    return trials.range_test(place, seed, f"null-learned-{seed}", [f"range_test.max_steps={MOST}"], base=base)


NULLS = [
    Null("another subject's pictures", NO_GAIN, strangers),
    Null("optimizer without effect", NO_GAIN, frozen),
    Null("rates far too small", ("no_gain", "edge", "grid_top"), tiny_rates),
    Null("subject already learned", (*NO_GAIN, "low_edge"), learned),
]


def run(null: Null, place: Place, seed: int, truth: dict[str, Any]) -> dict[str, Any]:
    """One test, and whether it said the right thing."""
    result = null.test(place, seed, truth)
    codes = [reason["code"] for reason in result["reasons"]]
    inconclusive = result["verdict"] == "inconclusive"
    return {
        "null": null.name,
        "seed": seed,
        "inconclusive": inconclusive,
        "right_reason": inconclusive and bool(set(codes) & set(null.right)),
        "reasons": codes,
        "texts": [reason["text"] for reason in result["reasons"]],
    }
