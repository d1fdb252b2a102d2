"""`sdclr train` on the tiny model: what it leaves on disk, and that stopping and going on changes nothing."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sdclr.commands.train import train
from sdclr.config import source
from sdclr.engine.checkpoint import available, verify
from sdclr.engine.fingerprint import fingerprint
from sdclr.engine.folder import RunFolder
from sdclr.engine.plan import read_inputs
from sdclr.errors import CheckpointError, ConfigError, DivergenceError, InputError, Interrupted
from sdclr.report import metrics

pytestmark = pytest.mark.usefixtures("no_figure")
SEVEN = """validation: {fraction: 0.3, every: 2, timesteps_per_image: 2}
schedule: {policy: triangular, max_lr: 1e-3, cycles: 1}
train: {steps: 7}
checkpoint: {every: 5}"""
"""Seven training images in batches of two: steps 4 and 8 straddle two epochs."""


def runs(path: Path, name: str = "tiny") -> Path:
    return path.parent / "runs" / name


def stop_at(monkeypatch: pytest.MonkeyPatch, at: int, number: int = signal.SIGTERM) -> None:
    """This process is sent a signal when the given step is logged, once."""
    original, sent = metrics.MetricsLog.add, []

    def add(self, kind, step, **values):
        original(self, kind, step, **values)
        if kind == "step" and step == at and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(metrics.MetricsLog, "add", add)


def tensors(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}


def assert_same_run(one: Path, other: Path, last: str) -> None:
    """Weights, optimizer state, best and metrics are the same, byte for byte."""
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    for part in ("final", "best", f"checkpoints/{last}"):
        ours, theirs = tensors(one / part), tensors(other / part)
        assert ours
        assert ours == theirs


# What a run leaves ------------------------------------------------------------------------------------------------------------------


def test_a_finished_run_holds_what_the_design_names_and_no_leftovers(trained):
    found = {p.name for p in trained.iterdir()}
    assert found == {
        "config.yaml", "metrics.jsonl", "metrics.csv", "training.png", "report.html", "checkpoints", "final", "best", ".lock",
    }  # fmt: skip
    assert not [p for p in trained.rglob("*") if p.name.endswith((".partial", ".pruned"))]
    assert not [p for p in trained.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_every_checkpoint_of_a_run_verifies_and_troughs_best_and_the_last_two_are_kept(trained):
    kept = available(trained / "checkpoints")
    assert all(verify(c) == [] for c in kept)
    assert [c.step for c in kept if c.kind == "trough"] == [4, 8]
    assert [c.step for c in kept if c.kind == "step"] == [7, 8]
    # the newest best, and any older one that a state to resume from still counts on
    counted_on = {c.info()["best_step"] for c in kept if c.kind == "step"}
    assert {c.step for c in kept if c.kind == "best"} == counted_on


def test_the_best_checkpoint_and_folder_are_those_of_the_lowest_held_out_loss(trained):
    checks = [r for r in metrics.read(trained / "metrics.jsonl") if r["kind"] == "validation"]
    lowest = min(checks, key=lambda r: r["loss"])
    best = [c for c in available(trained / "checkpoints") if c.kind == "best"][-1]
    assert (best.step, best.info()["validation_loss"]) == (lowest["step"], lowest["loss"])
    stored = load_file(best.path / "unet" / "diffusion_pytorch_model.safetensors")
    exported = load_file(trained / "best" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all((exported[name] == tensor).all() for name, tensor in stored.items())


def test_the_final_folder_holds_the_last_steps_weights_and_the_bases_other_parts(trained, model):
    name = "unet/diffusion_pytorch_model.safetensors"
    final, last, base = (
        load_file(folder / name) for folder in (trained / "final", trained / "checkpoints/step-000008", model)
    )
    assert all((final[key] == tensor).all() for key, tensor in last.items())
    assert any((final[key] != tensor).any() for key, tensor in base.items())
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        ours, theirs = load_file(trained / "final" / part), load_file(model / part)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == tensor).all() for key, tensor in theirs.items())


def test_metrics_hold_each_step_once_with_the_plans_rate_and_the_sum_of_rates(trained):
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["schema"] == 1
    records = metrics.read(trained / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 9))
    rates = [0, 5e-4, 1e-3, 5e-4] * 2  # triangles of four steps from 0 to 1e-3
    assert [r["lr"] for r in steps] == pytest.approx(rates)
    assert [r["exposure"] for r in steps] == pytest.approx([sum(rates[: i + 1]) for i in range(8)])
    assert [r["step"] for r in records if r["kind"] == "validation"] == [0, 2, 4, 6, 8]
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert len(rows) == len(records)
    assert [float(row["loss"]) for row in rows] == [r["loss"] for r in records]


def test_the_resolved_config_gives_the_same_run_again(trained, tmp_path):
    folder = tmp_path / "again"
    train(trained / "config.yaml", [f"run.output_dir={folder}"])
    assert_same_run(trained, folder / "tiny", "step-000008")


def test_a_run_without_validation_trains_on_every_image_and_leaves_no_best(config):
    path = config("validation: {fraction: 0}\ntrain: {steps: 2}\nschedule: {policy: constant, max_lr: 1e-4}")
    train(path)
    assert {r["kind"] for r in metrics.read(runs(path) / "metrics.jsonl")} == {"step"}
    assert (runs(path) / "final" / "model_index.json").is_file()
    assert not (runs(path) / "best").exists()
    assert yaml.safe_load((runs(path) / "config.yaml").read_text())["validation"]["fraction"] == 0


RISING = """optimizer: {name: sgd, weight_decay: 0}
schedule: {policy: constant, max_lr: 1.0}
train: {steps: 40, early_stop: 2}
validation: {fraction: 0.2, every: 1, timesteps_per_image: 2}"""
"""A rate so high that the held-out loss leaps about: the best state lies some steps before the end."""


def test_early_stop_ends_the_run_after_so_many_looks_without_a_new_best_and_resumes_to_the_same_end(
    config, monkeypatch
):
    path = config(RISING)
    train(path)
    checks = [r for r in metrics.read(runs(path) / "metrics.jsonl") if r["kind"] == "validation"]
    losses = [r["loss"] for r in checks]
    last = checks[-1]["step"]
    assert last < 40
    assert losses.index(min(losses)) == len(losses) - 3
    assert (runs(path) / "final").is_dir()
    stop_at(monkeypatch, last)
    with pytest.raises(Interrupted):
        train(path, ["run.name=again"])
    train(path, ["run.name=again"], resume=True)
    assert_same_run(runs(path), runs(path, "again"), f"step-{last:06d}")


def test_a_best_checkpoint_damaged_on_disk_is_never_exported_and_the_run_says_so(config, monkeypatch, capsys):
    path, five = config(RISING), ["train.steps=5", "train.early_stop=null"]
    train(path, [*five, "run.name=whole"])
    looks = [r for r in metrics.read(runs(path, "whole") / "metrics.jsonl") if r["kind"] == "validation"]
    assert min(looks, key=lambda r: r["loss"])["step"] < 4
    stop_at(monkeypatch, 4)
    with pytest.raises(Interrupted):
        train(path, five)
    (best,) = [c for c in available(runs(path) / "checkpoints") if c.kind == "best"]
    weights = best.path / "unet/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 64
    weights.write_bytes(data)
    train(path, five, resume=True)
    assert best.path.name in capsys.readouterr().err.replace("\n", "")
    assert tensors(runs(path) / "final") == tensors(runs(path, "whole") / "final")
    # the lost state cannot come back: the best is that of the steps after it, here the last
    assert tensors(runs(path) / "best") == tensors(runs(path) / "final")


def test_a_trough_and_best_are_not_kept_when_not_asked_for(config):
    path = config("checkpoint: {at_troughs: false, best: false, keep_last: 1}")
    train(path)
    assert [c.path.name for c in available(runs(path) / "checkpoints")] == ["step-000008"]
    assert not (runs(path) / "best").exists()


def test_tensorboard_files_hold_every_number_when_the_command_returns(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = config("train: {steps: 2}\nschedule: {policy: constant, max_lr: 1e-4}")
    train(path, ["run.tensorboard=true"])
    board = EventAccumulator(str(runs(path) / "tensorboard"))
    board.Reload()
    records = metrics.read(runs(path) / "metrics.jsonl")
    for kind in ("step", "validation"):
        expected = [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in records if r["kind"] == kind]
        assert [(event.step, event.value) for event in board.Scalars(f"{kind}/loss")] == expected


def test_tensorboard_that_is_not_installed_is_an_input_error(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="tensorboard") as problem:
        train(config(), ["run.tensorboard=true"])
    assert "pip install" in str(problem.value.hint)


# Stopping and going on ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.train=[unet, text_encoder]", "optimizer.text_encoder_scale=0.5"],
        ["optimizer.name=adafactor", "batch.accumulate=2"],
        ["optimizer.name=sgd", "loss.min_snr_gamma=5"],
        ["optimizer.name=adamw8bit", "optimizer.fused_backward=true", "optimizer.max_grad_norm=null"],
        [
            "lora.rank=2",
            "model.train=[unet, text_encoder]",
            "optimizer.fused_backward=true",
            "optimizer.max_grad_norm=null",
        ],
    ],
    ids=[
        "adamw",
        "adamw with text encoder",
        "adafactor accumulating",
        "sgd with min-SNR",
        "8 bits, updated in the backward",
        "LoRA with text encoder, updated in the backward",
    ],
)
def test_seven_steps_are_three_and_a_resumed_four_bit_for_bit(config, monkeypatch, overrides):
    path = config(SEVEN)
    train(path, [*overrides, "run.name=whole"])
    stop_at(monkeypatch, 3)
    with pytest.raises(Interrupted, match="stopped after step 3 of 7") as problem:
        train(path, overrides)
    assert problem.value.exit_code == 143
    assert str(problem.value.hint) == f"sdclr train {source.load(path, overrides).typed} --resume"
    assert not (runs(path) / "final").exists()
    assert [c.step for c in available(runs(path) / "checkpoints", ("step",))] == [3]
    train(path, overrides, resume=True)
    assert_same_run(runs(path), runs(path, "whole"), "step-000007")


def test_a_run_killed_without_warning_resumes_from_its_newest_checkpoint_to_the_same_bits(config, trained, monkeypatch):
    path = config("checkpoint: {every: 3}")
    original = metrics.MetricsLog.add

    def add(self, kind, step, **values):
        original(self, kind, step, **values)
        if kind == "step" and step == 6:
            with self.path.open("a") as file:
                file.write('{"kind": "step", "st')  # the line it died in
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsLog, "add", add)
        with pytest.raises(MemoryError):
            train(path)
    assert [c.step for c in available(runs(path) / "checkpoints", ("step",))] == [3, 4]
    train(path, resume=True)
    assert_same_run(runs(path), trained, "step-000008")


KEEPING = "checkpoint: {keep_last: 10}\nschedule: {policy: triangular, max_lr: 1e-3, step_size: 2}"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, model, pictures) -> Path:
    """The runs of a config whose run was stopped after step 6 of 8, the state of every step kept. Not to be written to."""
    from tiny import write_config

    folder = tmp_path_factory.mktemp("interrupted")
    path = write_config(folder / "run.yaml", model, pictures, folder / "runs", KEEPING)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as problem:
        stop_at(patch, 6, signal.SIGINT)
        train(path)
    assert problem.value.exit_code == 130
    return folder / "runs"


@pytest.fixture
def stopped(config, interrupted) -> Path:
    """The config of a run of one's own that was stopped after step 6 of 8."""
    path = config(KEEPING)
    shutil.copytree(interrupted, path.parent / "runs")
    return path


