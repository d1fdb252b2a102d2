"""The cache keeps tensors by what they depend on; what is damaged counts as missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdclr.data.cache import TensorCache, content_hash, key_of, weights_hash
from sdclr.errors import StorageError

TENSORS = {"mean": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)}
A, B, C = (key_of(name) for name in "abc")


def packs(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def same(found: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> bool:
    return found.keys() == tensors.keys() and all(
        torch.equal(found[k], tensors[k]) and found[k].dtype == tensors[k].dtype for k in tensors
    )


def test_what_is_put_is_got_bit_by_bit_by_this_and_by_another(tmp_path: Path) -> None:
    entries = {A: TENSORS, B: {name: tensor + 1 for name, tensor in TENSORS.items()}}
    cache = TensorCache(tmp_path / "not" / "there")
    assert cache.get([A]) == {}
    cache.put(entries)
    for reader in (cache, TensorCache(cache.folder)):
        found = reader.get([B, A, C])
        assert found.keys() == {A, B}
        assert all(same(found[key], entries[key]) for key in entries)
        assert reader.get([B]).keys() == {B}
    assert len(packs(tmp_path)) == 1


def test_what_another_has_put_since_is_found(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put({A: TENSORS})
    assert cache.get([A, B]).keys() == {A}
    TensorCache(tmp_path).put({B: {"t": torch.zeros(1)}})
    assert cache.get([A, B]).keys() == {A, B}


def test_a_tensor_that_is_a_view_of_another_is_stored_whole(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put({A: {"t": TENSORS["mean"].T}})
    assert torch.equal(cache.get([A])[A]["t"], TENSORS["mean"].T)


def test_nothing_to_put_writes_nothing(tmp_path: Path) -> None:
    TensorCache(tmp_path).put({})
    assert packs(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 4, 20, 100, -1])
def test_a_pack_cut_short_counts_as_missing_and_is_written_anew(tmp_path: Path, keep: int) -> None:
    TensorCache(tmp_path).put({A: TENSORS})
    (pack,) = packs(tmp_path)
    pack.write_bytes(pack.read_bytes()[:keep])
    cache = TensorCache(tmp_path)
    assert cache.get([A]) == {}
    cache.put({A: TENSORS})
    assert packs(tmp_path) == [pack]
    assert same(cache.get([A])[A], TENSORS)
    assert same(TensorCache(tmp_path).get([A])[A], TENSORS)


def test_a_flipped_bit_anywhere_is_seen(tmp_path: Path) -> None:
    TensorCache(tmp_path).put({A: TENSORS})
    (pack,) = packs(tmp_path)
    whole = pack.read_bytes()
    for place in range(len(whole)):
        pack.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = TensorCache(tmp_path).get([A])
        assert found == {} or same(found[A], TENSORS), f"byte {place}"


def test_a_damaged_pack_does_not_hide_a_sound_one(tmp_path: Path) -> None:
    TensorCache(tmp_path).put({A: TENSORS})
    (damaged,) = packs(tmp_path)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for filler in range(3):  # whatever the order of their names
        TensorCache(tmp_path).put({A: TENSORS, key_of("filler", filler): TENSORS})
    assert same(TensorCache(tmp_path).get([A])[A], TENSORS)


def test_a_folder_that_cannot_be_made_is_a_storage_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        TensorCache(tmp_path / "file").put({A: TENSORS})
    assert "run.output_dir" in str(caught.value.hint)


def test_a_cache_that_cannot_be_read_counts_as_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert TensorCache(tmp_path / "file").get([A]) == {}


def test_a_disk_that_fills_up_while_writing_is_a_storage_error_and_leaves_no_half_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdclr.data.cache.save_file", full)
    cache = TensorCache(tmp_path)
    with pytest.raises(StorageError, match="No space left"):
        cache.put({A: TENSORS})
    assert packs(tmp_path) == []
    assert cache.get([A]) == {}


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

    unchanged = weights_hash(reversed(list(TENSORS.items())))
    changed = [
        with_(mean=TENSORS["mean"] + torch.tensor([1e-7, 0, 0])),
        with_(mean=TENSORS["mean"].reshape(3, 2)),
        with_(mean=TENSORS["mean"].double()),
        with_(other=torch.zeros(1)),
        with_(scalar=torch.tensor(1.0)),
        with_(scalar=torch.tensor(2.0)),
        weights_hash((name.upper(), tensor) for name, tensor in TENSORS.items()),
    ]
    assert with_() == unchanged
    assert len({unchanged, *changed}) == 1 + len(changed)
