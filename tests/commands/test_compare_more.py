"""`sdclr compare` in numbers that are known beforehand: written metrics, not trained ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdclr.commands.compare import compare
from sdclr.errors import InputError
from sdclr.lr.paired import paired_difference

IMAGES = {f"picture-{i}.png": 0.2 + 0.02 * i for i in range(4)}


def write_run(
    folder: Path, lr: float = 1e-4, steps: int = 40, depth: float = 0.1, kappa: float | None = None, looks: bool = True
) -> Path:
    """A run whose held-out loss falls by `depth` (each image a little otherwise) until step 20 and rises again."""
    records: list[dict[str, Any]] = [{"schema": 1, "kind": "header"}]
    for step in range(steps + 1):
        exposure = step * lr
        if step:
            records.append(
                {"kind": "step", "step": step, "lr": lr, "loss": 0.1, "grad_norm": 1.0, "exposure": exposure}
            )
        if looks and step % 4 == 0:
            share = 1 - abs(step - 20) / 20
            images = {key: v - depth * share * (1 + 0.1 * i) for i, (key, v) in enumerate(IMAGES.items())}
            loss = float(np.mean(list(images.values())))
            records.append(
                {
                    "kind": "validation",
                    "step": step,
                    "exposure": exposure,
                    "loss": loss,
                    "train_loss": loss - 0.001 * step,
                    "images": images,
                }
            )
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if kappa:
        state = folder / "checkpoints" / "trough-000040"
        state.mkdir(parents=True)
        (state / "state.json").write_text(json.dumps({"schema": 1, "exposure": steps * lr, "kappa": kappa}))
    return folder


def as_json(runs: list[Path], output: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    compare(runs, output, as_json=True)
    return json.loads(capsys.readouterr().out)


def test_the_best_is_told_with_its_step_exposure_kappa_training_loss_and_paired_interval(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", kappa=2.0), write_run(tmp_path / "b", depth=0.11)
    found = as_json([a, b], tmp_path, capsys)
    first, second = found["runs"]
    assert found["reference"] == "a"
    assert (first["at_step"], second["at_step"]) == (20, 20)
    assert first["at_exposure"] == pytest.approx(2e-3)
    assert first["at_kappa"] == pytest.approx(1.0)
    assert second["at_kappa"] is None
    assert first["train_loss_there"] == pytest.approx(first["lowest_loss"] - 0.02)
    assert first["last_gap"] == pytest.approx(0.04)
    factors = np.array([1 + 0.1 * i for i in range(4)])
    expected = paired_difference(-0.11 * factors, -0.10 * factors)
    assert second["difference"] == pytest.approx(
        {"mean": expected.mean, "low": expected.low, "high": expected.high, "images": 4}
    )
    assert "difference" not in first
    assert not found["confounded_by_exposure"]
    assert found["warnings"] == []


@pytest.mark.parametrize(("factor", "warned"), [(1.04, False), (1.06, True), (0.9, True)])
def test_exposures_that_differ_by_more_than_five_percent_are_warned_of(tmp_path, capsys, factor, warned):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=1e-4 * factor)]
    found = as_json(runs, tmp_path, capsys)
    assert found["confounded_by_exposure"] is warned
    assert any("exposure" in w for w in found["warnings"]) is warned
    assert ("differ in exposure by more than 5 %" in (tmp_path / "compare.html").read_text()) is warned


def test_runs_measured_on_other_images_are_not_paired_and_it_is_said(tmp_path, capsys, monkeypatch):
    a = write_run(tmp_path / "a")
    monkeypatch.setitem(IMAGES, "picture-0.png", 0.3)
    b = write_run(tmp_path / "b")
    found = as_json([a, b], tmp_path, capsys)
    assert "difference" not in found["runs"][1]
    assert any("cannot be paired: b" in w for w in found["warnings"])


def test_a_run_without_validation_is_drawn_and_is_not_the_reference(tmp_path, capsys):
    runs = [write_run(tmp_path / "blind", looks=False), write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    found = as_json(runs, tmp_path, capsys)
    assert found["reference"] == "a"
    assert "lowest_loss" not in found["runs"][0]
    assert found["runs"][2]["difference"]["mean"] == 0
    assert any("without validation" in w and "blind" in w for w in found["warnings"])
    compare(runs, tmp_path)
    assert "—" in capsys.readouterr().err


def test_no_cell_of_the_printed_table_is_cut_and_the_clock_is_explained(tmp_path, capsys):
    name = "a-rather-long-name-of-a-run-that-must-not-be-cut"
    compare([write_run(tmp_path / name), write_run(tmp_path / "b", depth=0.12)], tmp_path)
    captured = capsys.readouterr()
    assert "…\n" not in captured.err.replace(" ", "")
    assert name in captured.err
    assert "95 % interval" in captured.err
    assert captured.out.strip() == str(tmp_path / "compare.png")
    assert "Wall time is left out" in (tmp_path / "compare.html").read_text()


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path, capsys):
    runs = [write_run(tmp_path / parent / "mochi") for parent in ("one", "two")]
    found = as_json(runs, tmp_path, capsys)
    assert [r["run"] for r in found["runs"]] == ["one/mochi", "two/mochi"]


def test_the_picture_grows_with_its_legend_and_its_edges_stay_white(tmp_path):
    heights = []
    for count in (2, 12):
        folder = tmp_path / str(count)
        compare([write_run(folder / f"{'long-' * 15}{i}") for i in range(count)], folder)
        picture = Image.open(io.BytesIO((folder / "compare.png").read_bytes())).convert("L")
        pixels = np.asarray(picture)
        assert picture.width >= 1200
        for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
            assert edge.min() == 255
        heights.append(picture.height)
    assert heights[1] > heights[0] + 100


def test_a_folder_without_metrics_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no metrics"):
        compare([tmp_path / "empty"], tmp_path)
