"""`sdclr compare`: several runs' curves in one picture, against step and against exposure, and their numbers in one table.

Wall time is not among the numbers: metrics.jsonl holds no clock, so that a run that was resumed has the very lines of one that was not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdclr.engine.folder import RunFolder, read_json, write_bytes, write_text
from sdclr.errors import InputError
from sdclr.lr.paired import paired_difference
from sdclr.report import console, figures, metrics, page
from sdclr.report.metrics import SCHEMA

HEADER = (
    "run",
    "lowest loss",
    "difference (95 % interval)",
    "at step",
    "at exposure",
    "at κ",
    "training loss there",
    "last loss",
    "steps",
    "exposure",
)
CONFOUNDED = 1.05
"""Largest ratio of two runs' exposures at which their losses still speak of their schedules alone."""


@dataclasses.dataclass(frozen=True)
class Curves:
    """One run as it was logged; `best_exposure` is that of the range test it was planned by, if any."""

    name: str
    records: list[dict[str, Any]]
    best_exposure: float | None

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [r for r in self.records if r["kind"] == "step"]

    @property
    def looks(self) -> list[dict[str, Any]]:
        return [r for r in self.records if r["kind"] == "validation"]

    @property
    def lowest(self) -> dict[str, Any] | None:
        return min(self.looks, key=lambda r: r["loss"], default=None)


def compare(runs: Sequence[Path], output: Path, as_json: bool = False) -> None:
    """Write compare.png and compare.html, print the table or JSON; warns where a comparison would mislead."""
    loaded = [_read(folder, name) for folder, name in zip(runs, _names(runs), strict=True)]
    reference = next((run for run in loaded if run.looks), loaded[0])
    rows = [_summary(run, reference) for run in loaded]
    cautions = _cautions(loaded, reference, rows)
    picture = figures.comparison([(run.name, run.records) for run in loaded])
    shown = [_shown(row) for row in rows]
    sections: list[dict[str, Any]] = [
        {"title": "Curves", "picture": picture},
        {"title": "Numbers", "text": EXPLAINED.format(reference.name), "header": HEADER, "rows": shown},
    ]
    write_bytes(output / "compare.png", picture)
    write_text(output / "compare.html", page.render("Runs compared", " ".join(cautions), sections))
    for caution in cautions:
        console.warn(caution)
    if as_json:
        found = {
            "schema": SCHEMA,
            "reference": reference.name,
            "runs": rows,
            "confounded_by_exposure": _confounded(rows),
            "warnings": cautions,
        }
        console.result(json.dumps(metrics.finite(found), allow_nan=False))
        return
    console.table(shown, HEADER, title=f"differences are to {reference.name}")
    console.result(str(output / "compare.png"))


EXPLAINED = (
    "Losses are of the held-out images on fixed draws; the training loss is measured in the same way, on as many training images. "
    "The difference to {} is paired, image by image, between the lowest losses; κ is exposure in units of the best one that the "
    "range test measured. Wall time is left out: the metrics hold no clock, so that they are the same bits in every repetition."
)


def _read(folder: Path, name: str) -> Curves:
    records = metrics.complete(metrics.read(RunFolder(folder).metrics))
    if not any(r["kind"] == "step" for r in records):
        raise InputError(f"{folder}: holds no metrics of a run (metrics.jsonl)")
    return Curves(name, records, _best_exposure(folder))


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as much of the path as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _best_exposure(folder: Path) -> float | None:
    """S* as the run's plan knew it: any kept state tells its exposure and its κ."""
    for path in sorted(RunFolder(folder).checkpoints.glob("*/state.json")):
        try:
            state = read_json(path)
        except InputError:
            continue
        if state.get("kappa"):
            return float(state["exposure"] / state["kappa"])
    return None


def _summary(run: Curves, reference: Curves) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.name, "steps": run.steps[-1]["step"], "exposure": run.steps[-1]["exposure"]}
    low, other = run.lowest, reference.lowest
    if low is None:
        return row
    row |= {
        "lowest_loss": low["loss"],
        "at_step": low["step"],
        "at_exposure": low["exposure"],
        "at_kappa": low["exposure"] / run.best_exposure if run.best_exposure else None,
        "train_loss_there": low["train_loss"],
        "last_loss": run.looks[-1]["loss"],
        "last_gap": run.looks[-1]["loss"] - run.looks[-1]["train_loss"],
    }
    if other and run is not reference and _same_draws(run, reference):
        ours, theirs = (np.array([seen["images"][key] for key in sorted(low["images"])]) for seen in (low, other))
        d = paired_difference(ours, theirs)
        bounded = np.isfinite(d.low)
        interval = (d.low, d.high) if bounded else (None, None)
        row["difference"] = {"mean": d.mean, "low": interval[0], "high": interval[1], "images": d.images}
    return row


def _same_draws(a: Curves, b: Curves) -> bool:
    """Whether two runs measured the same images on the same draws from the same base: then their first looks are the same numbers."""
    ours, theirs = (run.looks[0] if run.looks else None for run in (a, b))
    if not ours or not theirs or ours["step"] or theirs["step"] or set(ours["images"]) != set(theirs["images"]):
        return False
    return all(abs(value - theirs["images"][key]) <= 1e-3 * abs(value) for key, value in ours["images"].items())


def _confounded(rows: Sequence[dict[str, Any]]) -> bool:
    exposures = [row["exposure"] for row in rows]
    return max(exposures) > CONFOUNDED * min(exposures)


def _cautions(runs: Sequence[Curves], reference: Curves, rows: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    if _confounded(rows):
        found.append(
            "These runs differ in exposure by more than 5 %, so a difference in loss may come from exposure alone."
        )
    blind = [run.name for run in runs if not run.looks]
    if blind:
        found.append(f"Trained without validation, so there is no held-out loss: {', '.join(blind)}.")
    other = [run.name for run in runs if run.looks and run is not reference and not _same_draws(run, reference)]
    if other:
        found.append(
            f"Measured on other images, masks or draws, or on another base, than {reference.name}, so losses cannot be paired: {', '.join(other)}."
        )
    return found


def _shown(row: dict[str, Any]) -> tuple[Any, ...]:
    seen, d = "lowest_loss" in row, row.get("difference")
    difference = "—"
    if d:
        interval = "one image" if d["low"] is None else f"{d['low']:+.5f} … {d['high']:+.5f}"
        difference = f"{d['mean']:+.5f} ({interval})"
    return (
        row["run"], f"{row['lowest_loss']:.5f}" if seen else "—", difference, row.get("at_step", "—"), f"{row['at_exposure']:.3g}" if seen else "—",
        f"{row['at_kappa']:.2f}" if row.get("at_kappa") else "—", f"{row['train_loss_there']:.5f}" if seen else "—",
        f"{row['last_loss']:.5f}" if seen else "—", row["steps"], f"{row['exposure']:.3g}",
    )  # fmt: skip
