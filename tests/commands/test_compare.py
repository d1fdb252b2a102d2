"""`sdclr compare`: the table's numbers recomputed from metrics.jsonl by hand."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from PIL import Image
from scipy.stats import t as student

from sdclr.commands.compare import compare
from sdclr.commands.train import train
from sdclr.errors import InputError
from sdclr.report import figures, metrics
from sdclr.report.metrics import MetricsLog


@pytest.fixture(autouse=True)
def no_figure(request, monkeypatch):
    """The figure takes most of a comparison's time and has tests of its own."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(figures, "comparison", lambda runs: b"a figure")


def run(folder: Path, lr: float, losses: list[list[float]], steps_a_look: int = 2) -> Path:
    """A run folder with a look (losses of each image) before training and after every second step."""
    log, exposure, step = MetricsLog(folder / "metrics.jsonl"), 0.0, 0
    for number, images in enumerate(losses):
        for _ in range(steps_a_look if number else 0):
            step, exposure = step + 1, exposure + lr
            log.add("step", step, lr=lr, loss=1.0, grad_norm=1.0, exposure=exposure)
        mean = statistics.mean(images)
        log.add("validation", step, exposure=exposure, loss=mean, train_loss=mean - 0.1,
                images={f"{i}.png": loss for i, loss in enumerate(images)})  # fmt: skip
    log.close()
    return folder


A = [[1.0, 1.2, 0.8, 1.4], [0.8, 1.0, 0.7, 1.0], [0.9, 1.1, 0.7, 1.1]]
B = [[1.0, 1.2, 0.8, 1.4], [0.9, 1.0, 0.75, 1.2], [0.7, 0.8, 0.72, 0.9]]


def as_json(capsys, *arguments) -> dict:
    compare(*arguments, as_json=True)
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_the_numbers_are_those_computed_by_hand(tmp_path, capsys):
    found = as_json(capsys, [run(tmp_path / "a", 1e-4, A), run(tmp_path / "b", 1e-4, B)], tmp_path / "out")
    assert (found["schema"], found["confounded_by_exposure"]) == (1, False)
    first, second = found["runs"]
    assert first["run"] == "a"
    assert (first["lowest_loss"], first["at_step"], first["last_loss"]) == (
        pytest.approx(0.875),
        2,
        pytest.approx(0.95),
    )
    assert (first["at_exposure"], first["exposure"], first["steps"]) == (pytest.approx(2e-4), pytest.approx(4e-4), 4)
    assert "difference" not in first
    assert (second["lowest_loss"], second["at_step"], second["last_loss"]) == (
        pytest.approx(0.78),
        4,
        pytest.approx(0.78),
    )
    # lowest looks, image by image: 0.7-0.8, 0.8-1.0, 0.72-0.7, 0.9-1.0
    each = [-0.1, -0.2, 0.02, -0.1]
    half = student.ppf(0.975, 3) * statistics.stdev(each) / math.sqrt(4)
    d = second["difference"]
    assert (d["mean"], d["low"], d["high"]) == pytest.approx((-0.095, -0.095 - half, -0.095 + half))
    assert d["images"] == 4


def test_the_numbers_of_real_runs_are_those_of_their_metrics(trained, capsys, tmp_path):
    (row,) = as_json(capsys, [trained], tmp_path)["runs"]
    checks = [r for r in metrics.read(trained / "metrics.jsonl") if r["kind"] == "validation"]
    lowest = min(checks, key=lambda r: r["loss"])
    assert row == {
        "run": "tiny", "steps": 8, "exposure": pytest.approx(4e-3), "lowest_loss": lowest["loss"], "at_step": lowest["step"],
        "at_exposure": lowest["exposure"], "at_kappa": None, "train_loss_there": lowest["train_loss"],
        "last_loss": checks[-1]["loss"], "last_gap": checks[-1]["gap"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("factor", "confounded"), [(1.0, False), (1.04, False), (1.06, True), (0.94, True), (0.5, True)]
)
def test_it_warns_exactly_when_exposures_differ_by_more_than_five_percent(tmp_path, capsys, factor, confounded):
    folders = [run(tmp_path / "a", 1e-4, A), run(tmp_path / "b", 1e-4 * factor, B)]
    assert as_json(capsys, folders, tmp_path / "out")["confounded_by_exposure"] == confounded
    compare(folders, tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split())
    assert ("differ in exposure by more than 5 %" in said) == confounded
    assert ("differ in exposure by more than 5 %" in (tmp_path / "out" / "compare.html").read_text()) == confounded


def test_it_writes_a_picture_and_a_page_and_prints_the_pictures_path(tmp_path, capsys):
    compare([run(tmp_path / "a", 1e-4, A), run(tmp_path / "b", 1e-4, B)], tmp_path / "out")
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'compare.png'}\n"
    with Image.open(tmp_path / "out" / "compare.png") as image:
        assert image.width == 1364
    page = (tmp_path / "out" / "compare.html").read_text()
    for words in ("0.87500", "0.78000", "-0.09500"):
        assert words in page


def test_runs_without_shared_images_or_without_validation_have_no_difference(tmp_path, capsys, config):
    path = config("validation: {fraction: 0}\ntrain: {steps: 1}\nschedule: {policy: constant, max_lr: 1e-4}")
    train(path)
    capsys.readouterr()
    other = run(tmp_path / "other", 1e-4, [[1.0], [0.9]])
    text = (other / "metrics.jsonl").read_text().replace('"0.png"', '"z.png"')
    (other / "metrics.jsonl").write_text(text)
    folders = [run(tmp_path / "a", 1e-4, A), tmp_path / "runs" / "tiny", other]
    rows = as_json(capsys, folders, tmp_path / "out")["runs"]
    assert ["difference" in row for row in rows] == [False, False, False]
    assert ["lowest_loss" in row for row in rows] == [True, False, True]
    compare(folders, tmp_path / "out")


def test_one_shared_image_gives_an_unbounded_interval_and_still_strict_json(tmp_path, capsys):
    folders = [run(tmp_path / "a", 1e-4, [[1.0], [0.9]]), run(tmp_path / "b", 1e-4, [[1.0], [0.8]])]
    difference = as_json(capsys, folders, tmp_path / "out")["runs"][1]["difference"]
    assert (difference["mean"], difference["low"], difference["high"]) == (pytest.approx(-0.1), None, None)
    compare(folders, tmp_path / "out")


def test_a_run_named_by_a_relative_path_is_called_by_its_folders_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(run(tmp_path / "a", 1e-4, A))
    assert as_json(capsys, [Path()], tmp_path / "out")["runs"][0]["run"] == "a"


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, capsys):
    folders = [run(tmp_path / "x" / "mochi", 1e-4, A), run(tmp_path / "y" / "mochi", 1e-4, B)]
    names = [row["run"] for row in as_json(capsys, folders, tmp_path / "out")["runs"]]
    assert len(set(names)) == 2


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_a_runs_metrics_is_an_input_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"{name}: holds no metrics"):
        compare([run(tmp_path / "a", 1e-4, A), tmp_path / name], tmp_path / "out")
