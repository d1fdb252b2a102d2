"""What the frozen encoders made of each picture and caption, kept on disk by content.

A key names everything the tensors depend on (file bytes, resolution, view, encoder weights) and nothing else, so a changed file
re-encodes alone and a changed learning rate re-encodes nothing. Entries that were made together lie together in one safetensors
file, a *pack*, written whole and named by the hash of what it holds: ten thousand small files take longer to open than to encode.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from sdclr.data.batches import in_groups
from sdclr.errors import StorageError

KEYS = "keys"
"""The tensor of a pack that says whose rows the others hold, (entries, bytes of a key)."""
Entry = dict[str, torch.Tensor]


class TensorCache:
    """A folder of packs; a damaged one counts as missing, and what it held is written anew."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._rows: dict[Path, dict[str, int]] = {}

    def get(self, keys: Iterable[str]) -> dict[str, Entry]:
        """The entries stored under those of the keys that there are; tensors are rows of shared memory."""
        wanted, found = set(keys), dict[str, Entry]()
        for path, rows in self._packs():
            here = [key for key in rows if key in wanted and key not in found]
            tensors = _whole(path) if here else None
            if tensors:
                found |= {key: {name: tensor[rows[key]] for name, tensor in tensors.items()} for key in here}
        return found

    def put(self, entries: dict[str, Entry]) -> None:
        """Store entries, those of the same shapes as one pack; raises StorageError when the disk refuses."""
        for group in in_groups(
            entries, lambda key: tuple(t.shape for t in entries[key].values()), max(1, len(entries))
        ):
            self._put_pack({key: entries[key] for key in group})

    def _put_pack(self, entries: dict[str, Entry]) -> None:
        names = next(iter(entries.values()))
        pack = {name: torch.stack([entry[name] for entry in entries.values()]) for name in names}
        pack[KEYS] = torch.tensor([list(bytes.fromhex(key)) for key in entries], dtype=torch.uint8)
        path = self.folder / f"{weights_hash(pack.items())}.safetensors"
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(pack, partial)
            partial.replace(path)
            self._rows.pop(path, None)  # a damaged pack of the same name may have been here
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise StorageError(
                f"the cache {self.folder} cannot be written: {error}", hint="free some space, or set run.output_dir"
            ) from None

    def _packs(self) -> Iterator[tuple[Path, dict[str, int]]]:
        """Every pack, with the row of each key that it says it holds; those of other processes too."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._rows:
                self._rows[path] = _rows(path)
            yield path, self._rows[path]


def _rows(path: Path) -> dict[str, int]:
    try:
        with safe_open(path, "np") as pack:
            return {key.tobytes().hex(): row for row, key in enumerate(np.atleast_1d(pack.get_tensor(KEYS)))}
    except (OSError, SafetensorError):
        return {}


def _whole(path: Path) -> Entry | None:
    """A pack's tensors, or None when they are not those that it was named for."""
    try:
        pack = load(path.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError):
        return None
    return {name: pack[name] for name in pack if name != KEYS} if weights_hash(pack.items()) == path.stem else None


def key_of(*parts: str | int) -> str:
    """A hex key for what an entry depends on."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=20).hexdigest()


def content_hash(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.blake2b(path.read_bytes(), digest_size=20).hexdigest()


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