def test_an_older_checkpoint_named_by_hand_resumes_to_the_same_bits_best_included(stopped, trained):
    path, folder = stopped, runs(stopped)
    train(path, resume=True, checkpoint=folder / "checkpoints" / "step-000003")
    assert_same_run(folder, trained, "step-000008")


def test_a_damaged_newest_checkpoint_is_skipped_with_a_word_and_the_end_is_the_same(stopped, trained, capsys):
    path, folder = stopped, runs(stopped)
    weights = folder / "checkpoints/step-000006/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    train(path, resume=True)
    assert "step-000006" in capsys.readouterr().err
    assert_same_run(folder, trained, "step-000008")


def test_a_damaged_checkpoint_named_by_hand_is_an_error(stopped):
    folder = runs(stopped) / "checkpoints" / "step-000006"
    (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-000006: is damaged: state\.json has been altered"):
        train(stopped, resume=True, checkpoint=folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trough-000004_S2.00e-03", "is not a checkpoint to resume from"),
        ("step-000099", "there is no such folder"),
        ("nowhere", "there is no such folder"),
        ("step-abc", "there is no such folder"),
    ],
)
def test_only_a_full_checkpoint_that_is_there_can_be_resumed_from(stopped, name, said):
    with pytest.raises(CheckpointError, match=said) as problem:
        train(stopped, resume=True, checkpoint=runs(stopped) / "checkpoints" / name)
    assert "step-000006" in problem.value.hint


