"""Validation curves that another program logged: a CSV of learning rate, step and loss, read into arms.

    lr,step,val_loss,image      # the order is free, other columns are left alone; `image` may be missing
    1e-6,0,0.1312,cat-01        # step 0: the untouched model
    1e-6,50,0.1290,cat-01       # 50 steps at the constant rate of 1e-6, from the untouched model

Every problem of the file is reported at once, each with its line.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from sdclr.errors import DataError
from sdclr.lr.bounds import Arm

COLUMNS = ("lr", "step", "val_loss")
MAX_BYTES, SHOWN = 200_000_000, 20
HINT = (
    "a header line with the columns lr, step, val_loss and, if you can, image; rows with step 0 are the untouched model"
)


@dataclasses.dataclass(frozen=True)
class Curves:
    """The untouched model's loss of each image (images,), and one arm a rate, from the slowest up."""

    images: tuple[str, ...]
    base: np.ndarray
    arms: tuple[Arm, ...]


@dataclasses.dataclass(frozen=True)
class _Row:
    line: int
    lr: float
    step: int
    loss: float
    image: str


def read(path: Path) -> Curves:
    """Raises DataError naming every line that cannot be used.

    A loss that is not finite marks its arm as diverged from that step on. Without an image column the whole set counts as one image,
    and no interval over images can be told.
    """
    found: list[str] = []
    rows = _rows(path, _text(path), found)
    _refuse(path, found)
    base = _base(path, [row for row in rows if row.step == 0], found)
    by_rate: dict[float, list[_Row]] = defaultdict(list)
    for row in rows:
        if row.step:
            by_rate[row.lr].append(row)
    if not by_rate:
        found.append(f"{path}: has no row with a step above 0")
    images = tuple(sorted(base))
    arms = [_arm(path, lr, by_rate[lr], images, found) for lr in sorted(by_rate)] if base else []
    _refuse(path, found)
    return Curves(images, np.array([base[image] for image in images]), tuple(arm for arm in arms if arm is not None))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError([f"{path}: is larger than {MAX_BYTES:,} bytes"], "log fewer steps")
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError([f"{path}: is not UTF-8 text (byte {error.start})"], "save the file as UTF-8") from None
    except OSError as error:
        raise DataError([f"{path}: cannot be read: {error.strerror or error}"], HINT) from None


def _rows(path: Path, text: str, found: list[str]) -> list[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as problem:
        found.append(f"{path}:1: is not CSV: {problem}")
        return []
    missing = [name for name in COLUMNS if name not in header]
    doubled = [name for name in (*COLUMNS, "image") if header.count(name) > 1]
    if missing or doubled:
        what = f"has no column {', '.join(missing)}" if missing else f"has column {', '.join(doubled)} twice"
        found.append(f"{path}:1: {what} (its columns are: {', '.join(header) or 'none'})")
        return []
    place = {name: header.index(name) for name in (*COLUMNS, "image") if name in header}
    rows: list[_Row] = []
    seen: dict[tuple[float, int, str], int] = {}
    try:
        for cells in reader:
            line = reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                found.append(f"{path}:{line}: has {len(cells)} values, the header has {len(header)} columns")
                continue
            row = _row(f"{path}:{line}", line, {name: cells[i].strip() for name, i in place.items()}, found)
            if row is None:
                continue
            key = (row.lr, row.step, row.image)
            if key in seen:
                image = f", image {row.image}" if row.image else ""
                found.append(
                    f"{path}:{line}: repeats line {seen[key]} (lr {row.lr:g}, step {row.step}{image}); "
                    "several images need an image column, several runs of one rate need files of their own"
                )
                continue
            seen[key] = line
            rows.append(row)
    except csv.Error as error:
        found.append(f"{path}:{reader.line_num}: is not CSV: {error}")
    return rows


def _row(place: str, line: int, cells: dict[str, str], found: list[str]) -> _Row | None:
    before = len(found)
    numbers: dict[str, float] = {}
    for name in COLUMNS:
        try:
            numbers[name] = float(cells[name])
        except ValueError:
            found.append(f"{place}: {name} is not a number: {cells[name]!r}")
    step, lr = numbers.get("step"), numbers.get("lr")
    if step is not None and (not math.isfinite(step) or step < 0 or step != int(step)):
        found.append(f"{place}: step must be a whole number from 0 up; got {cells['step']}")
    elif lr is not None and step is not None and (not math.isfinite(lr) or lr < 0 or (lr == 0 and step > 0)):
        found.append(f"{place}: lr must be above 0; got {cells['lr']}")
    if "image" in cells and not cells["image"]:
        found.append(f"{place}: image is empty")
    if len(found) > before:
        return None
    return _Row(line, numbers["lr"], int(numbers["step"]), numbers["val_loss"], cells.get("image", ""))


def _base(path: Path, rows: list[_Row], found: list[str]) -> dict[str, float]:
    """Each image's loss with the untouched model; runs that all logged their step 0 are averaged."""
    if not rows:
        found.append(f"{path}: has no row with step 0, so the untouched model's loss is not known")
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if not math.isfinite(row.loss):
            found.append(f"{path}:{row.line}: the untouched model's loss is {row.loss}")
        values[row.image].append(row.loss)
    return {image: float(np.mean(losses)) for image, losses in values.items()}


def _arm(path: Path, lr: float, rows: list[_Row], images: tuple[str, ...], found: list[str]) -> Arm | None:
    by_step: dict[int, dict[str, _Row]] = defaultdict(dict)
    for row in rows:
        by_step[row.step][row.image] = row
    points: list[tuple[int, list[float]]] = []
    diverged = False
    for step, measured in sorted(by_step.items()):
        absent, strange = sorted(set(images) - set(measured)), sorted(set(measured) - set(images))
        if absent or strange:
            line = min(row.line for row in measured.values())
            what = (
                f"lacks image {', '.join(absent)}" if absent else f"has image {', '.join(strange)}, which step 0 lacks"
            )
            found.append(f"{path}:{line}: lr {lr:g}, step {step} {what}")
            continue
        losses = [measured[image].loss for image in images]
        if not np.isfinite(losses).all():
            diverged = True
            break
        points.append((step, losses))
    if not points and not diverged:
        return None
    exposure = lr * np.array([step for step, _ in points], dtype=float)
    return Arm(lr, exposure, np.array([losses for _, losses in points]).reshape(-1, len(images)), diverged)


def _refuse(path: Path, found: list[str]) -> None:
    if found:
        more = [f"{path}: and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise DataError([*found[:SHOWN], *more], HINT)
