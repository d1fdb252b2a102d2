"""Checkpoints that are whole or absent.

A checkpoint is staged in a partial folder; every file and the folder are fsynced; a manifest with each file's sha256 is written
last; one rename makes it visible; only then are older ones pruned. No pickle: weights and optimizer state are safetensors, the
rest is JSON. Everything random derives from the step, so weights, optimizer state and the step are all a run needs to go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sdclr.engine.folder import SCHEMA, storage_errors, sync_folder
from sdclr.engine.loop import TrainState
from sdclr.errors import CheckpointError, StorageError
from sdclr.model.components import WEIGHTS, read_weights

MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer.safetensors"
FULL, TROUGH, BEST, AVERAGE = "step", "trough", "best", "average"
"""Kinds of checkpoint, the first part of its folder's name: `step` can be resumed; the others hold weights only."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, known by its folder's name; nothing of it has been read yet."""

    path: Path
    kind: str
    step: int

    def info(self) -> dict[str, Any]:
        """Its state.json: step, exposure, kappa, validation loss, the run's config."""
        try:
            return json.loads((self.path / STATE).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: its {STATE} cannot be read: {error}") from None


def save(folder: Path, kind: str, state: TrainState, modules: dict[str, Any], info: dict[str, Any]) -> Checkpoint:
    """Write the state as one checkpoint of `kind`; `modules` are the unwrapped trained models, `info` goes into state.json.

    Raises StorageError, leaving every earlier checkpoint as it was, when it cannot be written whole.
    """
    weights = {name: module.state_dict() for name, module in modules.items()}
    optimizer = pack_optimizer(state.optimizer) if kind == FULL else None
    return save_model(folder, kind, state.step, state.exposure, modules, weights, info, optimizer)


def save_model(
    folder: Path, kind: str, step: int, exposure: float, modules: dict[str, Any], weights: dict[str, dict[str, torch.Tensor]],
    info: dict[str, Any], optimizer: tuple[dict[str, torch.Tensor], dict[str, float]] | None = None,
) -> Checkpoint:  # fmt: skip
    """As `save`, for weights that may have been kept from an earlier step."""
    name = _name(kind, step, exposure, info.get("kappa"))
    final, partial = folder / name, folder / f".{name}.partial"
    with storage_errors(final):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        _refuse_full_disk(folder, weights, optimizer)
        partial.mkdir()
        try:
            for part, module in modules.items():
                save_weights(module, weights[part], partial / part, part)
            if optimizer:
                save_file(optimizer[0], partial / OPTIMIZER)
            content = {
                "schema": SCHEMA,
                "kind": kind,
                "step": step,
                "exposure": exposure,
                **info,
                "optimizer": optimizer[1] if optimizer else {},
            }
            (partial / STATE).write_text(json.dumps(content, indent=1, allow_nan=False))
            _seal(partial)
            if final.exists():  # this very step, saved before an interruption
                shutil.rmtree(final)
            partial.replace(final)
            sync_folder(folder)
        except SafetensorError as error:
            raise StorageError(
                f"{final}: cannot be written: {error}", hint="free some space, then: sdclr train CONFIG --resume"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Checkpoint(final, kind, step)


def save_weights(module: Any, weights: dict[str, torch.Tensor], folder: Path, part: str) -> None:
    """A model's config.json and weights as diffusers and transformers write them, in safetensors."""
    folder.mkdir(parents=True)
    module.save_config(folder) if hasattr(module, "save_config") else module.config.save_pretrained(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / f"{WEIGHTS[part]}.safetensors", metadata={"format": "pt"})


def restore(checkpoint: Checkpoint, state: TrainState, modules: dict[str, Any]) -> dict[str, Any]:
    """Put a full checkpoint into the state (verified before); returns its state.json."""
    info = checkpoint.info()
    for part, module in modules.items():
        module.load_state_dict(read_weights(checkpoint.path / part / f"{WEIGHTS[part]}.safetensors"))
    unpack_optimizer(state.optimizer, read_weights(checkpoint.path / OPTIMIZER), info["optimizer"])
    state.step, state.exposure = info["step"], info["exposure"]
    return info


def verify(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with a checkpoint on disk; an empty list when every file is there, whole and unaltered."""
    path = checkpoint.path
    try:
        text = (path / MANIFEST).read_text()
        expected = dict(json.loads(text)["files"])
        if text != _manifest(expected):
            return [f"{MANIFEST} has been altered"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} is missing or damaged ({type(error).__name__})"]
    found = []
    for name, digest in expected.items():
        file = path / name
        try:
            if _sha256(file) != digest:
                found.append(f"{name} has been altered or cut")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def available(folder: Path, kinds: Iterable[str] = (FULL, TROUGH, BEST, AVERAGE)) -> list[Checkpoint]:
    """The checkpoints of a run by step, by their names; partial ones are not checkpoints."""
    found = []
    for path in sorted(folder.glob("*-*")) if folder.is_dir() else []:
        kind, _, rest = path.name.partition("-")
        number = rest.partition("_")[0]
        if kind in kinds and number.isdigit() and path.is_dir():
            found.append(Checkpoint(path, kind, int(number)))
    return sorted(found, key=lambda c: (c.step, c.kind))


def newest_sound(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest full checkpoint that verifies, and for each newer one that does not, why it was skipped."""
    skipped: list[str] = []
    for checkpoint in reversed(available(folder, (FULL,))):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.path}: {'; '.join(problems)}")
    return None, skipped


def prune(folder: Path, keep_last: int) -> None:
    """Delete full checkpoints older than the last `keep_last`, and all but the newest `best`. A deletion that fails costs only space."""
    full, best = available(folder, (FULL,)), available(folder, (BEST,))
    for checkpoint in (*full[:-keep_last], *best[:-1]):
        doomed = folder / f".{checkpoint.path.name}.pruned"  # a half-deleted checkpoint must not look like one
        try:
            checkpoint.path.replace(doomed)
        except OSError:
            continue
        shutil.rmtree(doomed, ignore_errors=True)


def discard_after(folder: Path, step: int) -> None:
    """Delete what a resumed run will write again: checkpoints beyond its step, and leftovers of interrupted saves."""
    for checkpoint in available(folder):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
    for leftover in [*folder.glob(".*.partial"), *folder.glob(".*.pruned")] if folder.is_dir() else []:
        shutil.rmtree(leftover, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """An optimizer's per-parameter state as tensors named `index.name`, and its plain numbers."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            elif value is not None:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], numbers: dict[str, float]
) -> None:
    """The inverse of `pack_optimizer`; parameter groups (rates, betas, ...) stay those of the config."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *numbers.items()):
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _name(kind: str, step: int, exposure: float, kappa: float | None) -> str:
    if kind == FULL:
        return f"{kind}-{step:06d}"
    return f"{kind}-{step:06d}_S{exposure:.2e}" + (f"_k{kappa:.2f}" if kappa else "")


def _seal(folder: Path) -> None:
    """fsync every file, then write and fsync the manifest, then the folders."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    digests = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        digests[path.relative_to(folder).as_posix()] = _sha256(path)
    with (folder / MANIFEST).open("w") as file:
        file.write(_manifest(digests))
        file.flush()
        os.fsync(file.fileno())
    for directory in {p.parent for p in files} | {folder}:
        sync_folder(directory)


def _manifest(digests: dict[str, str]) -> str:
    """The manifest's text, with a digest of the digests, so that a flipped bit in the manifest itself is seen."""
    seal = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return json.dumps({"schema": SCHEMA, "files": digests, "seal": seal}, indent=1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_full_disk(
    folder: Path, weights: dict[str, dict[str, torch.Tensor]], optimizer: tuple[dict[str, torch.Tensor], Any] | None
) -> None:
    """Ask for the space before writing."""
    tensors = [t for part in weights.values() for t in part.values()] + (
        list(optimizer[0].values()) if optimizer else []
    )
    need = sum(t.numel() * t.element_size() for t in tensors) * 1.02 + 1_000_000
    free = shutil.disk_usage(folder).free
    if need > free:
        raise StorageError(
            f"{folder}: the next checkpoint needs {need / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB left",
            hint="free some space, or keep fewer: checkpoint.keep_last, checkpoint.at_troughs; then: sdclr train CONFIG --resume",
        )