def test_a_checkpoint_of_another_run_is_refused(stopped, trained):
    with pytest.raises(CheckpointError, match="belongs to another run"):
        train(stopped, resume=True, checkpoint=trained / "checkpoints" / "step-000007")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("scheduler/scheduler_config.json", "its configs or tokenizers are not those"),
        ("vae/diffusion_pytorch_model.safetensors", "its weights are not those"),
    ],
)
def test_a_base_that_has_changed_meanwhile_is_refused(stopped, model, file, said):
    data = (model / file).read_bytes()
    (model / file).write_bytes(data.replace(b"epsilon", b"sample") if file.endswith("json") else data[:-1] + b"!")
    try:
        with pytest.raises(CheckpointError, match=said):
            train(stopped, resume=True)
    finally:
        (model / file).write_bytes(data)


def test_a_changed_config_is_refused_with_both_values_of_every_change_and_nothing_is_changed(stopped):
    path, folder = stopped, runs(stopped)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    text = path.read_text().replace("max_lr: 1e-3", "max_lr: 2e-3") + "optimizer: {weight_decay: 0.5}\n"
    path.write_text(text.replace("seed: 3", "seed: 4"))
    with pytest.raises(CheckpointError) as problem:
        train(path, resume=True)
    message = problem.value.message
    for key, given, stored in (
        ("schedule.max_lr", "0.002", "0.001"), ("optimizer.weight_decay", "0.5", "0.01"), ("run.seed", "4", "3"),
    ):  # fmt: skip
        assert f"{key} is {given} in the config, and the run was started with {stored}" in message
    assert "--set optimizer.weight_decay=0.5" in message
    assert "--set run.seed" not in message
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_change_of_optimizer_settings_asked_for_with_set_is_accepted_and_a_new_seed_never_is(stopped):
    with pytest.raises(CheckpointError, match=r"run\.seed is 4"):
        train(stopped, ["run.seed=4"], resume=True)
    train(stopped, ["optimizer.weight_decay=0.5"], resume=True)
    assert yaml.safe_load((runs(stopped) / "config.yaml").read_text())["optimizer"]["weight_decay"] == 0.5


