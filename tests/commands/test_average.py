"""The average of the trough weights: what it holds, how it is measured, and that asking for it changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdclr.commands.sample import sample
from sdclr.commands.train import train
from sdclr.config import source
from sdclr.engine.checkpoint import AVERAGE, TROUGH, available, verify
from sdclr.engine.plan import read_inputs
from sdclr.engine.run import Run
from sdclr.errors import ConfigError
from sdclr.model.components import read_trained


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, model, pictures) -> Path:
    """A finished run of three cycles that kept the average."""
    from tiny import write_config

    folder = tmp_path_factory.mktemp("averaged")
    extra = "schedule: {policy: triangular, max_lr: 1e-3, cycles: 3, allow_peak_end: true}\ntrain: {steps: 9}\ncheckpoint: {average: true}"
    train(write_config(folder / "run.yaml", model, pictures, folder / "runs", extra))
    return folder


def test_it_is_the_mean_of_all_troughs_and_whole(averaged):
    checkpoints = averaged / "runs" / "tiny" / "checkpoints"
    (average,) = available(checkpoints, (AVERAGE,))
    assert verify(average) == []
    troughs = available(checkpoints, (TROUGH,))
    assert [t.step for t in troughs] == [3, 6, 9]
    parts = [read_trained(t.path, ("unet",))["unet"] for t in troughs]
    for key, value in read_trained(average.path, ("unet",))["unet"].items():
        assert torch.allclose(value, torch.stack([part[key] for part in parts]).mean(dim=0), rtol=1e-5, atol=1e-7)
    info = average.info()
    assert info["averaged"] == [3, 6, 9]
    assert info["step"] == 9
    assert info["exposure"] == pytest.approx(sum(t.info()["exposure"] for t in troughs) / 3, rel=1e-12)
    assert average.path.name == f"average-000009_S{info['exposure']:.2e}"


def test_its_loss_is_that_of_the_same_held_out_draws(averaged):
    (average,) = available(averaged / "runs" / "tiny" / "checkpoints", (AVERAGE,))
    loaded = source.load(averaged / "run.yaml")
    run = Run(loaded.config, read_inputs(loaded))
    run.modules["unet"].load_state_dict(read_trained(average.path, ("unet",))["unet"])
    loss = run.losses(run.held_out, run.draws(run.held_out)).mean()
    assert average.info()["validation_loss"] == pytest.approx(loss, rel=1e-6)
    assert "average of 3 troughs" in (averaged / "runs" / "tiny" / "report.html").read_text()


def test_asking_for_it_changes_no_other_number_or_weight(averaged):
    runs = averaged / "runs"
    train(averaged / "run.yaml", ["checkpoint.average=false", "run.name=plain"])
    assert (runs / "plain" / "metrics.jsonl").read_bytes() == (runs / "tiny" / "metrics.jsonl").read_bytes()
    for state in ("final", "best"):
        assert files(runs / "plain" / state) == files(runs / "tiny" / state)
    assert available(runs / "plain" / "checkpoints", (AVERAGE,)) == []


def test_sample_shows_it_as_a_column(averaged, tmp_path):
    sample(averaged / "run.yaml", output=tmp_path)
    columns = json.loads((tmp_path / "grid.json").read_text())["columns"]
    (column,) = [c for c in columns if c["label"].startswith("average of 3 troughs")]
    assert column["averaged"] == [3, 6, 9]
    assert f"held out {column['validation_loss']:.4f}" in column["label"]
    assert len(columns) == 1 + 3 + 1  # the base, the troughs (one of them the best), the average


def test_without_validation_it_has_no_loss(config, tmp_path):
    train(config("validation: {fraction: 0}\ncheckpoint: {average: true}"))
    (average,) = available(tmp_path / "runs" / "tiny" / "checkpoints", (AVERAGE,))
    assert average.info()["validation_loss"] is None


def test_one_trough_is_no_average_and_the_run_is_finished_all_the_same(config, tmp_path, capsys):
    train(config("schedule: {policy: triangular, max_lr: 1e-3, cycles: 1}\ncheckpoint: {average: true}"))
    assert "at least two troughs" in capsys.readouterr().err
    assert available(tmp_path / "runs" / "tiny" / "checkpoints", (AVERAGE,)) == []
    assert (tmp_path / "runs" / "tiny" / "final" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("checkpoint: {average: true, at_troughs: false}", "at_troughs is false"),
        ("checkpoint: {average: true}\nschedule: {policy: constant, max_lr: 1e-3}", "has no troughs"),
    ],
)
def test_an_average_of_nothing_is_refused(config, extra, words):
    with pytest.raises(ConfigError, match=words):
        source.load(config(extra))
