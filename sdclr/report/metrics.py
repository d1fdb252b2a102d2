"""The run's numbers: one JSON object a line, the source of every curve; the same as CSV, and as TensorBoard files when asked for.

No clock is in it: the lines of a run that was interrupted and resumed are, byte for byte, those of one that was not.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdclr.errors import InputError

SCHEMA = 1
"""Version of result.json, metrics.jsonl, state.json and grid.json; changes only when their meaning does."""
HEADER = {
    "schema": SCHEMA,
    "kind": "header",
    "columns": "kind: step (every optimizer step) or validation (every measurement)",
}

READ = {"step": {"lr", "loss", "exposure"}, "validation": {"exposure", "loss", "train_loss"}}


class MetricsLog:
    """Appends records to metrics.jsonl; opening it cuts everything beyond `upto_step`, and a last line that was never finished.

    A disk that refuses a line does not stop the run: the line waits in memory until `sync`, which every checkpoint asks for first.
    """

    def __init__(self, path: Path, upto_step: int | None = None, tensorboard: Path | None = None):
        self.path = path
        kept = [r for r in read(path) if r["step"] <= upto_step] if upto_step is not None else []
        text = "".join(map(_line, [HEADER, *kept])).encode()
        self._digest = hashlib.sha256(text)
        self.waiting = b""
        self.file = self._begin(text)
        self.board = _tensorboard(tensorboard, upto_step) if tensorboard else None

    def add(self, kind: str, step: int, **values: Any) -> None:
        """One record; `step` is the number of optimizer steps done."""
        line = _line({"kind": kind, "step": step, **values}).encode()
        self._digest.update(line)
        self.waiting += line
        with contextlib.suppress(OSError):
            self._write()
            if self.board:
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self.board.add_scalar(f"{kind}/{name}", value, step)

    @property
    def digest(self) -> str:
        """Of all lines so far: a checkpoint keeps it, and a resumed run knows by it whether its curves are whole."""
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Make everything added so far survive a power cut; raises OSError. A file that has vanished is written again."""
        self._write()
        if not self.path.exists():
            self.file.seek(0)
            text = self.file.readall()
            self.file.close()
            self.file = self._begin(text)
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Finish the files; what can still be written is."""
        with contextlib.suppress(OSError):
            self.sync()
        self.file.close()
        if self.board:
            self.board.close()

    def _begin(self, text: bytes) -> io.FileIO:
        """The file with this text, written whole, open for more."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        self.whole = len(text)
        return io.FileIO(self.path, "a+")

    def _write(self) -> None:
        while self.waiting:
            self.file.truncate(self.whole)  # a write that failed may have left a part of itself
            written = self.file.write(self.waiting)
            self.whole, self.waiting = self.whole + written, self.waiting[written:]


class Unwritten(MetricsLog):
    """The log of a process that leaves the writing to another."""

    digest = ""

    def __init__(self) -> None:
        pass

    def add(self, kind: str, step: int, **values: Any) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics file, without its header; [] when there is none."""
    return list(_records(path)) if path.is_file() else []


def complete(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those records that hold all that figures and tables read: a damaged file must not cost a finished run its report."""
    return [r for r in records if READ[r["kind"]] <= r.keys()]


def as_csv(records: list[dict[str, Any]]) -> str:
    """The scalar columns of all records, one row a record."""
    columns = list(
        dict.fromkeys(key for r in records for key, value in r.items() if not isinstance(value, (list, dict)))
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def finite(value: Any) -> Any:
    """The same dicts and lists with null for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict[str, Any]) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line the run died in, or a damaged one
            known = isinstance(record, dict) and record.get("kind") in ("step", "validation")
            if known and isinstance(record.get("step"), int):
                yield record


def _tensorboard(folder: Path, upto_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "run.tensorboard: true needs tensorboard, which is not installed",
            hint="pip install 'sdclr[tensorboard]', or leave run.tensorboard out: metrics.csv and report.html hold the same numbers",
        ) from None
    return SummaryWriter(str(folder), purge_step=None if upto_step is None else upto_step + 1)
