"""Drawing while training (sample.at_troughs): the cells are those that `sample` would draw, and training does not notice."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from together import command, launch

from sdclr.commands.sample import sample
from sdclr.commands.train import train
from sdclr.config import source
from sdclr.engine.checkpoint import available
from sdclr.engine.fit import settle_batch, settle_memory
from sdclr.engine.painter import KeptStates, Painter
from sdclr.engine.plan import read_inputs
from sdclr.errors import ConfigError, Interrupted, StorageError
from sdclr.report import figures

pytestmark = pytest.mark.usefixtures("no_figure")
DRAWING = "sample: {prompts: [disc, another disc], seeds: [1, 2], steps: 2, guidance: 3, at_troughs: true}"
WEIGHTS = "final/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def another_precision() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def write(config) -> Callable[..., Path]:
    return lambda extra="", drawing=DRAWING: config(f"{drawing}\n{extra}")


def samples(path: Path) -> Path:
    return path.parent / "runs" / "tiny" / "samples"


def shown(path: Path) -> list[int]:
    """The steps of the grid's columns."""
    return [
        column.get("step", 0) for column in json.loads((samples(path) / "at-work" / "grid.json").read_text())["columns"]
    ]


def cells(path: Path) -> dict[str, bytes]:
    return {cell.name: cell.read_bytes() for cell in (samples(path) / "cells").iterdir()}


def test_the_grid_grows_by_a_column_at_every_trough(write, monkeypatch):
    path, seen = write("schedule: {policy: triangular, max_lr: 1e-3, cycles: 4, allow_peak_end: true}"), []
    original = figures.grid

    def grid(cells, columns, rows):
        seen.append([label.splitlines()[0] for label in columns])
        return original(cells, columns, rows)

    monkeypatch.setattr(figures, "grid", grid)
    train(path)
    states = ["base", "step 2", "step 4", "step 6", "step 8"]
    assert seen == [states[:count] for count in range(1, 6)]
    assert shown(path) == [0, 2, 4, 6, 8]
    assert (samples(path) / "at-work" / "index.html").is_file()


def test_the_cells_are_those_that_sample_draws_and_it_draws_them_no_more(write, calls):
    path = write("checkpoint: {best: false}")
    train(path)
    assert len(calls) == 3 * 4
    ours, grid = cells(path), (samples(path) / "at-work" / "grid.png").read_bytes()
    calls.clear()
    sample(path)
    assert calls == []
    assert (samples(path) / "grid.png").read_bytes() == grid
    for cell in (samples(path) / "cells").iterdir():
        cell.unlink()
    sample(path)
    assert cells(path) == ours


@pytest.mark.parametrize("extra", ["", "lora: {rank: 2}"])
def test_training_is_what_it_is_without(write, extra):
    found = []
    for drawing in ("false", "true"):
        path = write(extra)
        train(path, [f"sample.at_troughs={drawing}", f"run.output_dir={path.parent / drawing}"])
        run = path.parent / drawing / "tiny"
        weights = sorted((run / "final").rglob("*.safetensors"))
        found.append([(run / "metrics.jsonl").read_bytes(), *(file.read_bytes() for file in weights)])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "extra",
    [
        "lora: {rank: 2}",
        "model: {{base: '{model}', train: [unet, text_encoder], gradient_checkpointing: true}}",
        "model: {{base: '{model}', precision: bf16}}",
        "model: {{base: '{model}', precision: full_bf16}}",
    ],
)
def test_with_other_ways_to_train_the_pictures_are_nearly_those_of_sample(write, model, extra):
    path = write(extra.format(model=model) if "{model}" in extra else extra)
    train(path)
    states = KeptStates(source.load(path).config)
    for column in json.loads((samples(path) / "at-work" / "grid.json").read_text())["columns"]:
        states.load(Path(column["weights"]) if column.get("step") else None)
        drawn = np.asarray(states.draw("disc", 1), dtype=float)
        near = min(np.abs(drawn - np.asarray(Image.open(cell), dtype=float)).max() for cell in (samples(path) / "cells").iterdir())  # fmt: skip
        exact = "lora" not in extra and "full_bf16" not in extra
        assert near == 0 if exact else near <= 6


def test_a_resumed_run_draws_what_comes_and_shows_what_was_drawn_before(write, calls):
    path = write("checkpoint: {every: 3, best: false}")
    train(path)
    whole = cells(path)
    run = path.parent / "runs" / "tiny"
    (run / "final").rename(run / "gone")
    first = next(c for c in available(run / "checkpoints", ("step",)) if c.step >= 4)
    calls.clear()
    train(path, resume=True, checkpoint=first.path)
    assert calls == []  # the same weights: drawn before
    assert cells(path) == whole
    assert shown(path) == [0, 4, 8]


