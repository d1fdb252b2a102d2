"""Files are written whole, results carry their schema, a folder belongs to one process."""

from __future__ import annotations

import errno
import json
import os

import pytest

from sdclr.engine.folder import RunFolder, read_json, write_json, write_text
from sdclr.errors import InputError, StorageError


def test_a_folder_in_use_names_its_holder_and_start(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked("train"), pytest.raises(InputError) as problem, RunFolder(folder.path).locked("range-test"):
        pass
    assert f"sdclr train, process {os.getpid()}, started 20" in problem.value.message
    assert str(folder.path) in problem.value.message
    assert problem.value.hint


def test_the_lock_ends_with_its_block_and_with_an_error_in_it(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), folder.locked("train"):
        raise ZeroDivisionError
    with folder.locked("train"):
        pass


def test_a_lock_file_left_behind_by_a_killed_process_does_not_lock(tmp_path):
    (tmp_path / ".lock").write_text("sdclr train, process 1, started 2020-01-01 00:00:00\n" * 3)
    with RunFolder(tmp_path).locked("train"):
        assert (tmp_path / ".lock").read_text().count("\n") == 1


def test_a_refused_write_leaves_the_old_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file.txt"
    write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"file\.txt: cannot be written: No space left") as problem:
        write_text(path, "new")
    assert problem.value.exit_code == 1
    assert "free some space" in str(problem.value.hint)
    assert path.read_text() == "old"


def test_json_is_written_with_its_schema_and_read_back(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1, "κ": "S*"})
    assert json.loads((tmp_path / "a.json").read_text()).items() >= {"schema": 1, "x": 1, "κ": "S*"}.items()
    assert read_json(tmp_path / "a.json") == {"schema": 1, "x": 1, "κ": "S*"}


@pytest.mark.parametrize("text", ['{"schema": 2}', "{}", "[1]", '{"schema": 1', "", "\xff"])
def test_json_of_another_schema_or_damaged_is_refused_by_name(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_json_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        read_json(tmp_path / "a.json")


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("inf"), float("nan"), 1.5], "y": {"z": float("-inf")}})
    assert read_json(tmp_path / "a.json") == {"schema": 1, "x": [None, None, 1.5], "y": {"z": None}}
