"""What the frozen encoders made of each picture and caption, kept on disk by content.

A key names everything the tensors depend on (file bytes, resolution, view, encoder weights) and nothing else, so a changed file
re-encodes alone and a changed learning rate re-encodes nothing. Entries are safetensors files, written whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdclr.errors import StorageError


class TensorCache:
    """A folder of named tensor sets; a damaged entry counts as missing and is written anew."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors stored under `key`, or None."""
        try:
            with safe_open(self._path(key), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
                digest = (file.metadata() or {}).get("digest")
        except (OSError, SafetensorError):
            return None
        return tensors if digest == weights_hash(tensors.items()) else None

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Store tensors under `key`; raises StorageError when the disk refuses."""
        path = self._path(key)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(whole, partial, metadata={"digest": weights_hash(whole.items())})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise StorageError(
                f"the cache {self.folder} cannot be written: {error}", hint="free some space, or set run.output_dir"
            ) from None

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def key_of(*parts: str | int) -> str:
    """A hex key for what an entry depends on."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=20).hexdigest()


def content_hash(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


def weights_hash(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of named tensors: names, shapes and values."""
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in sorted(parameters, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
            if tensor.ndim
            else tensor.detach().cpu().numpy().tobytes()
        )
    return digest.hexdigest()
