"""`batch.size: auto` becomes a number once, and stays it; what does not fit is said before it starts."""

from __future__ import annotations

import pytest

from sdclr.commands.check import check
from sdclr.commands.train import train
from sdclr.config import source
from sdclr.engine import memory
from sdclr.engine.fit import settle_batch
from sdclr.engine.plan import read_inputs
from sdclr.errors import ConfigError

AUTO = "batch: {size: auto}"


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "available", lambda device: size)


def needed(path, batch: int) -> int:
    import torch

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
    check(path)
    said = " ".join(capsys.readouterr().err.split())
    assert "it will not fit; try" in said
    assert "model.gradient_checkpointing: true" in said
