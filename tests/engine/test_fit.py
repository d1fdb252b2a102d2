"""`batch.size: auto` becomes a number once, and stays it; what does not fit is said before it starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdclr.commands.check import check
from sdclr.commands.train import train
from sdclr.config import source
from sdclr.engine import fit, memory
from sdclr.engine.fit import settle_batch, settle_memory
from sdclr.engine.plan import read_inputs
from sdclr.errors import ConfigError
from sdclr.model import components

AUTO = "batch: {size: auto}"


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "available", lambda device: size)


def needed(path, batch: int) -> int:
    return memory.count(source.load(path).config, 6, 4, torch.device("cpu"), keeps_base=True).at(batch)


def size_of(path, resume: bool = False) -> object:
    return settle_batch(source.load(path), resume).config.batch.size


def test_auto_is_as_many_as_fit_and_never_more_than_there_are(config, monkeypatch):
    path = config(AUTO)
    free(monkeypatch, 2**40)
    assert size_of(path) == 6  # of ten, four are held out in a range test
    assert len(read_inputs(settle_batch(source.load(path)), measuring=True).split.validation) == 4
    free(monkeypatch, int(needed(path, 3) / 0.9) + 100)
    assert size_of(path) in (3, 4)
    free(monkeypatch, 1000)
    with pytest.raises(ConfigError, match="not even one picture fits"):
        size_of(path)


def test_a_number_is_left_alone_and_several_processes_must_name_one(config, monkeypatch):
    assert size_of(config("batch: {size: 3}")) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="name a number"):
        size_of(config(AUTO))


def test_a_resumed_run_keeps_its_number_though_memory_has_changed(config, monkeypatch, capsys):
    path = config(AUTO + "\nvalidation: {fraction: 0.2, every: 4, timesteps_per_image: 2}")
    free(monkeypatch, 2**40)
    train(path)
    snapshot = source.load(path.parent / "runs" / "tiny" / "config.yaml").config
    assert snapshot.batch.size == 6
    assert "batch.size: auto is 6 (all that the range test trains on)" in capsys.readouterr().err
    free(monkeypatch, int(needed(path, 3) / 0.9))
    assert size_of(path, resume=True) == 6


def test_train_takes_the_number_that_its_range_test_was_measured_with_unless_that_was_of_another_kind(
    config, monkeypatch
):
    path = config(AUTO)
    settled = settle_batch(source.load(path)).config
    folder = settled.folder / "range-test"
    folder.mkdir(parents=True)
    other = settled.model_copy(update={"batch": settled.batch.model_copy(update={"size": 5})})
    (folder / "config.yaml").write_text(source.dump(other))
    assert size_of(path) == 5
    assert settle_batch(source.load(path, ["model.gradient_checkpointing=true"])).config.batch.size == 6


def test_check_says_what_is_needed_and_warns_when_it_does_not_fit(config, monkeypatch, capsys):
    path = config()
    check(path)
    assert "memory: " in capsys.readouterr().err
    free(monkeypatch, 2**20)
    for setting, tried in (("auto", "model.precision: full_bf16"), ("false", "model.gradient_checkpointing: true")):
        check(path, [f"model.gradient_checkpointing={setting}"])
        said = " ".join(capsys.readouterr().err.split())
        assert "it will not fit; try" in said
        assert tried in said


def test_check_says_what_a_gpu_would_need_of_a_model_that_is_for_one(config, monkeypatch, capsys):
    path, cuda = config(), torch.device("cuda")
    check(path)
    assert "NVIDIA" not in capsys.readouterr().err
    monkeypatch.setattr(fit, "FOR_A_GPU", 0)
    plain, less = (
        source.load(path, [f"model.gradient_checkpointing={setting}"]).config for setting in ("auto", "true")
    )
    size = plain.batch.size
    there, checkpointed = (fit._shown(memory.count(each, 8, 2, cuda, only=size).at(size)) for each in (plain, less))
    check(path)
    said = " ".join(capsys.readouterr().err.split())
    assert f"memory: on an NVIDIA GPU {there}, or {checkpointed} with model.gradient_checkpointing: true" in said
    check(path, ["model.gradient_checkpointing=true"])
    assert f"on an NVIDIA GPU {checkpointed} " in " ".join(capsys.readouterr().err.split()) + " "
    train(path)
    assert "NVIDIA" not in capsys.readouterr().err


def test_checkpointing_is_turned_on_where_a_run_would_not_fit_without_and_leaves_the_same_bits(
    config, monkeypatch, capsys
):
    path = config("batch: {size: 6}\ntrain: {steps: 4}")
    loaded = source.load(path)
    inputs = read_inputs(loaded)

    def count(setting: bool) -> int:
        chosen = source.load(path, [f"model.gradient_checkpointing={setting}"]).config
        return memory.count(chosen, 8, 2, torch.device("cpu"), only=6).at(6)

    free(monkeypatch, int(count(False) / 0.9) + 1)
    assert settle_memory(loaded.config, inputs).model.gradient_checkpointing == "auto"
    assert "checkpointing" not in capsys.readouterr().err
    train(path)
    free(monkeypatch, int(count(False) / 0.9) - 1)
    assert settle_memory(loaded.config, inputs).model.gradient_checkpointing is True
    assert "without which it might not fit" in " ".join(capsys.readouterr().err.split())
    seen = []
    real = components.prepare_for_training
    monkeypatch.setattr(components, "prepare_for_training", lambda parts, model, device: (seen.append(model.gradient_checkpointing), real(parts, model, device)))  # fmt: skip
    train(path, ["run.name=checkpointed"])
    assert seen[-1] is True
    weights = [(path.parent / "runs" / name / "final" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("tiny", "checkpointed")]  # fmt: skip
    assert weights[0] == weights[1]


def test_a_batch_that_only_fits_with_checkpointing_is_found(config, monkeypatch):
    def needs(config, *_, **__):
        each = 10 if config.model.gradient_checkpointing is True else 100
        moments = memory.Moments(np.array([0]), np.array([each]))
        return memory.Needs({}, 0, moments, None, 0, 0), 50, "there"

    monkeypatch.setattr(fit, "_needs", needs)
    path = config(AUTO)
    assert size_of(path) == 4  # nine tenths of 50, in tens
    with pytest.raises(ConfigError, match="not even one picture fits"):
        settle_batch(source.load(path, ["model.gradient_checkpointing=false"]))


def test_of_several_processes_the_batch_advised_is_all_of_theirs_and_each_has_its_part_of_the_memory(
    config, monkeypatch, capsys
):
    def needs(config, *_, **__):
        moments = memory.Moments(np.array([0]), np.array([100]))
        return memory.Needs({"weights": 10}, 10, moments, None, 0, 0), 700, fit.IN_RAM

    monkeypatch.setattr(fit, "_needs", needs)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sdclr.engine.processes.Processes.agree", lambda self, value: value)
    loaded = source.load(config("batch: {size: 8}"), ["model.gradient_checkpointing=false"])
    settle_memory(loaded.config, read_inputs(loaded, 0, 2))
    # Each: 350 free, 10 of weights, 10 exchanged, 100 a picture: four pictures do not fit, three do.
    said = " ".join(capsys.readouterr().err.split())
    assert "free in RAM for each process" in said
    assert "it will not fit; try batch.size: 6" in said


def test_the_number_of_a_range_test_that_was_put_aside_is_taken_too(config):
    path = config(AUTO)
    settled = settle_batch(source.load(path)).config
    folder = settled.folder / "range-test"
    (folder / "earlier" / "abcdef01").mkdir(parents=True)
    other = settled.model_copy(update={"batch": settled.batch.model_copy(update={"size": 5})})
    (folder / "earlier" / "abcdef01" / "config.yaml").write_text(source.dump(other))
    assert size_of(path) == 5
