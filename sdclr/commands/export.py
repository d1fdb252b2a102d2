"""`sdclr export`: a kept state of a run as one .safetensors file, for the programs that people generate with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdclr.config import source
from sdclr.engine.folder import RunFolder, storage_errors, sync_folder
from sdclr.errors import InputError
from sdclr.report import console


def export(
    config_path: Path,
    overrides: Sequence[str] = (),
    checkpoint: Path | None = None,
    precision: str = "fp16",
    output: Path | None = None,
) -> None:
    """Write the run's final model, or the base with a checkpoint's weights, and print the file's path. Raises InputError where there is
    none, where it is damaged, and where `output` exists."""
    from sdclr.model import components, single_file
    from sdclr.model.checks import WEIGHTS

    if precision not in single_file.DTYPES:
        raise InputError(f"--precision must be fp16, bf16 or fp32; got {precision!r}")
    loaded = source.load(config_path, overrides)
    config, folder = loaded.config, RunFolder(loaded.config.folder)
    kept = checkpoint or folder.final
    _refuse_what_cannot_be_read(kept, folder, loaded.typed)
    target = output or folder.path / "export" / f"{config.run.name}-{kept.name}.safetensors"
    if target.suffix != ".safetensors":
        raise InputError(f"--output {target}: its name must end in .safetensors")
    if target.exists():
        raise InputError(f"{target}: is there already", hint="remove it, or name another with --output")
    parts = components.load(config.model)
    components.load_trained(parts, kept, tuple(name for name in WEIGHTS if (kept / name).is_dir()))
    about = single_file.about(parts, f"{config.run.name} {kept.name}", config.data.resolution)
    _write(target, single_file.original_layout(parts, precision), about)
    console.result(str(target))


def _refuse_what_cannot_be_read(kept: Path, folder: RunFolder, typed: str) -> None:
    from sdclr.engine.checkpoint import MANIFEST, Checkpoint, those_in, verify

    if not (kept / "unet").is_dir():
        what = "has no unet/ in it" if kept.exists() else "there is no such folder"
        fresh = f"train first: sdclr train {typed}"
        raise InputError(f"{kept}: {what}", hint=f"name a state with --checkpoint; {those_in(folder.checkpoints) or fresh}")  # fmt: skip
    problems = verify(Checkpoint(kept, "", 0)) if (kept / MANIFEST).is_file() else []
    if problems:
        raise InputError(f"{kept}: is damaged: {'; '.join(problems)}")


def _write(target: Path, tensors: dict, about: dict[str, str]) -> None:
    """Whole or not at all."""
    import os

    from safetensors.torch import save_file

    partial = target.with_name(f".{target.name}.partial")
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, partial, metadata=about)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(target.parent)
