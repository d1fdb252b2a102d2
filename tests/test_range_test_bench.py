"""The bench's own arithmetic, on curves whose truth is known: what it reads off brute force, and the readings of other finders."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdclr.config import source

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import cases
import nulls
import pictures
import range_test_accuracy
import rivals
import tables
import trials
import truth
import variants

BEST, CEILING = 2e-4, 2e-5


def curve(lr: float, span: float = 3 * BEST) -> dict[str, Any]:
    """Lowest at S*, 20 % below a base of 1; above the slow rates a share of the gain is lost, a tenth of it at the ceiling."""
    exposure = np.geomspace(span / 30, span, 14)
    losses = 0.8 + 0.02 * np.log(exposure / BEST) ** 2 + 0.02 * (lr / CEILING) ** 2
    return {"exposure": exposure.tolist(), "losses": losses.tolist(), "diverged": False}


def found(rates: list[float]) -> dict[str, Any]:
    return truth.analyse(1.0, [(lr, [curve(lr), curve(lr)]) for lr in rates], 3 * BEST)


def test_the_truth_is_read_off_curves_that_know_it() -> None:
    t = found([1e-6 * 10 ** (i / 4) for i in range(9)])
    assert t["ceiling"] == pytest.approx(CEILING, rel=0.15)
    assert t["bracket"][0] <= CEILING <= t["bracket"][1]
    assert t["best_exposure"] == pytest.approx(BEST * np.exp(-np.sqrt(0.2)), rel=0.05)  # 0.02 · ln² = 0.02 · 0.2
    assert t["lowest_at"] == pytest.approx(BEST, rel=0.15)
    assert t["flat"][0] <= BEST * 1.3 and t["flat"][1] >= BEST / 1.3
    assert t["gain"] == pytest.approx(0.2, rel=0.02)


def test_a_grid_that_ends_below_the_ceiling_has_none() -> None:
    t = found([1e-7, 3e-7, 1e-6])
    assert t["ceiling"] is None and t["bracket"] == [1e-6, None]


def test_a_rate_that_diverged_with_one_seed_is_above_the_ceiling() -> None:
    broken = {"exposure": [], "losses": [], "diverged": True}
    t = truth.analyse(1.0, [(1e-6, [curve(1e-6)]), (1e-5, [broken])], 3 * BEST)
    assert t["bracket"] == [1e-6, 1e-5]


def test_errors_are_in_decades_and_only_conclusive_tests_count() -> None:
    t = found([1e-6 * 10 ** (i / 4) for i in range(9)])
    sure = {"verdict": "conclusive", "reasons": [], "ceiling_error": 0.5, "bracket_holds": True, "cost_steps": 100.0}
    unsure = {"verdict": "inconclusive", "reasons": ["edge"], "ceiling_error": 3.0, "cost_steps": 300.0}
    s = trials.summary([sure, unsure])
    assert (s["conclusive"], s["tests"], s["ceiling_error"], s["bracket_holds"]) == (1, 2, 0.5, 1.0)
    assert s["cost_steps"] == 200.0
    run = {"losses": [0.9, t["best"] + 0.1 * t["gain"]], "diverged": False}
    assert trials.regret(t, run)["final_regret"] == pytest.approx(0.1)
    assert "1/2" in tables.tests([{"case": "made up", "summary": s}])


def test_finders_read_a_valley_where_it_is() -> None:
    lrs = list(np.geomspace(1e-7, 10, 100))
    depth = [1 / (1 + np.exp(-2 * (np.log10(lr) + 3))) for lr in lrs]  # falls around 1e-3
    losses = [1 - 0.9 * d + 5 * max(0.0, np.log10(lr) + 0.5) ** 2 for d, lr in zip(depth, lrs, strict=True)]
    valley, steep = rivals.fastai(lrs, losses)
    assert 1e-6 < valley < 1 and 1e-6 < steep < 10
    assert lrs[10] <= rivals.lightning(lrs, losses) <= 10


def test_smoothing_stops_at_what_is_not_finite_and_at_four_times_the_best() -> None:
    assert len(rivals.smoothed([1.0, 1.0, float("nan"), 1.0])) == 2
    assert len(rivals.smoothed([1.0] + [1e6] * 5)) == 2
    assert rivals.smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])


@pytest.mark.parametrize("subject", ["mochi", "style", "object"])
def test_a_case_has_pictures_enough_all_with_captions_of_their_own(subject: str) -> None:
    pictures = cases._pictures(subject, 20 + cases.HELD_OUT)
    assert len({caption for _, caption in pictures}) == len(pictures) == 84


def test_the_cases_user_has_the_demos_pictures() -> None:
    own = [caption for _, caption in cases._pictures("mochi", 84)[:20]]
    demo = [p.read_text().strip() for p in sorted((cases.ROOT / "data" / "mochi").glob("*.txt"))]
    assert own == demo


def test_each_variant_changes_one_setting_of_the_unchanged_test_and_that_is_taken() -> None:
    unchanged = {*variants.VARIANTS["nothing"]}
    taken = {
        name: source.load(cases.ROOT / "configs" / "demo.yaml", settings).config
        for name, settings in variants.VARIANTS.items()
    }
    assert all(len(unchanged ^ {*settings}) == (name != "nothing") for name, settings in variants.VARIANTS.items())
    assert len(set(map(repr, taken.values()))) == len(taken)


def test_one_small_pass_through_everything(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nulls, "MOST", 8)
    monkeypatch.setattr(nulls, "FEW", 4)
    monkeypatch.setattr(cases, "HELD_OUT", 4)
    few = ("nothing", "two fifths held out")  # of all seven a test of minutes
    monkeypatch.setattr(variants, "VARIANTS", {name: variants.VARIANTS[name] for name in few})
    settings = ("range_test.max_steps=32", "validation.timesteps_per_image=2")
    case = cases.Case("mochi", pictures=10, overrides=settings, base=model, in_depth=True)
    effort = truth.Effort(per_decade=2, rates=3, seeds=2, cap=8, points=4)
    depth = range_test_accuracy.Depth(1, effort, (6,), (2,), 1, True, 1, 1)
    result = tmp_path / "results" / "mochi.json"
    parts = ["tests", "rivals", "nulls", "variants"]
    found = range_test_accuracy.run_case(case, tmp_path / "work", depth, parts, result)
    assert {record["null"] for record in found["nulls"]} == {null.name for null in nulls.NULLS}
    assert [record["variant"] for record in found["variants"]] == list(few)
    assert "Prodigy" in [record["rival"] for record in found["rivals"]]
    assert all(record["verdict"] != "crashed" for record in (*found["tests"], *found["variants"]))
    assert not any("crashed" in record["reasons"] for record in found["nulls"])
    assert "### Nulls" in tables.everything([found])
    assert Image.open(io.BytesIO(pictures.accuracy([found]))).width > 1200
    pieces = result.with_suffix(".jsonl")
    finished = pieces.stat().st_mtime_ns
    again = range_test_accuracy.run_case(case, tmp_path / "work", depth, parts, result)
    assert again["truth"] == found["truth"] and again["tests"] == found["tests"]
    assert pieces.stat().st_mtime_ns == finished