def test_keys_that_touch_no_weights_may_change_on_the_way(stopped, trained):
    text = stopped.read_text().replace("every: 2", "every: 4").replace("keep_last: 10", "keep_last: 1, every: 100")
    stopped.write_text(text.replace("prompts: [disc]", "prompts: [another]") + "range_test: {arms_per_decade: 2}\n")
    train(stopped, resume=True)
    assert tensors(runs(stopped) / "final") == tensors(trained / "final")
    assert [c.step for c in available(runs(stopped) / "checkpoints", ("step",))] == [8]


def test_a_longer_run_of_the_same_step_size_resumes_and_equals_one_that_was_long_from_the_start(stopped):
    train(stopped, ["run.name=long", "train.steps=12"])
    text = stopped.read_text().replace("{steps: 8}", "{steps: 12}")
    stopped.write_text(text)
    train(stopped, resume=True)
    assert_same_run(runs(stopped), runs(stopped, "long"), "step-000012")


def test_a_run_shorter_than_what_is_done_is_refused(stopped):
    stopped.write_text(stopped.read_text().replace("{steps: 8}", "{steps: 4}"))
    with pytest.raises(CheckpointError, match="the plan has 4 steps, and 6 are done"):
        train(stopped, resume=True)


def test_other_pictures_or_base_weights_than_the_run_was_started_with_are_refused(tmp_path, config, model, monkeypatch):
    from tiny import make_pictures

    folder, base = make_pictures(tmp_path / "own", count=7), shutil.copytree(model, tmp_path / "base")
    path = config(
        f"model: {{base: '{base}'}}\ndata: {{images: '{folder}', resolution: 32}}\ntrain: {{steps: 4}}\nschedule: {{policy: constant, max_lr: 1e-4}}"
    )
    stop_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(path)
    (folder / "picture-03.txt").write_text("another caption")
    with pytest.raises(CheckpointError, match="pictures or captions"):
        train(path, resume=True)
    (folder / "picture-03.txt").write_text("disc 3\n")
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="base: its weights"):
        train(path, resume=True)
    weights.write_bytes(data)
    train(path, resume=True)


