"""Opening a model directory: what is damaged, foreign or unsafe is refused, and named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from halfweave.errors import CheckpointError, HalfweaveError, RefusedError, UsageError
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.model import load_model
from safetensors.torch import load_file, save_file
from support.tiny import Tiny, edit_json, pack_directory, save_tiny, write_manifest

Copy = Callable[[Path], Path]
Q = "model.layers.0.self_attn.q_proj"


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights, and the manifest with them, as a forger would."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if (directory / "halfweave.json").exists():
        write_manifest(directory)


def split_into_shards(directory: Path) -> list[Path]:
    """Turn model.safetensors into two shards and an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    placed = {name: files[at % 2] for at, name in enumerate(names)}
    for file in files:
        save_file({n: tensors[n] for n in names if placed[n] == file}, directory / file)
    index = {"metadata": {}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    return [directory / file for file in files]


def test_a_dense_directory_opens(tiny_model: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model)
    assert checkpoint.manifest is None
    assert not checkpoint.linears
    assert checkpoint.linear(Q).kind == "dense"
    assert checkpoint.weight_bytes == (tiny_model / "model.safetensors").stat().st_size


def test_a_packed_directory_opens(packed_model: Path) -> None:
    checkpoint = Checkpoint.open(packed_model)
    assert checkpoint.manifest is not None
    assert checkpoint.linear(Q).kind == "sparse24_int4"
    assert checkpoint.linear(Q).shape == (72, 72)


def test_shards_load_like_one_file(tiny_model: Path, copy_of: Copy) -> None:
    copy = copy_of(tiny_model)
    split_into_shards(copy)
    whole, parts = Checkpoint.open(tiny_model), Checkpoint.open(copy)
    assert whole.names() == parts.names()
    assert all(torch.equal(whole.tensor(name), parts.tensor(name)) for name in whole.names())


def test_a_directory_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    """Row 1."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file", Path("someone/some-model")):
        with pytest.raises(UsageError) as caught:
            Checkpoint.open(path)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_weights_of_another_kind_are_refused(name: str, tiny_model: Path, copy_of: Copy) -> None:
    """Row 2."""
    copy = copy_of(tiny_model)
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(RefusedError) as caught:
        Checkpoint.open(copy)
    assert caught.value.exit_code == 3
    assert caught.value.hint


@pytest.mark.parametrize(
    "text", [None, "", "not json", "[1]", "\x00", "[" * 10_000, '{"a":' * 10_000, b"\xff\xfe"]
)
def test_a_bad_config_is_named(text: str | bytes | None, tiny_model: Path, copy_of: Copy) -> None:
    """Row 3."""
    config = copy_of(tiny_model) / "config.json"
    config.unlink()
    if text is not None:
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(config.parent)


def test_a_huge_config_is_not_parsed(tiny_model: Path, copy_of: Copy) -> None:
    """Row 3."""
    config = copy_of(tiny_model) / "config.json"
    with open(config, "r+b") as file:
        file.truncate(200 * 2**20)
    with pytest.raises(CheckpointError, match=r"config\.json.*bytes"):
        Checkpoint.open(config.parent)


def test_code_in_the_config_is_refused(tiny_model: Path, copy_of: Copy) -> None:
    """Row 4."""
    copy = copy_of(tiny_model)
    edit_json(copy / "config.json", lambda c: c.update(auto_map={"AutoModel": "evil.Model"}))
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(RefusedError, match="auto_map"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_a_cut_off_shard_is_named(cut: int, tiny_model: Path, copy_of: Copy) -> None:
    """Row 18."""
    shard = copy_of(tiny_model) / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(shard.parent)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 36),
        ("intermediate_size", 128),
        ("num_hidden_layers", 3),
        ("vocab_size", 400),
        ("num_key_value_heads", 3),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_config_that_contradicts_the_weights_names_the_tensor(
    field: str, value: int, packed: bool, tiny_model: Path, packed_model: Path, copy_of: Copy
) -> None:
    """Row 20."""
    copy = copy_of(packed_model if packed else tiny_model)
    edit_json(copy / "config.json", lambda config: config.update({field: value}))
    if packed:
        write_manifest(copy)
    with pytest.raises(CheckpointError, match=r"model\.(layers|embed_tokens)"):
        load_model(copy)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(
    tiny_model: Path, copy_of: Copy
) -> None:
    """Row 20."""
    copy = copy_of(tiny_model)
    edit_tensors(copy, lambda t: t.update({"model.norm.weight": torch.ones(71)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*72.*71"):
        load_model(copy)


def test_a_norm_of_integers_is_refused(tiny_model: Path, copy_of: Copy) -> None:
    """Row 20."""
    copy = copy_of(tiny_model)
    edit_tensors(copy, lambda t: t.update({"model.norm.weight": torch.ones(72).to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*float"):
        load_model(copy)


def test_a_group_size_that_contradicts_the_scales_is_refused(
    packed_model: Path, copy_of: Copy
) -> None:
    """Row 20."""
    copy = copy_of(packed_model)

    def regroup(config: dict[str, Any]) -> None:
        config["quantization_config"]["linears"][Q]["group"] = 128

    edit_json(copy / "config.json", regroup)
    write_manifest(copy)
    with pytest.raises(CheckpointError, match=r"q_proj\.scale"):
        load_model(copy)


def test_a_repeated_index_is_refused_at_load(packed_model: Path, copy_of: Copy) -> None:
    """Row 21."""
    copy = copy_of(packed_model)
    edit_tensors(copy, lambda tensors: tensors[f"{Q}.meta"].fill_(0))
    with pytest.raises(CheckpointError, match="q_proj"):
        load_model(copy)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_illegal_scale_is_refused_at_load(
    value: float, packed_model: Path, copy_of: Copy
) -> None:
    """Row 22."""
    copy = copy_of(packed_model)
    edit_tensors(copy, lambda tensors: tensors[f"{Q}.scale"].fill_(value))
    with pytest.raises(CheckpointError, match=r"q_proj\.scale"):
        load_model(copy)


def test_a_missing_shard_is_named(tiny_model: Path, copy_of: Copy) -> None:
    """Row 23."""
    copy = copy_of(tiny_model)
    shards = split_into_shards(copy)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        Checkpoint.open(copy)


@pytest.mark.parametrize("packed", [False, True])
def test_an_extra_shard_is_named(
    packed: bool, tiny_model: Path, packed_model: Path, copy_of: Copy
) -> None:
    """Row 23."""
    copy = copy_of(packed_model if packed else tiny_model)
    save_file({"extra": torch.ones(1)}, copy / "model-00003-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="model-00003-of-00002"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("path", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", ""])
def test_an_index_that_leads_out_is_refused(path: str, tiny_model: Path, copy_of: Copy) -> None:
    """Row 23."""
    copy = copy_of(tiny_model)
    split_into_shards(copy)
    index = copy / "model.safetensors.index.json"
    edit_json(index, lambda i: i["weight_map"].update({"model.norm.weight": path}))
    with pytest.raises(RefusedError):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_directory_is_refused(name: str, tiny_model: Path, copy_of: Copy) -> None:
    """Row 23."""
    copy = copy_of(tiny_model)
    (copy / name).unlink()
    (copy / name).symlink_to(tiny_model / name)
    with pytest.raises(RefusedError, match=name):
        Checkpoint.open(copy)


def test_the_hub_cache_layout_opens(tiny_model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in tiny_model.iterdir():
        (blobs / f"hash-of-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    assert load_model(snapshot).spec.layers == 2


def test_a_tensor_in_two_shards_is_refused(tiny_model: Path, copy_of: Copy) -> None:
    """Row 24."""
    copy = copy_of(tiny_model)
    first, second = split_into_shards(copy)
    save_file({**load_file(first), **load_file(second)}, second)
    with pytest.raises(CheckpointError, match="in both"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["model.norm.weight", f"{Q}.weight"])
def test_a_missing_tensor_is_named(name: str, tiny_model: Path, copy_of: Copy) -> None:
    """Row 24."""
    copy = copy_of(tiny_model)
    edit_tensors(copy, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name):
        load_model(copy)


def test_a_missing_part_of_a_packed_linear_is_named(packed_model: Path, copy_of: Copy) -> None:
    """Row 24."""
    copy = copy_of(packed_model)
    edit_tensors(copy, lambda tensors: tensors.pop(f"{Q}.meta"))
    with pytest.raises(CheckpointError, match=r"q_proj\.meta"):
        load_model(copy)


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    """Row 24."""
    directory = save_tiny(tmp_path / "untied", Tiny(tied=False))
    edit_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="lm_head"):
        load_model(directory)


def test_an_unexpected_tensor_is_only_a_warning(
    tiny_model: Path, copy_of: Copy, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 24."""
    copy = copy_of(tiny_model)
    edit_tensors(copy, lambda tensors: tensors.update(extra=torch.ones(1)))
    load_model(copy)
    assert "extra" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_one_flipped_bit_is_found_and_the_file_named(
    name: str, packed_model: Path, copy_of: Copy
) -> None:
    """Row 25."""
    file = copy_of(packed_model) / name
    data = bytearray(file.read_bytes())
    data[-10 if name == "model.safetensors" else data.index(b" ")] ^= 1
    file.write_bytes(data)
    with pytest.raises(HalfweaveError) as caught:
        Checkpoint.open(file.parent)
    assert name in str(caught.value)


def test_verification_can_be_left_out(packed_model: Path, copy_of: Copy) -> None:
    """Row 25."""
    file = copy_of(packed_model) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        Checkpoint.open(file.parent)
    Checkpoint.open(file.parent, verify=False)


def test_a_file_of_another_size_is_found_even_without_verification(
    packed_model: Path, copy_of: Copy
) -> None:
    file = copy_of(packed_model) / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*bytes"):
        Checkpoint.open(file.parent, verify=False)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"quant_method": "gptq"},
        {"quant_method": "os.system"},
        {"quant_method": None},
    ],
)
def test_a_newer_or_foreign_quantization_is_refused(
    change: dict[str, Any], packed_model: Path, copy_of: Copy
) -> None:
    """Row 26."""
    copy = copy_of(packed_model)
    edit_json(copy / "config.json", lambda config: config["quantization_config"].update(change))
    with pytest.raises(RefusedError):
        Checkpoint.open(copy)


