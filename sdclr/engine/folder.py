"""The run folder: one process at a time, every file written whole, nothing written anywhere else."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdclr.errors import InputError, StorageError
from sdclr.report.metrics import finite

SCHEMA = 1
"""Version of result.json, metrics.jsonl, state.json and grid.json; changes only when their meaning does."""


class RunFolder:
    """Paths of one run, and its lock."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.range_test = path / "range-test"
        self.samples = path / "samples"
        self.final = path / "final"
        self.best = path / "best"
        self.report = path / "report.html"

    @contextlib.contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Hold the folder for one process. The system drops the lock with the process, so a killed holder leaves none behind.

        Raises InputError naming the holder's process and start when the folder is in use.
        """
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise StorageError(f"{self.path}: cannot be locked: {error.strerror}") from None
                holder = os.pread(handle, 300, 0).decode(errors="replace").strip() or "another process"
                raise InputError(
                    f"{self.path} is in use by {holder}",
                    hint="wait for it, stop it, or give this run another name: --set run.name=...",
                ) from None
            os.ftruncate(handle, 0)
            os.pwrite(
                handle,
                f"sdclr {what}, process {os.getpid()}, started {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n".encode(),
                0,
            )
            yield
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file whole: partial name, fsync, rename. Raises StorageError and leaves the old file when the disk refuses."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """As write_text, for bytes."""
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """A JSON document with `"schema"` first, whole; numbers that are not finite become null."""
    write_text(
        path, json.dumps(finite({"schema": SCHEMA, **value}), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of our schema. Raises InputError when it is missing, damaged or of another schema."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: is of schema {value.get('schema') if isinstance(value, dict) else None}, this program reads {SCHEMA}"
        )
    return value


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a StorageError that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        hint = {
            errno.ENOSPC: "free some space, or keep fewer checkpoints (checkpoint.keep_last, checkpoint.at_troughs); then: sdclr train CONFIG --resume",
            errno.EROFS: "the disk is read-only: set run.output_dir to one that is not",
            errno.EACCES: "you may not write there: set run.output_dir to a folder of yours",
        }.get(
            error.errno or 0, "check that the folder still exists and can be written, then: sdclr train CONFIG --resume"
        )
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}", hint) from error
