"""A directory of shards: agreement, damage, and attempts to lead the reader elsewhere."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from halfweave.errors import CheckpointError, HalfweaveError, RefusedError
from halfweave.kernels.shards import ShardedTensors, read_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    first = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    second = {"c": torch.zeros(2, 2, dtype=torch.uint8)}
    safetensors.torch.save_file(first, tmp_path / "model-1.safetensors")
    safetensors.torch.save_file(second, tmp_path / "model-2.safetensors")
    placed = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    write_index(tmp_path, placed)
    return tmp_path


def write_index(directory: Path, placed: object) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def raw(header: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_tensors_are_found_across_shards(sharded: Path) -> None:
    tensors = ShardedTensors.open(sharded)
    assert tensors.names() == ["a", "b", "c"]
    assert tensors.shape("a") == (2, 3)
    assert tensors.dtype("b") == torch.bfloat16
    assert tensors.file_of("c").name == "model-2.safetensors"
    assert torch.equal(tensors.read("a"), torch.arange(6.0).view(2, 3))


def test_row_27_a_file_cut_off_after_opening_is_an_error_and_no_crash(sharded: Path) -> None:
    tensors = ShardedTensors.open(sharded)
    with open(sharded / "model-1.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors"):
        tensors.read("a")


def test_an_empty_tensor_is_read(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(0, 3)}, tmp_path / "model.safetensors")
    assert ShardedTensors.open(tmp_path).read("a").shape == (0, 3)


def test_row_27_what_was_read_does_not_change_with_the_file(sharded: Path) -> None:
    tensor = ShardedTensors.open(sharded).read("a")
    with open(sharded / "model-1.safetensors", "r+b") as file:
        file.truncate(0)
    assert torch.equal(tensor, torch.arange(6.0).view(2, 3))
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors"):
        read_shard(sharded / "model-1.safetensors")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_row_23_an_index_that_leads_out_is_refused(sharded: Path, name: str) -> None:
    write_index(sharded, {"a": name})
    with pytest.raises(RefusedError, match="not a file of this directory"):
        ShardedTensors.open(sharded)


def test_row_23_a_link_out_of_the_directory_is_refused(sharded: Path, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    (sharded / "model-2.safetensors").rename(outside)
    (sharded / "model-2.safetensors").symlink_to(outside)
    with pytest.raises(RefusedError, match="leads out of the directory"):
        ShardedTensors.open(sharded)


def test_row_23_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        ShardedTensors.open(sharded)


def test_row_24_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, sharded / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="tensor a is in both"):
        ShardedTensors.open(sharded)


def test_row_24_a_tensor_that_the_index_promises_must_be_there(sharded: Path) -> None:
    safetensors.torch.save_file({"d": torch.ones(1)}, sharded / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="tensor c is not in"):
        ShardedTensors.open(sharded)


def test_row_25_a_flipped_bit_is_found_by_hash(sharded: Path) -> None:
    import hashlib

    path = sharded / "model-1.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(read_shard(path, digest)) == {"a", "b"}
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is damaged"):
        read_shard(path, digest)


def test_row_2_pickled_weights_are_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(RefusedError, match="never opened") as caught:
        ShardedTensors.open(tmp_path)
    assert "safe_serialization=True" in str(caught.value.hint)


def test_row_2_a_gguf_directory_names_the_import(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(RefusedError) as caught:
        ShardedTensors.open(tmp_path)
    assert "halfweave import" in str(caught.value.hint)


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        ShardedTensors.open(tmp_path)


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_row_18_a_file_cut_anywhere_is_a_typed_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3, 3), "b": torch.zeros(2)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ShardedTensors.open(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
    ],
)
def test_row_19_a_lying_header_is_refused(tmp_path: Path, entry: dict[str, object]) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw({"a": entry}, b"\0" * 8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ShardedTensors.open(tmp_path)


@pytest.mark.parametrize("length", [0, 2**27, 2**63])
def test_row_18_an_absurd_header_length_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ShardedTensors.open(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "nope",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        "[" * 20000,
        '"' + "x" * 9,
    ],
)
def test_row_3_a_malformed_index_is_a_typed_error(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(HalfweaveError, match=r"index\.json"):
        ShardedTensors.open(sharded)