# Refusals -----------------------------------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_refused_and_left_alone(trained):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.name != ".lock"}
    with pytest.raises(InputError, match="holds a finished run") as problem:
        train(trained.parent.parent / "run.yaml")
    assert "run.name" in str(problem.value.hint)
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.name != ".lock"} == before


def test_an_unfinished_folder_without_resume_is_refused(stopped):
    with pytest.raises(InputError, match="holds an unfinished run") as problem:
        train(stopped)
    assert f"sdclr train {stopped} --resume" in str(problem.value.hint)


def test_resume_with_nothing_there_is_an_error_and_never_a_fresh_start(config):
    path = config()
    with pytest.raises(CheckpointError, match="holds no checkpoint to resume from"):
        train(path, resume=True)
    assert not (runs(path) / "metrics.jsonl").exists()


def test_resume_with_damaged_checkpoints_alone_is_an_error(stopped):
    for checkpoint in available(runs(stopped) / "checkpoints", ("step",)):
        (checkpoint.path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="holds no sound checkpoint"):
        train(stopped, resume=True)


def test_a_checkpoint_without_resume_is_an_error(config, trained):
    with pytest.raises(InputError, match="needs --resume"):
        train(config(), checkpoint=trained / "checkpoints" / "step-000007")


def test_max_lr_auto_without_a_range_test_names_the_command_that_makes_one(config):
    path = config("schedule: {policy: triangular, max_lr: auto, cycles: 1}")
    with pytest.raises(InputError, match="max_lr: auto needs a range test") as problem:
        train(path)
    assert f"sdclr range-test {path}" in str(problem.value.hint)


def test_a_plan_that_ends_near_its_peak_is_refused_at_the_schedules_line(config):
    path = config("schedule: {policy: triangular, max_lr: 1e-3, cycles: 1.5}")
    with pytest.raises(ConfigError, match=r"run\.yaml:\d+:\d+: schedule ends near its peak"):
        train(path)


