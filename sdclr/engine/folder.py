"""The run folder: one process at a time, every file written whole, nothing written anywhere else."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sdclr.errors import InputError, StorageError
from sdclr.report.metrics import SCHEMA, finite


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

    def state(self, named: Path) -> Path:
        """The folder of a kept state: as it is named, or one of this run's own: `final`, `best` (of a run at work its newest), or a checkpoint by
        its name or how that begins, if only one does."""
        if named.exists() or len(named.parts) != 1:
            return named
        if (self.path / named).is_dir():
            return self.path / named
        fitting = [path for path in sorted(self.checkpoints.glob(f"{glob.escape(named.name)}*")) if path.is_dir()]
        newest = named.name in ("best", "average")
        return fitting[-1] if len(fitting) == 1 or (fitting and newest) else named

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
            holder = f"sdclr {what}, process {os.getpid()}, started {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n"
            with storage_errors(self.path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, holder.encode(), 0)
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
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)  # what did not fit must not go on taking space
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """A JSON document with `"schema"` first and a digest of the rest last, whole; numbers that are not finite become null."""
    content = finite({"schema": SCHEMA, **value})
    text = json.dumps({**content, "seal": _seal(content)}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path, sealed: bool = False) -> dict[str, Any]:
    """A JSON object of our schema. Raises InputError when it is missing, damaged or of another schema.

    A seal that is there must fit; with `sealed` it must be there, for files that nobody but this program writes.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: is of schema {value.get('schema') if isinstance(value, dict) else None}, this program reads {SCHEMA}"
        )
    seal = value.pop("seal", None)
    if seal != _seal(value) and (sealed or seal is not None):
        raise InputError(f"{path}: has been altered since it was written", hint="remove it, and it will be made again")
    return value


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def publish(partial: Path, target: Path) -> None:
    """Give a finished folder its name in one rename. An older one of that name is hidden first, so that no half of it is ever seen."""
    if target.exists():
        hide(target)
    partial.replace(target)
    sync_folder(target.parent)
    shutil.rmtree(_hidden(target), ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder, hidden first: half of it must not look like the whole. Raises OSError when it cannot even be hidden."""
    hide(folder)
    shutil.rmtree(_hidden(folder), ignore_errors=True)


def hide(folder: Path) -> None:
    """Take a folder out of sight in one rename."""
    shutil.rmtree(_hidden(folder), ignore_errors=True)  # of an earlier, interrupted time
    folder.replace(_hidden(folder))


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.pruned")


def as_umask_says(path: Path) -> None:
    """Let others open a file, or all below a folder, as they may what this user writes: safetensors makes files that nobody else can read."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.chmod(0o666 & ~mask)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below survive a power cut."""
    for directory, _, names in os.walk(folder, topdown=False):
        for name in names:
            with Path(directory, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(directory))


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def storage_errors(
    path: Path,
    again: str = "then run the same command again, sdclr train with --resume",
    place: str = "run.output_dir",
) -> Iterator[None]:
    """Turn the system's refusal to write into a StorageError that names the place and the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's refusal in an error of its own
        code = getattr(error, "errno", None) or (errno.ENOSPC if "No space left" in str(error) else 0)
        hint = {
            errno.ENOSPC: f"free some space, or keep fewer checkpoints (checkpoint.keep_last, checkpoint.at_troughs); {again}",
            errno.EROFS: f"the disk is read-only: set {place} to one that is not",
            errno.EACCES: f"you may not write there: set {place} to a place of yours",
        }.get(code, f"check that the folder still exists and can be written; {again}")
        raise StorageError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}", hint) from error
