"""Files are written whole or not at all, and JSON is bounded before it is parsed."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from halfweave import files
from halfweave.errors import CapacityError, CheckpointError
from halfweave.files import MAX_JSON_BYTES, read_json, write_atomically, write_json


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_row_12_a_full_disk_names_the_file_and_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CapacityError, match=r"the disk is full: .*a\.json") as caught:
        write_json(tmp_path / "a.json", {})
    assert "--resume" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\xff\xfe{}", "cannot be read"),
        (b"{", "is not JSON"),
        (b"[1]", "holds no JSON object"),
        (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested deeper"),
        (b" " * (MAX_JSON_BYTES + 1), "at most"),
    ],
)
def test_row_3_a_hostile_json_file_is_a_typed_error(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("quote", ['"', '"\\\\', '"\\"'])
def test_brackets_behind_a_quote_that_does_not_end_do_not_count(tmp_path: Path, quote: str) -> None:
    (tmp_path / "a.json").write_text("[" + quote + "[" * 1000)
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_json(tmp_path / "a.json")


def test_brackets_between_strings_count(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"\\\\": ' + '["\\"]", ' * 65 + "0" + "]" * 65 + "}")
    with pytest.raises(CheckpointError, match="nested deeper"):
        read_json(tmp_path / "a.json")


def test_brackets_inside_strings_do_not_count_as_depth(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"template": "[{" * 500 + '\\"'})
    assert read_json(tmp_path / "a.json")["template"].startswith("[{")