def test_a_divergence_names_the_last_good_checkpoint_and_keeps_it(config, monkeypatch):
    from sdclr.engine.run import Run

    path, calls, original = config(), [], Run.loss

    def loss(self, samples):
        calls.append(1)
        return original(self, samples) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(Run, "loss", loss)
    with pytest.raises(DivergenceError, match="the loss of step 4 is nan") as problem:
        train(path)
    kept = available(runs(path) / "checkpoints", ("step",))
    assert f"the last good checkpoint is {kept[-1].path}" in problem.value.message
    assert kept[-1].step == 3
    assert verify(kept[-1]) == []


# Another process ----------------------------------------------------------------------------------------------------------------------


def test_a_process_told_to_terminate_saves_exits_143_and_meanwhile_its_lock_names_it(config, trained):
    path = config(
        "train: {steps: 4000}\nschedule: {policy: triangular, max_lr: 1e-3, step_size: 2}\ncheckpoint: {every: 4000}"
    )
    log = runs(path) / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "sdclr", "train", str(path), "--quiet"], stderr=subprocess.PIPE, text=True
    )
    try:
        while process.poll() is None and (not log.exists() or log.read_text().count('"step"') < 20):
            time.sleep(0.05)
        with pytest.raises(InputError) as problem:
            train(path)
        assert f"is in use by sdclr train, process {process.pid}, started 20" in problem.value.message
        process.send_signal(signal.SIGTERM)
        error = process.communicate()[1]
    finally:
        process.kill()
    assert process.returncode == 143
    assert "which is saved" in error
    done = metrics.read(log)[-1]["step"]
    assert available(runs(path) / "checkpoints", ("step",))[-1].step == done
    # the same seed and rates: the longer run's first eight steps are the finished run's
    ours, theirs = ([r for r in metrics.read(f) if r["kind"] == "step"][:8] for f in (log, trained / "metrics.jsonl"))
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]
    shutil.rmtree(runs(path))


def test_trying_a_compiled_step_out_trains_nothing(config, monkeypatch):
    """Where weights are updated in the backward, the trial would be a step at whatever rate the optimizer was made with."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    # With others the weights would lie channels last, which leaves other bits.
    fused = ["optimizer.name=adamw8bit", "optimizer.fused_backward=true", "optimizer.max_grad_norm=null"]
    for name in ("off", "on"):
        train(config(), [*fused, f"run.name={name}", f"model.compile={name}"])
    runs = config().parent / "runs"
    one, other = (load_file(runs / name / "final" / "unet" / "diffusion_pytorch_model.safetensors") for name in ("off", "on"))  # fmt: skip
    assert all(torch.equal(one[key], other[key]) for key in one)


def measured(path: Path, best: float | None) -> Path:
    """A range test's result that fits the config, conclusive if it knows a best exposure; its ceiling is 1e-3."""
    loaded, result = source.load(path), runs(path) / "range-test" / "result.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "schema": 1, "verdict": "conclusive" if best else "inconclusive", "ceiling": {"lr": 1e-3, "bracket": [9e-4, 2e-3]},
        "best_exposure": {"value": best, "interval": [1e-3, 3e-3]} if best else None, "fingerprint": fingerprint(loaded.config, read_inputs(loaded)),
    }  # fmt: skip
    result.write_text(json.dumps(found))
    return result


def test_a_run_whose_range_test_can_no_longer_say_goes_on_with_what_it_began_with(config, monkeypatch, capsys):
    path = config(
        "schedule: {policy: triangular, cycles: 2}\ntrain: {steps: auto}\ncheckpoint: {every: 2, keep_last: 9}"
    )
    measured(path, 2e-3)
    train(path, ["run.name=whole"])
    stop_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(path)
    measured(path, None)
    train(path, resume=True)
    assert "the run goes on with what it began with: schedule.max_lr 0.0005, train.steps 8" in capsys.readouterr().err
    assert tensors(runs(path) / "final") == tensors(runs(path, "whole") / "final")
    assert sorted(c.path.name for c in available(runs(path) / "checkpoints", ("trough",))) == sorted(
        c.path.name for c in available(runs(path, "whole") / "checkpoints", ("trough",))
    )


