"""metrics.jsonl: appended whole, cut exactly, read back as written."""

from __future__ import annotations

import csv
import io
import json

import pytest

from sdclr.report.metrics import MetricsLog, as_csv, finite, read


def logged(path, steps, upto=None):
    log = MetricsLog(path, upto)
    for step in steps:
        log.add("step", step, lr=step / 10, loss=0.1 + 0.2)
        if step % 2 == 0:
            log.add("validation", step, loss=1 / 3, images={"a.png": 0.1})
    log.close()


def test_the_first_line_carries_the_schema_and_the_rest_is_one_object_a_line(tmp_path):
    logged(tmp_path / "m.jsonl", [1, 2])
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert (lines[0]["kind"], lines[0]["schema"]) == ("header", 1)
    assert lines[1:] == [
        {"kind": "step", "step": 1, "lr": 0.1, "loss": 0.1 + 0.2},
        {"kind": "step", "step": 2, "lr": 0.2, "loss": 0.1 + 0.2},
        {"kind": "validation", "step": 2, "loss": 1 / 3, "images": {"a.png": 0.1}},
    ]
    assert read(tmp_path / "m.jsonl") == lines[1:]


def test_each_record_can_be_read_the_moment_it_is_added(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in (1, 2):
        log.add("step", step, loss=1.0)
        assert len(read(tmp_path / "m.jsonl")) == step
    log.sync()
    log.close()


def test_a_file_cut_back_and_continued_is_byte_for_byte_one_that_never_stopped(tmp_path):
    logged(tmp_path / "whole.jsonl", [1, 2, 3, 4, 5])
    logged(tmp_path / "cut.jsonl", [1, 2, 3, 4])
    logged(tmp_path / "cut.jsonl", [3, 4, 5], upto=2)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_opening_without_a_step_begins_anew(tmp_path):
    logged(tmp_path / "m.jsonl", [1, 2, 3])
    logged(tmp_path / "m.jsonl", [1])
    assert [r["step"] for r in read(tmp_path / "m.jsonl")] == [1]


@pytest.mark.parametrize("tail", ['{"kind": "step", "st', "\x00\x00\x00", "{", '"'])
def test_a_last_line_that_was_never_finished_is_left_out(tmp_path, tail):
    logged(tmp_path / "m.jsonl", [1, 2])
    before = (tmp_path / "m.jsonl").read_bytes()
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write(tail)
    assert [r["step"] for r in read(tmp_path / "m.jsonl")] == [1, 2, 2]
    MetricsLog(tmp_path / "m.jsonl", 2).close()
    assert (tmp_path / "m.jsonl").read_bytes() == before


def test_a_file_that_is_not_there_has_no_records(tmp_path):
    assert read(tmp_path / "m.jsonl") == []


def test_numbers_that_are_not_finite_are_null_and_the_file_stays_json(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.add("step", 1, grad_norm=float("inf"), loss=float("nan"), deep=[{"x": (float("-inf"), 1.0)}])
    log.close()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert strict[1] == {"kind": "step", "step": 1, "grad_norm": None, "loss": None, "deep": [{"x": [None, 1.0]}]}


def test_finite_leaves_everything_else_as_it_is():
    value = {"a": [1, 2.5, "x", None, True], "b": {"c": 0.0}}
    assert finite(value) == value


def test_csv_has_every_scalar_column_and_one_row_a_record():
    records = [
        {"kind": "step", "step": 1, "lr": 1e-7, "loss": 1 / 3},
        {"kind": "validation", "step": 1, "loss": 0.5, "images": {"a": 1}, "bins": [1, 2], "vs_base": None},
    ]
    text = as_csv(records)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.splitlines()[0] == "kind,step,lr,loss,vs_base"
    assert float(rows[0]["lr"]) == 1e-7
    assert float(rows[0]["loss"]) == 1 / 3
    assert (rows[1]["lr"], rows[1]["loss"], rows[1]["vs_base"]) == ("", "0.5", "")
    assert len(rows) == 2


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "m.jsonl", tensorboard=tmp_path / "board")
    for step in (1, 2, 3):
        log.add("step", step, loss=step / 4, images={"a": 1.0}, note=None)
    log.close()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("step/loss")] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert board.Tags()["scalars"] == ["step/loss"]
