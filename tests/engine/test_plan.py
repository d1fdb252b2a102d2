"""What a run will do, worked out from config and folder alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from sdclr.config.source import LoadedConfig, load
from sdclr.data.batches import Inputs
from sdclr.engine.answer import with_run
from sdclr.engine.fingerprint import changed, fingerprint
from sdclr.engine.plan import Plan, make_plan, read_inputs
from sdclr.engine.telling import cautions, describe
from sdclr.errors import ConfigError, DataError, InputError

BASE = {
    "run": "{name: a, output_dir: runs, seed: 3}",
    "model": "{base: base}",
    "data": "{images: images, resolution: 32}",
    "batch": "{size: 4}",
    "schedule": "{policy: triangular, max_lr: 1.0e-3, cycles: 4}",
    "train": "{steps: 80}",
}
Write = Callable[..., LoadedConfig]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """write(section="{...}") -> loaded config over 20 pictures (16 to train on, 4 held out) and a stand-in for a model."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for i in range(20):
        Image.fromarray(np.full((32, 32, 3), 5 * i, dtype=np.uint8)).save(f"images/{i:02d}.png")
    Path("base/unet").mkdir(parents=True)
    Path("base/unet/x.safetensors").write_bytes(bytes(range(256)))

    def run(**sections: str) -> LoadedConfig:
        Path("c.yaml").write_text("".join(f"{name}: {value}\n" for name, value in (BASE | sections).items()))
        return load("c.yaml")

    return run


def plan_of(loaded: LoadedConfig) -> Plan:
    return make_plan(loaded, read_inputs(loaded))


def save_range_test(loaded: LoadedConfig, run: str = "a", when: int | None = None, **result: Any) -> Path:
    """A range test's result as the command writes it, for this config and its images."""
    path = Path("runs") / run / "range-test" / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "schema": 1, "verdict": "conclusive", "reasons": [], "best_exposure": {"value": 0.02, "interval": [0.01, 0.03]},
        "ceiling": {"lr": 1e-3, "bracket": [9e-4, 2e-3]}, "recommended": {"base_lr": 0.0, "max_lr": 5e-4, "steps": 80, "cycles": 4}, "fingerprint": fingerprint(loaded.config, read_inputs(loaded)),
    } | result  # fmt: skip
    path.write_text(json.dumps(found))
    if when is not None:
        os.utime(path, (when, when))
    return path


AUTO = {"schedule": "{policy: triangular, cycles: 4}", "train": "{steps: auto}"}


