"""`sdclr compare`: several runs' curves in one picture, against step and against exposure, and their numbers in one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdclr.engine.folder import RunFolder, write_bytes, write_text
from sdclr.errors import InputError
from sdclr.lr.paired import paired_difference
from sdclr.report import console, figures, metrics, page

HEADER = (
    "run",
    "lowest loss",
    "difference to the first (95 % interval)",
    "at step",
    "at exposure",
    "last loss",
    "steps",
    "exposure",
)


def compare(runs: Sequence[Path], output: Path, as_json: bool = False) -> None:
    """Write compare.png and compare.html, print the table; warns when exposures differ, for then schedule and exposure are confounded."""
    loaded = list(zip(_names(runs), map(_records, runs), strict=True))
    rows = [_summary(name, records, loaded[0][1]) for name, records in loaded]
    exposures = [row["exposure"] for row in rows]
    confounded = max(exposures) > 1.05 * min(exposures)
    picture = figures.comparison(loaded)
    lead = (
        "These runs differ in exposure by more than 5 %, so a difference in loss may come from exposure alone."
        if confounded
        else ""
    )
    shown = [_shown(row) for row in rows]
    write_bytes(output / "compare.png", picture)
    write_text(
        output / "compare.html",
        page.render(
            "Runs compared",
            lead,
            [{"title": "Curves", "picture": picture}, {"title": "Numbers", "header": HEADER, "rows": shown}],
        ),
    )
    if as_json:
        found = metrics.finite({"schema": 1, "runs": rows, "confounded_by_exposure": confounded})
        console.result(json.dumps(found, allow_nan=False))
        return
    if confounded:
        console.warn(lead)
    console.table(shown, HEADER)
    console.result(str(output / "compare.png"))


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, or their whole paths where two runs have one name."""
    names = [folder.resolve().name for folder in runs]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, runs, strict=True)]


def _records(folder: Path) -> list[dict[str, Any]]:
    records = metrics.complete(metrics.read(RunFolder(folder).metrics))
    if not any(r["kind"] == "step" for r in records):
        raise InputError(f"{folder}: holds no metrics of a run (metrics.jsonl)")
    return records


def _summary(name: str, records: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [r for r in records if r["kind"] == "step"]
    row: dict[str, Any] = {"run": name, "steps": steps[-1]["step"], "exposure": steps[-1]["exposure"]}
    low, other = _lowest(records), _lowest(first)
    if low is None:
        return row
    row |= {
        "lowest_loss": low["loss"],
        "at_step": low["step"],
        "at_exposure": low["exposure"],
        "last_loss": _checks(records)[-1]["loss"],
    }
    shared = sorted(set(low["images"]) & set(other["images"])) if other else []
    if other and shared and other is not low:
        ours, theirs = (np.array([seen["images"][key] for key in shared]) for seen in (low, other))
        d = paired_difference(ours, theirs)
        row["difference"] = {"mean": d.mean, "low": d.low, "high": d.high, "images": d.images}
    return row


def _checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in records if r["kind"] == "validation"]


def _lowest(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    return min(_checks(records), key=lambda r: r["loss"], default=None)


def _shown(row: dict[str, Any]) -> tuple[Any, ...]:
    d = row.get("difference")
    difference = f"{d['mean']:+.5f} ({d['low']:+.5f} … {d['high']:+.5f})" if d else "—"
    seen = "lowest_loss" in row
    return (
        row["run"], f"{row['lowest_loss']:.5f}" if seen else "—", difference, row.get("at_step", "—"), f"{row['at_exposure']:.3g}" if seen else "—",
        f"{row['last_loss']:.5f}" if seen else "—", row["steps"], f"{row['exposure']:.3g}",
    )  # fmt: skip