def test_what_was_cut_short_is_drawn_by_the_resumed_run(write, monkeypatch):
    """A request to stop that is heard while drawing ends the drawing and the run; the state has been kept just before."""
    path, real = write("checkpoint: {best: false}"), Painter.draw

    def interrupted(self, prompt, seed):
        if available(path.parent / "runs" / "tiny" / "checkpoints", ("trough",)):
            signal.raise_signal(signal.SIGTERM)
        return real(self, prompt, seed)

    monkeypatch.setattr(Painter, "draw", interrupted)
    with pytest.raises(Interrupted, match="stopped after step 4"):
        train(path)
    assert shown(path) == [0]
    assert len(cells(path)) == 4 + 1
    monkeypatch.setattr(Painter, "draw", real)
    train(path, resume=True)
    assert shown(path) == [0, 4, 8]


def test_a_damaged_older_trough_does_not_end_training(write, monkeypatch, capsys):
    path = write("checkpoint: {every: 3}")
    train(path)
    run = path.parent / "runs" / "tiny"
    (run / "final").rename(run / "gone")
    first = available(run / "checkpoints", ("trough",))[0].path
    (first / "state.json").write_text("{}")
    train(path, resume=True, checkpoint=available(run / "checkpoints", ("step",))[0].path)
    assert "could not be drawn" in capsys.readouterr().err
    assert (run / "final").is_dir()


@pytest.mark.parametrize(
    "problem",
    [StorageError("the disk is full"), torch.OutOfMemoryError("CUDA out of memory. Tried"), OSError("gone")],
    ids=["disk", "memory", "another"],
)
def test_what_cannot_be_drawn_is_said_and_training_goes_on(write, monkeypatch, capsys, problem):
    path = write()

    def fail(*_):
        raise problem

    monkeypatch.setattr(Painter, "draw", fail)
    train(path)
    said = capsys.readouterr().err
    assert "step 4 could not be drawn" in said
    assert "sdclr sample draws it later" in said
    assert (path.parent / "runs" / "tiny" / "final").is_dir()


def test_a_trough_that_could_not_be_kept_is_not_drawn(write, monkeypatch, capsys):
    from sdclr.engine import session

    path, real = write(), session.save

    def save(folder, kind, kept, *more):
        if kind == "trough" and kept.step == 4:
            raise StorageError("the disk is full")
        return real(folder, kind, kept, *more)

    monkeypatch.setattr(session, "save", save)
    train(path)
    assert "step 4 is not kept" in capsys.readouterr().err
    assert shown(path) == [0, 8]


def test_of_two_processes_one_draws_and_both_end(write, tmp_path):
    path = write()
    ended = launch(2, command("train", path), tmp_path / "said")
    assert ended.codes == (0, 0), ended.err
    assert shown(path) == [0, 4, 8]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["schedule={policy: constant, max_lr: 1e-3}"], "it has no troughs"),
        (["checkpoint.at_troughs=false"], "checkpoint.at_troughs is false"),
    ],
)
def test_where_no_trough_is_kept_it_is_refused(write, overrides, words):
    with pytest.raises(ConfigError, match=words) as caught:
        source.load(write(), overrides)
    assert "sample.at_troughs" in str(caught.value)


def test_memory_for_drawing_is_counted(config):
    from sdclr.engine import memory

    def needs(*overrides: str) -> memory.Needs:
        return memory.count(source.load(config(), overrides).config, 8, 2, torch.device("cpu"))

    assert needs().drawing == 0
    small, large = (needs("sample.at_troughs=true", f"sample.size=[{side}, {side}]") for side in (32, 512))
    assert 0 < small.drawing < large.drawing
    assert needs().at(2) == small.at(2) == large.at(2)  # what fits is for training to say
    assert small.while_drawing(2) < large.while_drawing(2)
    assert large.while_drawing(2) >= large.resident + large.drawing


def test_where_drawing_might_not_fit_it_is_said_and_the_batch_is_none_the_smaller(write, monkeypatch, capsys):
    from sdclr.engine import fit

    real = fit._needs
    monkeypatch.setattr(fit, "_needs", lambda *given, **named: (real(*given, **named)[0], 90 * 2**20, fit.IN_RAM))
    path, sizes = write("batch: {size: auto}", DRAWING.replace("steps: 2", "steps: 2, size: [512, 512]")), []
    for drawing in ("true", "false"):
        loaded = settle_batch(source.load(path, [f"sample.at_troughs={drawing}"]))
        sizes.append(loaded.config.batch.size)
        settle_memory(loaded.config, read_inputs(loaded))
        said = capsys.readouterr().err
        assert ("while it draws, which might not fit" in said) == (drawing == "true")
    assert sizes[0] == sizes[1]
