"""Checkpoints that are whole or absent.

A checkpoint is staged in a partial folder; every file and the folder are fsynced; a manifest with each file's sha256 is written
last; one rename makes it visible; only then are older ones pruned. No pickle: weights and optimizer state are safetensors, the
rest is JSON. Everything random derives from the step, so weights, optimizer state and the step are all a run needs to go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sdclr.engine import sharding
from sdclr.engine.folder import as_umask_says, discard, publish, storage_errors, sync_folder, sync_tree
from sdclr.engine.loop import TrainState
from sdclr.errors import CheckpointError, DivergenceError, InputError, StorageError
from sdclr.model import adapters
from sdclr.model.checks import WEIGHTS
from sdclr.model.components import read_trained, read_weights
from sdclr.report.metrics import SCHEMA

MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer.safetensors"
SCALER = "scaler."
"""Before the names of the fp16 loss scale's numbers."""
KINDS = FULL, TROUGH, BEST, AVERAGE = "step", "trough", "best", "average"
"""Kinds of checkpoint, the first part of its folder's name: `step` can be resumed; the others hold weights only."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, known by its folder's name; nothing of it has been read yet."""

    path: Path
    kind: str
    step: int

    @classmethod
    def at(cls, path: Path) -> Checkpoint | None:
        """The one that a folder of this name is; None where it is none."""
        kind, _, rest = path.name.partition("-")
        number = rest.partition("_")[0]
        return cls(path, kind, int(number)) if kind in KINDS and number.isdigit() and path.is_dir() else None

    def info(self) -> dict[str, Any]:
        """Its state.json: step, exposure, kappa, validation loss, the run's config."""
        try:
            return json.loads((self.path / STATE).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: its {STATE} cannot be read: {error}") from None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A state as it is written: the trained models' weights by name, and the optimizer's tensors and numbers, all of them whole."""

    step: int
    exposure: float
    weights: dict[str, dict[str, torch.Tensor]]
    optimizer: tuple[dict[str, torch.Tensor], dict[str, float]]


def snapshot(state: TrainState, modules: dict[str, torch.nn.Module], wanted: bool = True) -> Snapshot:
    """The state now, of the unwrapped trained models, for the process that wants it; where they are in shares, all must ask."""
    weights = {name: sharding.weights_of(module, wanted) for name, module in modules.items()}
    return Snapshot(state.step, state.exposure, weights, pack_optimizer(state.optimizer, wanted))


def save(folder: Path, kind: str, state: Snapshot, models: dict[str, Any], info: dict[str, Any]) -> Checkpoint:
    """Write the state as one checkpoint of `kind`; `models` know the weights' configs, `info` goes into state.json.

    Raises, leaving every earlier checkpoint as it was, StorageError when it cannot be written whole and DivergenceError when it
    holds numbers that are not finite: an update can spoil the weights a step before a loss shows it.
    """
    optimizer = state.optimizer if kind == FULL else None
    _refuse_non_finite(state.step, state.weights, optimizer[0] if optimizer else {})
    return save_model(folder, kind, state.step, state.exposure, models, state.weights, info, optimizer)


def save_model(
    folder: Path, kind: str, step: int, exposure: float, models: dict[str, Any], weights: dict[str, dict[str, torch.Tensor]],
    info: dict[str, Any], optimizer: tuple[dict[str, torch.Tensor], dict[str, float]] | None = None,
) -> Checkpoint:  # fmt: skip
    """As `save`, for weights that may have been kept from an earlier step."""
    name = _name(kind, step, exposure, info.get("kappa"))
    final, partial = folder / name, folder / f".{name}.partial"
    content = {"schema": SCHEMA, "kind": kind, "step": step, "exposure": exposure, **info}
    with storage_errors(final):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        _refuse_full_disk(folder, weights, optimizer)
        try:
            partial.mkdir()
            save_weights(models, weights, partial)
            if optimizer:
                save_file(optimizer[0], partial / OPTIMIZER)
            content["optimizer"] = optimizer[1] if optimizer else {}
            (partial / STATE).write_text(json.dumps(content, indent=1, allow_nan=False))
            as_umask_says(partial)
            _seal(partial)
            publish(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Checkpoint(final, kind, step)


def save_weights(models: dict[str, Any], weights: dict[str, dict[str, torch.Tensor]], folder: Path) -> None:
    """Each model's config.json and weights as diffusers and transformers write them, or the LoRA of all, in safetensors."""
    if any(map(adapters.is_attached, models.values())):
        return adapters.save(models, weights, folder)
    for part, model in models.items():
        (folder / part).mkdir()
        if hasattr(model, "save_config"):  # diffusers'
            model.save_config(folder / part)
        else:
            model.config.save_pretrained(folder / part)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights[part].items()}
        save_file(tensors, folder / part / f"{WEIGHTS[part]}.safetensors", metadata={"format": "pt"})


def restore(checkpoint: Checkpoint, state: TrainState, modules: dict[str, Any]) -> dict[str, Any]:
    """Put a full checkpoint into the state (verified before); returns its state.json."""
    info = checkpoint.info()
    for part, weights in read_trained(checkpoint.path, tuple(modules)).items():
        sharding.load_weights(modules[part], weights)
    unpack_optimizer(state.optimizer, read_weights(checkpoint.path / OPTIMIZER), info["optimizer"])
    state.step, state.exposure = info["step"], info["exposure"]
    return info


def verify(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with a checkpoint on disk; an empty list when every file is there, whole and unaltered."""
    path = checkpoint.path
    try:
        text = (path / MANIFEST).read_bytes()
        expected = dict(json.loads(text)["files"])
        if text != _manifest(expected):
            return [f"{MANIFEST} has been altered"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} is missing or damaged ({type(error).__name__})"]
    found = []
    for name, digest in expected.items():
        file = path / name
        try:
            if not file.is_file():
                found.append(f"{name} is missing")
            elif _sha256(file) != digest:
                found.append(f"{name} has been altered or cut")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def available(folder: Path, kinds: Iterable[str] = KINDS) -> list[Checkpoint]:
    """The checkpoints of a run by step, by their names; partial ones are not checkpoints."""
    found = map(Checkpoint.at, sorted(folder.glob("*-*")) if folder.is_dir() else [])
    return sorted((c for c in found if c and c.kind in kinds), key=lambda c: (c.step, c.kind))


def kept_in(path: Path, beside: Path) -> Checkpoint | None:
    """The checkpoint that a folder is, verified; None for another folder with a unet/ or a LoRA inside. Raises InputError, naming those in
    the folder `beside`, for anything else, and where it is damaged."""
    if not (path / "unet").is_dir() and not (path / adapters.FILE).is_file():
        what = f"is neither a checkpoint nor a diffusers folder (it has no unet/, and no {adapters.FILE})"
        hint = (
            those_in(path.parent)
            or those_in(path / "checkpoints")
            or those_in(beside)
            or "sdclr train leaves them in runs/<name>/checkpoints/, and its models in final/ and best/"
        )
        raise InputError(f"{path}: {what if path.exists() else 'there is no such folder'}", hint=hint)
    checkpoint = Checkpoint.at(path)
    if checkpoint is None:
        if not (path / MANIFEST).is_file():
            return None
        checkpoint = Checkpoint(path, "", 0)  # one whose folder has another name
    problems = verify(checkpoint)
    if problems:
        raise InputError(f"{path}: is damaged: {'; '.join(problems)}")
    return checkpoint


def those_in(folder: Path, kinds: Iterable[str] = KINDS) -> str:
    """For a hint: which checkpoints a folder holds; empty if none."""
    names = ", ".join(c.path.name for c in available(folder, kinds))
    return f"there are, in {folder}: {names}" if names else ""


def newest_sound(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest full checkpoint that verifies together with the best state it counts on, and why each newer one was skipped.

    When the best state is lost to every checkpoint, the newest that verifies by itself: better without its best than no run.
    """
    skipped: list[str] = []
    without_best = None
    for checkpoint in reversed(available(folder, (FULL,))):
        problems = verify(checkpoint)
        if not problems:
            problems = best_beside(checkpoint)[1]
            if not problems:
                return checkpoint, skipped
            without_best = without_best or (checkpoint, list(skipped))
        skipped.append(f"{checkpoint.path}: {'; '.join(problems)}")
    return without_best or (None, skipped)


def best_beside(checkpoint: Checkpoint) -> tuple[Checkpoint | None, list[str]]:
    """The best state that had been seen when a full checkpoint was saved (None: none was kept), and what is wrong with it."""
    step = checkpoint.info().get("best_step")
    if step is None:
        return None, []
    found = [best for best in available(checkpoint.path.parent, (BEST,)) if best.step == step]
    if not found:
        return None, [f"the best state it counts on (step {step}) is missing"]
    return found[0], [f"{found[0].path.name}: {problem}" for problem in verify(found[0])]


def prune(folder: Path, keep_last: int) -> None:
    """Delete full checkpoints older than the last `keep_last`, and every `best` that none of those counts on; never the newest.

    A deletion that fails costs only space.
    """
    full, best = available(folder, (FULL,)), available(folder, (BEST,))
    counted_on = {_best_step(checkpoint) for checkpoint in full[-keep_last:]}
    for checkpoint in (*full[:-keep_last], *(b for b in best[:-1] if b.step not in counted_on)):
        with contextlib.suppress(OSError):
            discard(checkpoint.path)
    _sweep(folder)


def _best_step(checkpoint: Checkpoint) -> int | None:
    try:
        return checkpoint.info().get("best_step")
    except CheckpointError:
        return None  # damaged: nothing can count on it


def discard_after(folder: Path, step: int) -> None:
    """Delete what a resumed run will write again: checkpoints beyond its step, and leftovers of interrupted saves.

    The newest goes first. Raises StorageError when one stays: a later resume would take it for this run's.
    """
    with storage_errors(folder):
        for checkpoint in reversed(available(folder)):
            if checkpoint.step > step:
                discard(checkpoint.path)
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Delete what an interrupted save or a failed deletion has left."""
    for leftover in [*folder.glob(".*.partial"), *folder.glob(".*.pruned")]:
        shutil.rmtree(leftover, ignore_errors=True)


def pack_optimizer(
    optimizer: torch.optim.Optimizer, wanted: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """An optimizer's per-parameter state as tensors named `index.name`, and its plain numbers; with fp16 also its loss scale's."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    seen: set[int] = set()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # As state_dict numbers them; not that itself, which some optimizers nest.
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                gathered = sharding.whole(value).detach()
                if wanted:
                    kept = gathered.cpu().contiguous()
                    # A file holds no tensor twice; 8-bit AdamW has one table for all parameters.
                    tensors[f"{index}.{name}"] = kept.clone() if kept.data_ptr() in seen else kept
                    seen.add(kept.data_ptr())
            elif value is not None:
                numbers[f"{index}.{name}"] = value
    scaler = getattr(optimizer, "scaler", None)  # accelerate's, in fp16: its scale is found by trial over many steps
    numbers |= {SCALER + name: value for name, value in scaler.state_dict().items()} if scaler else {}
    return tensors, numbers


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], numbers: dict[str, float]
) -> None:
    """The inverse of `pack_optimizer`; parameter groups (rates, betas, ...) stay those of the config."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler = {name.removeprefix(SCALER): value for name, value in numbers.items() if name.startswith(SCALER)}
    if scaler and getattr(optimizer, "scaler", None):
        optimizer.scaler.load_state_dict(scaler)  # type: ignore[attr-defined]
    for key, value in (*tensors.items(), *numbers.items()):
        if key.startswith(SCALER):
            continue
        index, _, name = key.partition(".")
        like = parameters[int(index)]
        if isinstance(value, torch.Tensor) and value.shape == like.shape:
            share = sharding.share_of(value, like)
            # A fused update wants it laid out as the weight is.
            value = torch.empty_like(like, dtype=value.dtype).copy_(share)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _name(kind: str, step: int, exposure: float, kappa: float | None) -> str:
    if kind == FULL:
        return f"{kind}-{step:06d}"
    return f"{kind}-{step:06d}_S{exposure:.2e}" + (f"_k{kappa:.2f}" if kappa else "")


def _seal(folder: Path) -> None:
    """Sync every file and folder, then write and sync the manifest of their digests.

    Digests keep a core busy and syncing the disk, so they are made at the same time: a fifth of a large save.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(1) as reader:
        read = reader.map(_sha256, files)
        sync_tree(folder)
        digests = {path.relative_to(folder).as_posix(): digest for path, digest in zip(files, read, strict=True)}
    with (folder / MANIFEST).open("wb") as file:
        file.write(_manifest(digests))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def _manifest(digests: dict[str, str]) -> bytes:
    """The one text that a manifest of these digests can have, sealed by a digest of its own: a flipped bit anywhere in it is seen."""
    seal = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return json.dumps({"schema": SCHEMA, "files": digests, "seal": seal}, indent=1).encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_non_finite(
    step: int, weights: dict[str, dict[str, torch.Tensor]], optimizer: dict[str, torch.Tensor]
) -> None:
    named = {f"{part}: {name}": tensor for part, tensors in weights.items() for name, tensor in tensors.items()}
    named |= {f"optimizer: {name}": tensor for name, tensor in optimizer.items()}
    for name, tensor in named.items():
        if not torch.isfinite(tensor).all():
            raise DivergenceError(
                f"after step {step} the weights are no longer finite ({name}); they were not saved",
                hint="lower schedule.max_lr (sdclr range-test says how far)",
            )


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
