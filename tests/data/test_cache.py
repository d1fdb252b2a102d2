"""The cache keeps tensors by what they depend on; what is damaged counts as missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdclr.data.cache import TensorCache, content_hash, key_of, weights_hash
from sdclr.errors import StorageError

TENSORS = {"mean": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)}


def entry(folder: Path) -> Path:
    found = list(folder.rglob("*.safetensors"))
    assert len(found) == 1
    return found[0]


def test_what_is_put_is_got_bit_by_bit(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "not" / "there")
    cache.put("abc", TENSORS)
    found = cache.get("abc")
    assert found
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[k], TENSORS[k]) and found[k].dtype == TENSORS[k].dtype for k in TENSORS)


def test_a_tensor_that_is_a_view_of_another_is_stored_whole(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put("abc", {"t": TENSORS["mean"].T})
    found = cache.get("abc")
    assert found
    assert torch.equal(found["t"], TENSORS["mean"].T)


def test_another_key_is_missing(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    assert cache.get("abc") is None
    cache.put("abc", TENSORS)
    assert cache.get("abd") is None


@pytest.mark.parametrize("keep", [0, 4, 20, 100])
def test_an_entry_cut_short_counts_as_missing_and_is_written_anew(tmp_path: Path, keep: int) -> None:
    cache = TensorCache(tmp_path)
    cache.put("abc", TENSORS)
    entry(tmp_path).write_bytes(entry(tmp_path).read_bytes()[:keep])
    assert cache.get("abc") is None
    cache.put("abc", TENSORS)
    assert cache.get("abc")


def test_a_second_put_replaces_the_first_and_leaves_nothing_else(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put("abc", TENSORS)
    cache.put("abc", {"t": torch.zeros(1)})
    found = cache.get("abc")
    assert found
    assert list(found) == ["t"]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [entry(tmp_path)]


def test_a_folder_that_cannot_be_made_is_a_storage_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        TensorCache(tmp_path / "file").put("abc", TENSORS)
    assert "run.output_dir" in str(caught.value.hint)


def test_a_cache_that_cannot_be_read_counts_as_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert TensorCache(tmp_path / "file").get("abc") is None


def test_a_disk_that_fills_up_while_writing_is_a_storage_error_and_leaves_no_half_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object = None) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdclr.data.cache.save_file", full)
    cache = TensorCache(tmp_path)
    with pytest.raises(StorageError, match="No space left"):
        cache.put("abc", TENSORS)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert cache.get("abc") is None


def test_keys_tell_parts_apart() -> None:
    keys = [key_of("a", "b"), key_of("b", "a"), key_of("ab"), key_of("a", "b", ""), key_of("a", 1), key_of("a1")]
    assert len(set(keys)) == len(keys)
    assert key_of("a", 1) == key_of("a", "1")


def test_the_content_hash_is_of_the_bytes_and_not_of_the_name(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"same")
    b.write_bytes(b"same")
    c.write_bytes(b"Same")
    assert content_hash(a) == content_hash(b) != content_hash(c)


def test_the_weights_hash_sees_every_bit_of_name_shape_type_and_value_but_no_order() -> None:
    def with_(**change: torch.Tensor) -> str:
        return weights_hash((TENSORS | change).items())

    same = weights_hash(reversed(list(TENSORS.items())))
    changed = [
        with_(mean=TENSORS["mean"] + torch.tensor([1e-7, 0, 0])),
        with_(mean=TENSORS["mean"].reshape(3, 2)),
        with_(mean=TENSORS["mean"].double()),
        with_(other=torch.zeros(1)),
        with_(scalar=torch.tensor(1.0)),
        with_(scalar=torch.tensor(2.0)),
        weights_hash((name.upper(), tensor) for name, tensor in TENSORS.items()),
    ]
    assert with_() == same
    assert len({same, *changed}) == 1 + len(changed)