def test_other_rates_asked_for_are_taken_with_a_warning_and_exposure_counts_what_was_collected(stopped, capsys):
    folder = runs(stopped)
    done = [r for r in metrics.read(folder / "metrics.jsonl") if r["kind"] == "step"]
    train(stopped, ["train.steps=12", "schedule.max_lr=2e-3"], resume=True)
    said = capsys.readouterr().err
    assert f"the rates of this plan are not those of the first {len(done)} steps; from step {len(done) + 1} on" in said
    steps = [r for r in metrics.read(folder / "metrics.jsonl") if r["kind"] == "step"]
    planned = float(re.search(r"exposure +([0-9.e-]+)", said)[1])
    assert planned == pytest.approx(steps[-1]["exposure"], rel=1e-2)
    assert steps[-1]["exposure"] != pytest.approx(3 * 4e-3, rel=0.05)


def test_a_change_that_is_refused_says_how_to_put_it_back(stopped):
    stopped.write_text(stopped.read_text() + "optimizer: {betas: [0.5, 0.9]}\n")
    with pytest.raises(CheckpointError) as problem:
        train(stopped, resume=True)
    assert "optimizer.betas is [0.5, 0.9] in the config, and the run was started with [0.9, 0.999]" in str(
        problem.value
    )
    assert "--set 'optimizer.betas=[0.9, 0.999]'" in str(problem.value.hint)


def test_the_config_of_a_planned_run_says_where_its_numbers_are_from(config):
    path = config("schedule: {policy: triangular, cycles: 2}\ntrain: {steps: auto, kappa: 2}")
    result = measured(path, 1e-3)
    train(path)
    text = (runs(path) / "config.yaml").read_text()
    assert text.startswith(f"# max_lr and steps: {result}; steps: train.kappa 2\n")
    assert source.load(runs(path) / "config.yaml").config.train.steps.value == 8


def test_a_picture_that_is_gone_when_training_ends_takes_nothing_with_it(tmp_path, config, monkeypatch):
    from tiny import make_pictures

    from sdclr.engine.session import Session

    folder = make_pictures(tmp_path / "own", count=10)
    path = config(f"data: {{images: '{folder}', resolution: 32}}")
    finish = Session.finish

    def later(session):
        shutil.rmtree(folder)
        finish(session)

    monkeypatch.setattr(Session, "finish", later)
    train(path)
    assert (runs(path) / "final" / "unet").is_dir()
    assert "images" in (runs(path) / "report.html").read_text()


def test_a_run_that_is_resumed_without_its_range_test_keeps_its_best_exposure(config, monkeypatch, capsys):
    path = config(
        "schedule: {policy: triangular, cycles: 2}\ntrain: {steps: auto, kappa: 2}\ncheckpoint: {every: 1, keep_last: 9}"
    )
    result = measured(path, 1e-3)
    stop_at(monkeypatch, 1)
    with pytest.raises(Interrupted):
        train(path)
    result.unlink()
    train(path, ["schedule.max_lr=4e-4"], resume=True)
    said = capsys.readouterr().err
    assert "goes on with what it began with: train.steps 8, whatever train.kappa is" in said
    assert "(κ = " in said and "best 0.001)" in said
    assert f"from           {result}" in said or str(result) in said
    assert not (runs(path) / "config.yaml").read_text().startswith("#")


def test_best_is_the_newest_of_a_run_at_work(stopped):
    folder = RunFolder(runs(stopped))
    for step in (2, 6):
        (folder.checkpoints / f"best-{step:06d}_S1.00e-03").mkdir(exist_ok=True)
    assert folder.state(Path("best")).name.startswith("best-000006")
    assert folder.state(Path("trough-000004")).name.startswith("trough-000004_S")
    assert folder.state(Path("step")) == Path("step") or len(list(folder.checkpoints.glob("step*"))) == 1
    assert folder.state(Path("nothing")) == Path("nothing")