def problem(call: Callable[[], Any], kind: type[InputError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_epochs_and_cycles_become_steps(write: Write) -> None:
    plan = plan_of(write(train="{steps: 10 epochs}", validation="{every: 1 epoch}", checkpoint="{every: 2.5 epochs}"))
    assert (plan.steps, plan.validate_every, plan.save_every) == (40, 4, 10)
    assert plan.schedule.step_size == 5
    assert plan.schedule.troughs() == [10, 20, 30, 40]
    assert plan.source is None


def test_a_run_of_more_steps_than_anybody_means_is_refused(write: Write) -> None:
    loaded = write(train="{steps: 9000000 epochs}", schedule="{policy: constant, max_lr: 1.0e-5}")
    with pytest.raises(ConfigError, match="optimizer steps; at most 10,000,000"):
        make_plan(loaded, read_inputs(loaded))


def test_smiths_rule_of_epochs_gives_the_half_cycle(write: Write) -> None:
    plan = plan_of(
        write(schedule="{policy: triangular, max_lr: 1e-3, step_size: 10 epochs}", train="{steps: 200 epochs}")
    )
    assert (plan.steps, plan.schedule.step_size, plan.schedule.cycles) == (800, 40, 10)


def test_groups_set_the_number_of_cycles(write: Write) -> None:
    schedule = "{policy: triangular, max_lr: 1e-3, start: peak, groups: [{cycles: 3}, {cycles: 2, scale: 0.5}, {cycles: 1.5, scale: 0.25}]}"
    plan = plan_of(write(schedule=schedule, train="{steps: 130}"))
    assert plan.schedule.step_size == 10
    assert plan.schedule(60) == pytest.approx(5e-4)


@pytest.mark.parametrize(("step_size", "warmup"), [(50, 1), (40, 0), (8, 0), (100, 2), (49, 0)])
def test_everydreams_automatic_warm_up_is_a_fiftieth_of_its_step_size(
    write: Write, step_size: int, warmup: int
) -> None:
    plan = plan_of(
        write(
            schedule=f"{{policy: everydream, max_lr: 1.13e-6, step_size: {step_size}, warmup: auto, allow_peak_end: true}}",
            train="{steps: 550}",
        )
    )
    assert plan.schedule.warmup == warmup
    assert plan.schedule.start == "peak"
    if step_size == 50:
        assert plan.schedule(549) == pytest.approx(9.15e-8, rel=5e-3)


def test_a_plan_that_ends_near_the_peak_is_refused_at_the_schedule_unless_accepted(write: Write) -> None:
    schedule = "{policy: triangular, max_lr: 1e-3, cycles: 5.5}"
    found = problem(lambda: plan_of(write(schedule=schedule, train="{steps: 110}")))
    assert found == (
        "c.yaml:5:1: schedule ends near its peak: the last step would be at 0.0009 of 0.001; "
        "110 steps are 5.5 cycles of 20 steps that start low; give it a whole number of cycles"
    )
    assert plan_of(
        write(schedule=schedule[:-1] + ", allow_peak_end: true}", train="{steps: 110}")
    ).schedule.ends_near_peak


def test_everydreams_end_is_told_in_the_cycles_that_its_warm_up_leaves(write: Write) -> None:
    found = problem(
        lambda: plan_of(
            write(schedule="{policy: everydream, max_lr: 1e-6, step_size: 50, warmup: 20}", train="{steps: 140}")
        )
    )
    assert "140 steps are 2 cycles of 60 steps that start peak" in found


@pytest.mark.parametrize(
    "schedule",
    [
        "{policy: triangular, max_lr: 1e-3, step_size: 7}", "{policy: triangular, max_lr: 1e-3, step_size: 7, start: peak}",
        "{policy: hann, max_lr: 1e-3, step_size: 2 epochs, start: peak}", "{policy: everydream, max_lr: 1e-3, step_size: 20, warmup: 3}",
        "{policy: triangular, max_lr: 1e-3, cycles: 4}", "{policy: triangular, max_lr: 1e-3, cycles: 3.5, start: peak}",
    ],
)  # fmt: skip
def test_automatic_steps_collect_the_best_exposure_and_end_at_a_trough(write: Write, schedule: str) -> None:
    loaded = write(schedule=schedule, train="{steps: auto}")
    save_range_test(loaded, best_exposure={"value": 0.1, "interval": [0.1, 0.1]})
    plan = plan_of(loaded)
    assert not plan.schedule.ends_near_peak
    assert plan.schedule(plan.steps) == pytest.approx(0, abs=2e-5)
    assert plan.kappa == pytest.approx(1, abs=0.08)
    assert plan.exposure == pytest.approx(sum(plan.schedule(step) for step in range(plan.steps)))


def test_kappa_multiplies_the_exposure(write: Write) -> None:
    once = write(schedule="{policy: constant}", train="{steps: auto}")
    save_range_test(once)
    plan = plan_of(once)
    twice = plan_of(write(schedule="{policy: constant}", train="{steps: auto, kappa: 2}"))
    assert plan.schedule.max_lr == 5e-4
    assert (plan.steps, twice.steps) == (40, 80)
    assert twice.kappa == pytest.approx(2)


def test_an_exposure_that_the_schedule_never_collects_is_an_input_error(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdclr.lr.exposure.MAX_STEPS", 5000)
    loaded = write(schedule="{policy: exp_range, max_lr: 1e-3, step_size: 7, gamma: 0.5}", train="{steps: auto}")
    save_range_test(loaded)
    assert "more than 5,000 steps" in problem(lambda: plan_of(loaded), InputError)


def test_a_measured_peak_below_the_troughs_is_an_input_error(write: Write) -> None:
    loaded = write(schedule="{policy: triangular, base_lr: 2e-3, cycles: 4}", train="{steps: auto}")
    save_range_test(loaded)
    assert "base_lr is 0.002, and half of the ceiling that was measured is 0.0005" in problem(
        lambda: plan_of(loaded), InputError
    )


def test_a_range_test_whose_schedule_cannot_follow_keeps_its_answer(write: Write, capsys) -> None:
    loaded = write(schedule="{policy: triangular, base_lr: 2e-3, cycles: 4}")
    answer = {"verdict": "conclusive", "ceiling": {"lr": 1e-3}, "best_exposure": {"value": 0.02}, "recommended": None}
    assert with_run(answer, loaded.config, read_inputs(loaded)) == answer
    assert "no run follows" in capsys.readouterr().err


def test_auto_without_a_range_test_names_the_command_that_makes_one(write: Write) -> None:
    with pytest.raises(InputError, match=r"schedule.max_lr and train.steps: auto needs a range test") as caught:
        plan_of(write(**AUTO))
    assert caught.value.hint == "measure it first: sdclr range-test c.yaml"


def test_the_newest_fitting_range_test_is_taken_and_the_runs_own_first(write: Write) -> None:
    loaded = write(**AUTO)
    old = save_range_test(loaded, "old", when=1000)
    assert plan_of(loaded).source == old
    new = save_range_test(loaded, "new", when=2000)
    assert plan_of(loaded).source == new
    save_range_test(loaded, "newer-but-other", when=3000, fingerprint={"model": "other"})
    assert plan_of(loaded).source == new
    own = save_range_test(loaded, "a", when=500)
    assert plan_of(loaded).source == own


def test_a_damaged_result_is_passed_over(write: Write) -> None:
    loaded = write(**AUTO)
    good = save_range_test(loaded, "good")
    save_range_test(loaded, "a").write_text("{")
    assert plan_of(loaded).source == good


def test_a_range_test_that_does_not_fit_is_named_with_what_differs(write: Write) -> None:
    save_range_test(write(**AUTO), "old")
    found = problem(lambda: plan_of(write(**AUTO, batch="{size: 2}")), InputError)
    assert "runs/old/range-test/result.json: differs in batch (4 there, 2 here)" in found


def test_an_inconclusive_range_test_decides_nothing_but_stops_nobody_who_decides_himself(write: Write) -> None:
    loaded = write(**AUTO)
    save_range_test(loaded, verdict="inconclusive", best_exposure=None, recommended=None)
    assert "was inconclusive" in problem(lambda: plan_of(loaded), InputError)
    plan = plan_of(write())
    assert plan.steps == 80
    assert plan.kappa is None


@pytest.mark.parametrize(
    "change",
    [
        {"model": "{base: base, train: [unet, text_encoder]}"}, {"data": "{images: images, resolution: 64}"}, {"data": "{images: images, resolution: 32, flip: true}"},
        {"batch": "{size: 4, accumulate: 2}"}, {"optimizer": "{weight_decay: 0.1}"}, {"loss": "{noise_offset: 0.05}"}, {"data": "{images: images, resolution: 32, caption: x}"},
    ],
)  # fmt: skip
def test_the_fingerprint_changes_with_what_the_answer_depends_on(write: Write, change: dict[str, str]) -> None:
    before, after = (fingerprint(loaded.config, read_inputs(loaded)) for loaded in (write(), write(**change)))
    assert before != after


def test_the_fingerprint_does_not_change_with_what_the_answer_does_not_depend_on(write: Write) -> None:
    before = fingerprint(write().config, read_inputs(write()))
    other = write(
        run="{name: b, seed: 9}", schedule="{policy: hann, cycles: 2}", train="{steps: 9}", sample="{steps: 3}"
    )
    assert fingerprint(other.config, read_inputs(other)) == before
    shutil.copytree("images", "elsewhere")
    shutil.copytree("base", "copy")
    moved = write(data="{images: elsewhere, resolution: 32}", model="{base: copy}")
    assert fingerprint(moved.config, read_inputs(moved)) == before


@pytest.mark.parametrize("victim", ["images/03.png", "base/unet/x.safetensors"])
def test_the_fingerprint_sees_one_changed_byte_of_a_picture_or_a_small_model(write: Write, victim: str) -> None:
    loaded = write()
    inputs = read_inputs(loaded)
    before = fingerprint(loaded.config, inputs)
    data = bytearray(Path(victim).read_bytes())
    data[-1] ^= 1
    Path(victim).write_bytes(data)
    assert fingerprint(loaded.config, inputs) != before


@pytest.mark.parametrize(
    "name",
    [
        "scheduler/scheduler_config.json", "model_index.json", "tokenizer/tokenizer.json", "text_encoder/config.json",
        "tokenizer_2/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
    ],
)  # fmt: skip
def test_the_fingerprint_sees_what_lies_beside_the_weights(write: Write, name: str) -> None:
    found = []
    for text in ("epsilon", "v_prediction"):
        file = Path("base") / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        found.append(fingerprint(write().config, read_inputs(write())))
    assert found[0] != found[1]
    assert found[0] | {"model_settings": ""} == found[1] | {"model_settings": ""}


def test_a_batch_larger_than_the_training_images_is_refused_at_its_cause(write: Write) -> None:
    assert problem(lambda: read_inputs(write(batch="{size: 21}"))).startswith(
        "c.yaml:4:9: batch.size leaves 16 images to train on, and a batch needs 21"
    )
    found = problem(lambda: read_inputs(write(batch="{size: 18}", validation="{fraction: 0.2}")))
    assert (
        found
        == "c.yaml:7:14: validation.fraction leaves 16 images to train on, and a batch needs 18; 4 of 20 are held out"
    )
    loaded = write(batch="{size: 18}")
    assert "a batch needs 18" in problem(lambda: read_inputs(loaded, processes=2))


@pytest.mark.parametrize(
    ("size", "processes", "fitting"), [(6, 4, "4 or 8"), (7, 2, "6 or 8"), (1, 2, "2"), (3, 8, "8")]
)
def test_a_batch_that_processes_cannot_share_evenly_is_refused_at_its_cause(
    write: Write, size: int, processes: int, fitting: str
) -> None:
    found = problem(lambda: read_inputs(write(batch=f"{{size: {size}}}"), 0, processes))
    assert found == (
        f"c.yaml:4:9: batch.size is {size}, which {processes} processes cannot share evenly; "
        f"take {fitting}, or another number of processes"
    )


def test_a_share_too_small_to_hold_one_image_out_is_refused(write: Write) -> None:
    found = problem(lambda: read_inputs(write(validation="{fraction: 0.02}")))
    assert (
        found == "c.yaml:7:14: validation.fraction of 20 images is none; raise it, or set 0 to train without validation"
    )
    assert read_inputs(write(validation="{fraction: 0}")).split.validation == ()


def test_one_picture_in_both_halves_is_refused_by_both_names(write: Write) -> None:
    inputs = read_inputs(write())
    held, trained = inputs.split.validation[0].path, inputs.split.train[0].path
    shutil.copy(held, trained)
    found = problem(lambda: read_inputs(write()), DataError)
    assert found == f"{trained} and {held} are the same picture, one to train on and one held out: remove one"


def test_the_same_picture_twice_in_one_half_is_allowed(write: Write) -> None:
    inputs = read_inputs(write())
    shutil.copy(inputs.split.train[0].path, inputs.split.train[1].path)
    assert len(read_inputs(write()).split.train) == 16


def test_processes_share_one_stream(write: Write) -> None:
    loaded = write(batch="{size: 4, accumulate: 2}")
    inputs = [read_inputs(loaded, rank, 2) for rank in range(2)]
    assert [i.steps_per_epoch for i in inputs] == [2.0, 2.0]
    seen = [s.index for step in range(2) for i in inputs for micro in i.batches(step) for s in micro]
    assert sorted(seen) == list(range(16))


def test_the_description_says_the_numbers_of_the_plan(write: Write) -> None:
    loaded = write(train="{steps: 20 epochs}")
    inputs: Inputs = read_inputs(loaded)
    rows = dict(describe(loaded.config, inputs, make_plan(loaded, inputs)))
    assert rows["images"] == "16 to train on, 4 held out"
    assert rows["batch"] == "4 samples a step; 4 steps an epoch"
    assert rows["steps"] == "80 (20 epochs)"
    assert rows["schedule"] == "triangular, 4 cycles of 20 steps, starting low"
    assert rows["learning rate"] == "0 to 0.001; the last step is at 0.0001"
    assert rows["exposure"] == "0.04"
    assert list(dict(describe(loaded.config, inputs, None))) == ["images", "captions", "batch"]


def test_changed_lists_every_dotted_key_that_differs() -> None:
    before = {"a": {"x": 1, "y": [1, 2]}, "b": 3, "gone": 1}
    after = {"a": {"x": 1, "y": [1, 3]}, "b": 4, "new": None, "c": {"d": 5}}
    found = changed(before, after)
    assert found == [("a.y", [1, 2], [1, 3]), ("b", 3, 4), ("gone", 1, None), ("c", None, {"d": 5})]
    assert changed(before, before) == []


SCHEDULES = [
    "{policy: triangular, cycles: 4}",
    "{policy: triangular, cycles: 3.5, start: peak}",
    "{policy: triangular, step_size: 10 epochs}",
    "{policy: triangular, groups: [{cycles: 3}, {cycles: 2, scale: 0.5}], base_lr: 1.0e-5}",
    "{policy: exp_range, gamma: 0.999, cycles: 2}",
    "{policy: linear, warmup: 7}",
    "{policy: constant, warmup: 3}",
    "{policy: everydream, cycles: 1.5, warmup: 4}",
    "{policy: hann, cycles: 2.3, allow_peak_end: true}",
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_printed_to_paste_is_the_run_that_auto_plans(write: Write, schedule: str) -> None:
    from sdclr.report import page

    loaded = write(schedule=schedule, train="{steps: auto, kappa: 1.3, early_stop: 9}")
    save_range_test(loaded)
    measured = {"verdict": "conclusive", "ceiling": {"lr": 1e-3}, "best_exposure": {"value": 0.02}}
    answer = with_run(measured, loaded.config, read_inputs(loaded))
    planned, given = plan_of(loaded), yaml.safe_load(page.snippet(answer))
    pasted = write(**{name: json.dumps(section) for name, section in given.items()})
    assert plan_of(pasted).schedule == planned.schedule
    assert (plan_of(pasted).steps, answer["recommended"]["steps"]) == (planned.steps, planned.steps)
    assert pasted.config.train.early_stop == 9


def test_kappa_is_of_a_conclusive_test_alone_and_one_beside_is_preferred_to_an_own_that_cannot_say(
    write: Write,
) -> None:
    loaded = write()
    save_range_test(loaded, verdict="inconclusive", best_exposure={"value": 0.02, "interval": [0.01, 0.03]})
    assert (plan_of(loaded).kappa, plan_of(loaded).source) == (None, None)
    save_range_test(loaded, run="beside")
    assert plan_of(loaded).kappa == pytest.approx(2, rel=0.05)
    assert str(plan_of(loaded).source).endswith("beside/range-test/result.json")


def test_a_constant_rate_is_said_as_one_number(write: Write) -> None:
    loaded = write(schedule="{policy: constant, max_lr: 1.0e-5}")
    rows = dict(describe(loaded.config, read_inputs(loaded), plan_of(loaded)))
    assert rows["learning rate"] == "1e-05; the last step is at 1e-05"


@pytest.mark.parametrize(
    ("steps", "cycles", "words"),
    [
        (20, 20, "collects no exposure: all of its 20 steps are at a rate of 0; 20 steps are 20 cycles of 1 steps"),
        (1, 4, "collects no exposure: all of its 1 steps are at a rate of 0; 1 step are"),
        (100, 50, "a cycle of less than 4 steps cannot rise and fall"),
        (3, 4, "ends near its peak: the last step would be at 0.000667 of 0.001"),
        (90, 30, "ends near its peak"),
    ],
)
def test_cycles_of_a_few_steps_that_train_nothing_or_end_high_are_refused(write: Write, steps, cycles, words) -> None:
    loaded = write(schedule=f"{{policy: triangular, max_lr: 1e-3, cycles: {cycles}}}", train=f"{{steps: {steps}}}")
    assert words in problem(lambda: plan_of(loaded))


@pytest.mark.parametrize(("steps", "cycles"), [(80, 20), (40, 3), (101, 4), (65, 8)])
def test_cycles_of_four_steps_and_more_are_planned(write: Write, steps: int, cycles: int) -> None:
    loaded = write(schedule=f"{{policy: triangular, max_lr: 1e-3, cycles: {cycles}}}", train=f"{{steps: {steps}}}")
    assert (plan_of(loaded).steps, plan_of(loaded).schedule.cycles) == (steps, pytest.approx(cycles))


def test_a_plan_far_beyond_what_was_measured_is_said(write: Write) -> None:
    loaded = write(schedule="{policy: triangular, cycles: 4}", train="{steps: auto}")
    save_range_test(loaded)
    assert cautions(loaded.config, plan_of(loaded)) == []
    fast = write(schedule="{policy: triangular, max_lr: 1.9, cycles: 4}", train="{steps: 80}")
    (said,) = cautions(fast.config, plan_of(fast))
    assert said.startswith("schedule.max_lr 1.9 is 1900 times the ceiling of 0.001 that ")
    short = write(schedule="{policy: constant, max_lr: 1e-2}", train="{steps: auto, kappa: 0.2}")
    above, kappa = cautions(short.config, plan_of(short))
    assert "10 times the ceiling" in above
    assert "the plan comes to κ = 0.50, and train.kappa is 0.2" in kappa
    late = write(schedule="{policy: linear, max_lr: 1e-4, warmup: 500}", train="{steps: 100}")
    (said,) = cautions(late.config, plan_of(late))
    assert "does not end within the run of 100" in said
    assert "0.0001" not in dict(describe(late.config, read_inputs(late), plan_of(late)))["learning rate"]


def test_what_a_range_test_differs_in_is_said_key_by_key(write: Write) -> None:
    save_range_test(write())
    other = write(
        optimizer="{name: sgd, momentum: 0.5}", data="{images: images, resolution: 64}", train="{steps: auto}"
    )
    said = problem(lambda: plan_of(other), InputError)
    assert "data.resolution (32 there, 64 here)" in said
    assert "optimizer.name (adamw there, sgd here)" in said
    assert "optimizer.momentum (0.9 there, 0.5 here)" in said
    assert "{" not in said
    Path("images/00.txt").write_text("another caption")
    assert "pictures or captions" in problem(lambda: plan_of(write(train="{steps: auto}")), InputError)


def test_the_plan_says_which_captions_are_names_and_which_pictures_are_enlarged(write: Write) -> None:
    loaded = write()
    rows = dict(describe(loaded.config, read_inputs(loaded), plan_of(loaded)))
    assert rows["captions"] == '0 from files, 20 from the pictures\' names (01.png: "01")'
    assert "enlarged" not in rows
    for path in list(Path("images").glob("*.png")):
        path.with_suffix(".txt").write_text("words")
    Path("images/3_mine").mkdir()
    Image.new("RGB", (20, 24), "red").save("images/3_mine/odd.png")
    loaded = write()
    rows = dict(describe(loaded.config, read_inputs(loaded), plan_of(loaded)))
    assert rows["captions"] == '20 from files, 1 from the pictures\' names (odd.png: "odd")'
    assert rows["enlarged"].startswith("1 of 21 pictures, up to 1.6 times")
    assert (
        rows["repeats"]
        == "none: numbers in names of folders (3_mine) are not read; data.repeats: {3_mine: 3} is how to say it"
    )
