"""Drawing while training (sample.at_troughs): the cells are those that `sample` would draw, and training does not notice."""

from __future__ import annotations

import json
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
from sdclr.engine.painter import KeptStates, Painter
from sdclr.errors import ConfigError, StorageError
from sdclr.report import figures

DRAWING = "sample: {prompts: [disc, another disc], seeds: [1, 2], steps: 2, guidance: 3, at_troughs: true}"
WEIGHTS = "final/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """The curves' figure takes a good part of a tiny run's time and has tests of its own."""
    monkeypatch.setattr(figures, "training", lambda records, title, marks: b"a figure")


@pytest.fixture(autouse=True)
def another_precision() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, int]]:
    """Every prompt and seed that is drawn."""
    seen: list[tuple[str, int]] = []
    original = Painter.draw

    def draw(self, prompt, seed):
        seen.append((prompt, seed))
        return original(self, prompt, seed)

    monkeypatch.setattr(Painter, "draw", draw)
    return seen


@pytest.fixture
def write(config) -> Callable[..., Path]:
    return lambda extra="", drawing=DRAWING: config(f"{drawing}\n{extra}")


def samples(path: Path) -> Path:
    return path.parent / "runs" / "tiny" / "samples"


def shown(path: Path) -> list[int]:
    """The steps of the grid's columns."""
    return [column.get("step", 0) for column in json.loads((samples(path) / "grid.json").read_text())["columns"]]


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
    assert (samples(path) / "index.html").is_file()


def test_the_cells_are_those_that_sample_draws_and_it_draws_them_no_more(write, calls):
    path = write("checkpoint: {best: false}")
    train(path)
    assert len(calls) == 3 * 4
    ours, grid = cells(path), (samples(path) / "grid.png").read_bytes()
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
    for column in json.loads((samples(path) / "grid.json").read_text())["columns"]:
        states.load(Path(column["weights"]) if column.get("step") else None)
        drawn = np.asarray(states.draw("disc", 1), dtype=float)
        near = min(np.abs(drawn - np.asarray(Image.open(cell), dtype=float)).max() for cell in (samples(path) / "cells").iterdir())  # fmt: skip
        assert near <= 6


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


@pytest.mark.parametrize(
    "problem",
    [StorageError("the disk is full"), torch.OutOfMemoryError("CUDA out of memory. Tried")],
    ids=["disk", "memory"],
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
    assert needs().at(2) <= small.at(2) < large.at(2)
    assert large.working(1) >= large.drawing