def test_another_tools_block_is_refused(tiny_model: Path, copy_of: Copy) -> None:
    """Rows 10 and 26."""
    copy = copy_of(tiny_model)
    block = {"sparsity_config": {"format": "sparse-24-bitmask"}}
    edit_json(copy / "config.json", lambda config: config.update(block))
    with pytest.raises(RefusedError):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["../../evil", "os.system", "sparse24/../dense", ""])
def test_a_format_is_never_looked_up_outside_its_table(
    name: str, packed_model: Path, copy_of: Copy
) -> None:
    """Row 26."""
    copy = copy_of(packed_model)

    def rename(config: dict[str, Any]) -> None:
        config["quantization_config"]["linears"][Q]["format"] = name

    edit_json(copy / "config.json", rename)
    with pytest.raises(RefusedError):
        Checkpoint.open(copy)


def test_a_link_to_itself_is_refused(tiny_model: Path, copy_of: Copy) -> None:
    """Row 23."""
    copy = copy_of(tiny_model)
    (copy / "loop").symlink_to("loop")
    with pytest.raises(RefusedError, match="loop is a link that leads nowhere"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"format_version": 2}, RefusedError),
        ({"format_version": "1"}, CheckpointError),
        ({"files": {}}, CheckpointError),
        ({"linears": None}, CheckpointError),
        ({"linears": {Q: 3}}, CheckpointError),
        ({"provenance": []}, CheckpointError),
        ({"recipe": "2:4"}, CheckpointError),
        ({"files": {"model.safetensors": {"bytes": 1}}}, CheckpointError),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, RefusedError),
    ],
)
def test_a_bad_manifest_is_refused(
    change: dict[str, Any], kind: type[Exception], packed_model: Path, copy_of: Copy
) -> None:
    """Rows 23 and 26."""
    copy = copy_of(packed_model)
    edit_json(copy / "halfweave.json", lambda manifest: manifest.update(change))
    with pytest.raises(kind):
        Checkpoint.open(copy)


