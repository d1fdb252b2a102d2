"""The cycling study itself: schedules that are fair to one another, sound pairs, and one small pass through everything."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """tests/benchmarks/study.py as a module."""
    spec = importlib.util.spec_from_file_location("study", FOLDER / "study.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module
    spec.loader.exec_module(module)
    return module


def row(schedule: str, seed: int, end: float | None, factor: float = 1.0) -> dict:
    base, end_ = {"truth": 1.0}, None if end is None else {"truth": end}
    return {
        "schedule": schedule,
        "seed": seed,
        "fold": 0,
        "factor": factor,
        "peak": 1.0,
        "steps": 9,
        "base": base,
        "end": end_,
    }


@pytest.mark.parametrize("mean_rate", [2e-5, 1e-4, 7.3e-4])
def test_all_schedules_have_the_same_steps_and_the_same_exposure(study, mean_rate):
    found = study.schedules(0.014, mean_rate, (1, 2, 4, 8, 25))
    assert list(found) == [
        "constant", "linear to zero", "1 cycle", "2 cycles", "4 cycles", "8 cycles", "25 cycles", "groups 3 + 2 + 1.5",
    ]  # fmt: skip
    assert len({s.steps for s in found.values()}) == 1
    for schedule in found.values():
        assert schedule.rates().sum() == pytest.approx(0.014, rel=1e-12)
        assert (schedule.policy == "triangular" and schedule.step_size < 2) or not schedule.ends_near_peak


def test_a_pair_shares_seed_split_and_rate_and_the_difference_is_a_share_of_the_gain(study):
    rows = [row(name, seed, end) for name, ends in (("constant", (0.5, 0.6, 0.4)), ("linear to zero", (0.49, 0.58, 0.41))) for seed, end in enumerate(ends)]  # fmt: skip
    constant, linear = study.study_report.paired(rows)
    shares = np.array([-0.01, -0.02, 0.01]) / 0.5
    assert linear["difference"] == pytest.approx(shares.mean())
    assert linear["half"] == pytest.approx(4.302653 * shares.std(ddof=1) / 3**0.5, rel=1e-5)
    assert (linear["better"], linear["pairs"], linear["diverged"]) == (2, 3, 0)
    assert constant["difference"] == 0


def test_a_run_that_diverged_makes_no_pair_and_is_counted(study):
    rows = [row("constant", s, 0.5) for s in (0, 1)] + [row("4 cycles", 0, None), row("4 cycles", 1, 0.4)]
    cycles = study.study_report.paired(rows)[1]
    assert (cycles["pairs"], cycles["diverged"]) == (1, 1)
    assert "1 of 1" in study.study_report._schedule_table([cycles], ("x", lambda line: "1"))


def test_a_small_study_runs_writes_its_tables_and_is_not_run_twice(study, model, tmp_path, monkeypatch):
    scale = study.Scale(
        seeds=(1,), folds=(0, 1), decays=(0.0, 0.9), factors=(1.0,), cycles=(1,), sizes=(17,), size_sets=(0,), replays=("all-images", "constant"),
        rates=(1.0,), rungs=(1, 2), prior=4, prior_rungs=(1,), truth=6, draws=2, prompts=2, pictures=2, sampler_steps=2,
    )  # fmt: skip
    arguments = ["--base", str(model), "--ceiling", "1e-3", "--best-exposure", "4e-3", "--workers", "1", "--build", str(tmp_path / "build"),
                 "--results", str(tmp_path / "results"), "--set", "train.steps=40", "--set", "train.kappa=1"]  # fmt: skip
    results = study.main(arguments, scale)
    record = json.loads((results / "study.json").read_text())
    assert len(record["schedules"]) == 2 * 4
    assert {r["steps"] for r in record["schedules"]} == {8}
    assert [r["steps"] for r in record["replays"]] == [[0, 20, 40], [0, 20, 40]]
    assert [r["step"] for r in record["ladder"]] == [0, 4, 8]
    assert [r["kappa"] for r in record["ladder"]] == pytest.approx([0, 0.5, 1.0])
    assert [(r["fold"], r["prior"], r["step"]) for r in record["prior"]] == [
        (fold, prior, step) for fold in (0, 1) for prior in (False, True) for step in (0, 4)
    ]
    planned = [(r["schedule"], r["fold"], r["steps"], r["factor"]) for r in record["planned"]]
    names = ("constant", "linear to zero", "1 cycle", "2 cycles", "4 cycles")
    assert planned == [(name, fold, 16, 0.5) for fold in (0, 1) for name in names]
    ends = {(r["schedule"], r["fold"]): r["end"]["truth"] for r in record["averages"]}
    ways = ("", ", EMA 0", ", EMA 0.9")
    assert [name for name, fold in ends if fold == 1] == [
        *(f"{name}{way}" for name in ("constant", "linear to zero", "4 cycles") for way in ways), "4 cycles, mean of the troughs",
    ]  # fmt: skip
    for name, fold in ends:  # an average that forgets at once is the last weights
        if name.endswith(", EMA 0"):
            assert ends[name, fold] == pytest.approx(ends[name.removesuffix(", EMA 0"), fold], rel=1e-6)
    text = (results / "study.md").read_text()
    for name in ("schedules.png", "ladder.png", "ladder-grid.png", "prior-grid.png", "published.png", "replays.png"):
        assert name in text
        assert Image.open(results / name).width > 0

    def never(*_):
        raise AssertionError("a finished arm was run again")

    from sdclr.engine.arms import Bench

    monkeypatch.setattr(Bench, "_run", never)
    monkeypatch.setattr(study, "climb", never)
    monkeypatch.setattr(study, "averaged", never)
    again = study.Study(scale, str(model), tmp_path / "build", 1e-3, 4e-3, ("train.steps=40", "train.kappa=1"))
    jobs = [
        job
        for part in ("schedules", "planned", "averages", "ladder", "prior", "replays")
        for job in study.PARTS[part].jobs(again)
    ]
    rows = study.run_jobs(again, jobs, workers=1)
    assert rows == {part: record[part] for part in rows}


def test_a_call_for_some_parts_keeps_what_an_earlier_one_found(study):
    of = {"ceiling": 1e-4, "best_exposure": 0.02}
    scale = {"base": "tiny", "measured": dict.fromkeys(study.PARTS, of)}
    empty: dict = {part: [] for part in study.PARTS}
    earlier = scale | empty | {"schedules": [row("constant", 1, 0.5), row("constant", 1, 0.5, factor=2.0)]}
    record = scale | empty | {"schedules": [row("constant", 1, 0.4)], "sizes": [row("linear", 1, 0.3)]}
    merged = study.with_earlier(record, earlier)
    assert [(r["factor"], r["end"]["truth"]) for r in merged["schedules"]] == [(1.0, 0.4), (2.0, 0.5)]
    assert merged["sizes"] == record["sizes"]
    other = record | {"measured": dict.fromkeys(study.PARTS, of | {"ceiling": 2e-4})}
    assert study.with_earlier(other, earlier)["schedules"] == record["schedules"]
    assert study.with_earlier(record | {"base": "other"}, earlier)["schedules"] == record["schedules"]
    unasked = other | {"schedules": []}
    kept = study.with_earlier(unasked, earlier)
    assert (kept["schedules"], kept["measured"]["schedules"]) == (earlier["schedules"], of)
    assert kept["measured"]["sizes"] == other["measured"]["sizes"]
