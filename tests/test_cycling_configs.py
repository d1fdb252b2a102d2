"""The published experiments as shipped configs: every file plans, and its curve is the published one, written out here once more."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from sdclr.config import source
from sdclr.engine.plan import Plan, make_plan, read_inputs
from sdclr.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs" / "cycling").glob("*.yaml"))
TOP = 1.13e-6


def plan_of(name: str, *overrides: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, float]:
    """The plan of one config at the published SD 1.5 rate, and its steps an epoch."""
    monkeypatch.chdir(ROOT)
    loaded = source.load(Path("configs/cycling") / f"{name}.yaml", overrides)
    inputs = read_inputs(loaded)
    return make_plan(loaded, inputs), inputs.steps_per_epoch


def triangle(step: int, step_size: float, top: float) -> float:
    """Smith 2017, section 3.1: cycle = ⌊1 + i/(2·s)⌋, x = |i/s − 2·cycle + 1|, rate = top·max(0, 1 − x)."""
    cycle = math.floor(1 + step / (2 * step_size))
    return top * max(0.0, 1 - abs(step / step_size - 2 * cycle + 1))


def cosine(step: int, decay: int, warmup: int, top: float) -> float:
    """diffusers at the time of the experiments: no clamp after the end of the decay."""
    if step < warmup:
        return top * step / max(1, warmup)
    return top * max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, decay - warmup))))


def test_the_published_runs_are_all_there():
    assert {p.stem for p in CONFIGS} == {
        "all-images-constant", "all-images-everydream", "all-images", "constant", "decayed", "decayed-everydream",
        "ten-epochs", "ten-epochs-everydream", "two-epochs", "two-epochs-everydream",
    }  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_plans_on_the_embedded_pictures(path, monkeypatch):
    plan, _ = plan_of(path.stem, monkeypatch=monkeypatch)
    assert plan.steps in (550, 650, 800)
    assert plan.exposure > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_one_override_brings_a_config_to_the_published_rate(path, monkeypatch):
    rate = TOP / 2 if "constant" in path.stem else TOP
    plan, per_epoch = plan_of(path.stem, f"schedule.max_lr={rate}", monkeypatch=monkeypatch)
    blind = path.stem.startswith(("all-images", "decayed"))
    assert per_epoch == (5 if blind else 4)
    assert plan.schedule.rates().max() == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("name", "step_size"), [("ten-epochs", 40), ("two-epochs", 8)])
def test_the_cycling_runs_equal_smiths_formula_and_end_low(name, step_size, monkeypatch):
    plan, _ = plan_of(name, f"schedule.max_lr={TOP}", monkeypatch=monkeypatch)
    expected = [triangle(i, step_size, TOP) for i in range(800)]
    assert plan.schedule.rates() == pytest.approx(expected, rel=1e-12, abs=1e-12 * TOP)
    assert len(plan.schedule.troughs()) == 800 // (2 * step_size)
    assert plan.schedule(800) == pytest.approx(0, abs=1e-12 * TOP)
    assert plan.exposure == pytest.approx(800 * TOP / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "decay", "warmup", "steps"),
    [
        ("ten-epochs-everydream", 40, 0, 800),
        ("two-epochs-everydream", 8, 0, 800),
        ("all-images-everydream", 50, 1, 550),
    ],
)
def test_the_everydream_runs_equal_diffusers_cosine(name, decay, warmup, steps, monkeypatch):
    import torch
    from diffusers.optimization import get_cosine_schedule_with_warmup

    plan, _ = plan_of(name, f"schedule.max_lr={TOP}", monkeypatch=monkeypatch)
    rates = plan.schedule.rates()
    assert len(rates) == steps
    assert rates == pytest.approx([cosine(i, decay, warmup, TOP) for i in range(steps)], rel=1e-12, abs=1e-12 * TOP)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=TOP)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, decay)
    for rate in rates:
        assert theirs.get_last_lr()[0] == pytest.approx(rate, rel=1e-12, abs=1e-12 * TOP)
        optimizer.step(), theirs.step()


def test_the_quirk_of_one_warm_up_step_ends_the_run_where_the_published_one_ended(monkeypatch):
    plan, _ = plan_of("all-images-everydream", f"schedule.max_lr={TOP}", monkeypatch=monkeypatch)
    assert plan.schedule(549) == pytest.approx(0.5 * TOP * (1 + math.cos(math.pi * 548 / 49)), rel=1e-12)
    assert plan.schedule(549) == pytest.approx(9.15e-8, rel=1e-3)
    assert plan.exposure == pytest.approx(3.05e-4, rel=3e-3)


def test_the_everydream_cycling_runs_peak_ten_and_fifty_times_and_end_at_a_peak(monkeypatch):
    for name, peaks in (("ten-epochs-everydream", 10), ("two-epochs-everydream", 50)):
        plan, _ = plan_of(name, f"schedule.max_lr={TOP}", monkeypatch=monkeypatch)
        rates = plan.schedule.rates()
        assert int(np.isclose(rates, TOP, rtol=1e-12, atol=0).sum()) == peaks
        assert plan.schedule(800) == pytest.approx(TOP, rel=1e-12)
        with pytest.raises(ConfigError, match="ends near its peak"):
            plan_of(name, "schedule.allow_peak_end=false", monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("decayed", lambda i: triangle(i + 50, 50, TOP)), ("decayed-everydream", lambda i: cosine(i, 50, 0, TOP))],
)
def test_the_decayed_run_drops_to_a_half_and_a_quarter_at_its_phases_and_ends_low(name, shape, monkeypatch):
    plan, _ = plan_of(name, f"schedule.max_lr={TOP}", monkeypatch=monkeypatch)
    scale = [1.0 if i < 300 else 0.5 if i < 500 else 0.25 for i in range(650)]
    expected = [scale[i] * shape(i) for i in range(650)]
    assert plan.schedule.rates() == pytest.approx(expected, rel=1e-11, abs=1e-12 * TOP)
    assert plan.exposure == pytest.approx(2.47e-4, rel=2e-3)


@pytest.mark.parametrize(
    ("start", "cycles", "low"), [("low", 5, True), ("low", 5.5, False), ("peak", 5, False), ("peak", 5.5, True)]
)
def test_whole_cycles_end_low_from_below_and_half_cycles_from_the_peak(start, cycles, low, monkeypatch):
    settings = [f"schedule.start={start}", f"train.steps={round(100 * cycles)}"]
    if low:
        plan, _ = plan_of("all-images", *settings, monkeypatch=monkeypatch)
        assert plan.schedule(plan.steps) == pytest.approx(0, abs=1e-12)
        assert plan.schedule(plan.steps - 1) == pytest.approx(plan.schedule.max_lr / 50, rel=1e-9)
    else:
        with pytest.raises(ConfigError, match="ends near its peak"):
            plan_of("all-images", *settings, monkeypatch=monkeypatch)


def test_the_decayed_run_at_the_multiple_its_comment_names_has_the_exposure_of_the_other(monkeypatch):
    decayed, _ = plan_of("decayed", monkeypatch=monkeypatch)
    other, _ = plan_of("all-images", monkeypatch=monkeypatch)
    assert 1.2587 * decayed.exposure == pytest.approx(other.exposure, rel=1e-3)