def test_weights_that_the_manifest_does_not_list_are_refused(
    packed_model: Path, copy_of: Copy
) -> None:
    copy = copy_of(packed_model)
    edit_json(copy / "halfweave.json", lambda m: m["files"].pop("model.safetensors"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(copy)


def test_a_packed_directory_without_its_manifest_is_incomplete(
    packed_model: Path, copy_of: Copy
) -> None:
    copy = copy_of(packed_model)
    (copy / "halfweave.json").unlink()
    with pytest.raises(CheckpointError, match="incomplete") as caught:
        Checkpoint.open(copy)
    assert "--resume" in str(caught.value.hint)


def test_a_file_replaced_after_opening_is_found(tiny_model: Path, copy_of: Copy) -> None:
    """Row 27."""
    copy = copy_of(tiny_model)
    checkpoint = Checkpoint.open(copy)
    edit_tensors(copy, lambda tensors: tensors["model.norm.weight"].fill_(2))
    os.utime(copy / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed"):
        checkpoint.tensor("model.norm.weight")


def test_a_file_cut_off_after_opening_is_an_error_not_a_crash(
    tiny_model: Path, copy_of: Copy
) -> None:
    """Row 27."""
    copy = copy_of(tiny_model)
    checkpoint = Checkpoint.open(copy)
    os.truncate(copy / "model.safetensors", 20_000)
    with pytest.raises(CheckpointError):
        checkpoint.tensor("model.norm.weight")


@pytest.mark.parametrize("vocabulary", [300, 311])
def test_a_tokenizer_larger_than_the_embedding_is_refused(vocabulary: int, tmp_path: Path) -> None:
    """Row 29."""
    directory = save_tiny(tmp_path / "small", Tiny(vocabulary=vocabulary))
    with pytest.raises(CheckpointError, match=str(vocabulary)):
        load_model(directory)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("token", [320, -1, [2, 5000]])
def test_an_end_token_out_of_range_is_refused(
    file: str, token: Any, tiny_model: Path, copy_of: Copy
) -> None:
    """Row 29."""
    copy = copy_of(tiny_model)
    edit_json(copy / file, lambda config: config.update(eos_token_id=token))
    with pytest.raises(CheckpointError, match="end token"):
        load_model(copy)


def test_an_unknown_dtype_is_a_usage_error(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="bfloat16"):
        load_model(tiny_model, dtype="int8")


def test_names_with_spaces_and_unicode_are_fine(tiny_model: Path, tmp_path: Path) -> None:
    """Row 17."""
    packed = pack_directory(tiny_model, tmp_path / "ein Modell\nµ", "sparse24")
    assert load_model(packed).name == "ein Modell\nµ"
