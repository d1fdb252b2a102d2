"""`sdclr export`: a kept state of a run as one .safetensors file, for the programs that people generate with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sdclr.config import source
from sdclr.config.schema import ModelSection
from sdclr.engine.fingerprint import another_base
from sdclr.engine.folder import RunFolder, as_umask_says, storage_errors, sync_folder
from sdclr.errors import InputError
from sdclr.report import console

if TYPE_CHECKING:
    import torch

    from sdclr.engine.checkpoint import Checkpoint
    from sdclr.model.components import Components


def export(
    config_path: Path,
    overrides: Sequence[str] = (),
    checkpoint: Path | None = None,
    precision: str = "fp16",
    output: Path | None = None,
) -> None:
    """Write the run's final model or LoRA, or that of a checkpoint, and print the file's path. Raises InputError where there is
    none, where it is damaged, and where `output` exists."""
    import torch

    from sdclr.engine.checkpoint import kept_in
    from sdclr.model import adapters, components, single_file

    if precision not in components.DTYPES:
        raise InputError(f"--precision must be fp16, bf16 or fp32; got {precision!r}")
    loaded = source.load(config_path, overrides)
    config, folder = loaded.config, RunFolder(loaded.config.folder)
    if not checkpoint and not folder.final.is_dir():
        raise InputError(f"{folder.final}: there is no such folder", hint=f"train first: sdclr train {loaded.typed}  (or name a state that was kept: --checkpoint)")  # fmt: skip
    kept = folder.state(checkpoint) if checkpoint else folder.final
    _refuse_another_base(kept_in(kept, folder.checkpoints), config.model)
    target = output or folder.path / "export" / f"{config.run.name}-{kept.resolve().name}.safetensors"
    if target.suffix != ".safetensors":
        raise InputError(f"--output {target}: its name must end in .safetensors")
    _refuse_to_overwrite(target)
    title = f"{config.run.name} {kept.resolve().name}", config.data.resolution
    if (kept / adapters.FILE).is_file():
        with torch.device("meta"):
            parts = components.skeleton(config.model)
        weights, settings = adapters.read(kept)
        tensors = single_file.lora_layout(parts, weights, settings, precision)
        about = single_file.about_lora(parts, *title, settings["unet"])
    else:
        parts = _whole(config.model, kept)
        tensors, about = single_file.original_layout(parts, precision), single_file.about(parts, *title)
    _write(target, tensors, about)
    console.result(str(target))


def _refuse_to_overwrite(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise InputError(f"{target}: is there already", hint="remove it, or name another with --output")


def _refuse_another_base(checkpoint: Checkpoint | None, model: ModelSection) -> None:
    """What a checkpoint does not hold comes from the base: it must be the one that it was trained from."""
    named = another_base(checkpoint.info(), model) if checkpoint else None
    if checkpoint and named:
        raise InputError(
            f"{checkpoint.path}: was trained from {named} as it was then, and model.base is {model.base}",
            hint="export it with the config of its own run, and put back what that was trained from",
        )


def _whole(model: ModelSection, kept: Path) -> Components:
    """A whole model as it is; a checkpoint laid over its base."""
    from sdclr.model import components
    from sdclr.model.checks import INDEX

    if (kept / INDEX).is_file():
        return components.load(model.model_copy(update={"base": str(kept), "config": None}))
    parts = components.load(model)
    components.load_trained(parts, kept)
    return parts


def _write(target: Path, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> None:
    """Whole or not at all."""
    from safetensors.torch import save_file

    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with storage_errors(target, again="then run the same command again", place="--output"):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, partial, metadata=about)
            as_umask_says(partial)
            with partial.open("r+b") as file:
                _in_order(file)
                os.fsync(file.fileno())
            _refuse_to_overwrite(target)  # another export may have been quicker
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(target.parent)


def _in_order(file: BinaryIO) -> None:
    """safetensors writes metadata in another order each time; sorted, the same state leaves the same bytes."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    file.seek(8)
    file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
