"""The long explanation: from result.json alone, with its numbers, for whatever could be found out."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sdclr.report import explain

RESULT: dict[str, Any] = {
    "verdict": "conclusive",
    "reasons": [],
    "gain": {"mean": 0.12, "low": 0.08, "high": 0.16, "agreement": 1.0, "images": 4, "base_loss": 0.2},
    "reference": {"lr": 2e-5, "steps": 400},
    "best_exposure": {"value": 0.004, "interval": [0.003, 0.006], "lr": 2e-5},
    "ceiling": {"lr": 1.5e-4, "bracket": [1e-4, 2e-4]},
    "recommended": {"policy": "triangular", "base_lr": 0.0, "max_lr": 7.5e-5, "steps": 107, "cycles": 4.0},
    "arms": [
        {"lr": 1e-4, "excess": 0.02, "low": -0.03, "high": 0.07, "verdict": "admissible"},
        {"lr": 2e-4, "excess": 0.31, "low": 0.2, "high": 0.42, "verdict": "inadmissible"},
        {"lr": 4e-4, "excess": None, "low": None, "high": None, "verdict": "inadmissible"},
    ],
}


def text_of(**changes: Any) -> str:
    return " ".join(f"{title}. {text}" for title, text in explain.range_test({**copy.deepcopy(RESULT), **changes}))


@pytest.mark.parametrize(
    "said",
    [
        "4 held-out pictures", "lowers that loss by 60.0%", "40.0% to 80.0% possible", "about 200 steps at that rate, or 100 at twice",
        "between 0.003 and 0.006", "3 arms at constant rates from 0.0001 to 0.0004", "0.0001: +2% (-3% to +7%), admissible", "0.0004 broke the model",
        "above 0.0001", "below 0.0002", "0.00015 is where", "4 cycles between 0 and 7.5e-05", "107 steps",
    ],
)  # fmt: skip
def test_it_says_this_runs_own_numbers(said):
    assert said in text_of()


def test_without_an_answer_it_ends_with_the_reasons_and_recommends_nothing():
    reason = {"code": "no_gain", "text": "the images gain nothing", "remedy": "hold out more"}
    text = text_of(verdict="inconclusive", reasons=[reason], recommended=None, ceiling=None, arms=[])
    assert "the images gain nothing. What would help: hold out more." in text
    assert "What follows" not in text and "The ceiling" not in text


def test_of_a_test_that_was_stopped_at_once_only_the_reason_is_left():
    nothing = {"gain": None, "reference": None, "best_exposure": None, "ceiling": None, "recommended": None, "arms": []}
    text = text_of(**nothing, reasons=[{"code": "stopped", "text": "stopped", "remedy": "go on"}])
    assert text == "Why there is no answer. stopped. What would help: go on."
