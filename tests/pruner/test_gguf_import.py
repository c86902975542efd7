"""GGUF files into Hugging Face directories: tiny real files, and the real SmolLM2 where it is."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from halfweave.errors import CheckpointError, RefusedError, UsageError
from halfweave.pruner.gguf_file import GgufFile, locate_smollm2
from halfweave.pruner.importers import IMPORT_RECORD, import_gguf, plan_import
from safetensors.torch import load_file
from support.gguf import BLOCKS, CHAT_TEMPLATE, gguf, tiny_llama, write_gguf


def after_quantization(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """The numbers a row keeps; blocks run along rows, so their order does not matter."""
    if weight.ndim == 1:
        return weight
    kind = gguf.GGMLQuantizationType[quantization]
    data = gguf.quants.quantize(weight.numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(data, kind))


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny model ☕.gguf")


@pytest.fixture(scope="module")
def imported(tiny_gguf: Path) -> Path:
    out = tiny_gguf.parent / "imported"
    import_gguf(tiny_gguf, out, dtype="float32")
    return out


def test_every_weight_is_the_dequantized_one_in_its_right_place(imported: Path) -> None:
    weights = load_file(imported / "model.safetensors")
    expected = tiny_llama()
    assert set(weights) - {"lm_head.weight"} == set(expected)
    for name, (_, weight, _) in expected.items():
        torch.testing.assert_close(
            weights[name], after_quantization(weight, "Q4_1"), rtol=0, atol=1e-6
        )


def test_a_float_file_is_imported_exactly_and_not_called_dequantized(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "float.gguf", "F32")
    result = import_gguf(file, tmp_path / "out", dtype="float32")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, (_, weight, _) in tiny_llama().items():
        assert torch.equal(weights[name], weight)
    assert "DEQUANTIZED" not in result.notice
    assert not json.loads((tmp_path / "out" / IMPORT_RECORD).read_text())["dequantized"]


def test_the_config_is_a_dense_models_and_holds_no_quantization(imported: Path) -> None:
    config = json.loads((imported / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == BLOCKS
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 2
    assert str(imported.parent) not in json.dumps(config)


def test_the_tokenizer_and_its_chat_template_come_along(imported: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(imported)
    text = "he said: 1 + 12 = ☕<s>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<s>").input_ids == [1]
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.chat_template == CHAT_TEMPLATE
    noted = (imported / "tokenizer_config.json").read_text()
    assert "local" not in noted


def test_digits_are_split_off_before_spaces_are_merged(imported: Path) -> None:
    """SmolLM's own rule: the two spaces before a digit are one token, as before the end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(imported)
    assert tokenizer.tokenize("  7") == ["ĠĠ", "7"]


def test_the_directory_says_that_its_weights_were_dequantized(
    tiny_gguf: Path, imported: Path
) -> None:
    readme = (imported / "README.md").read_text(encoding="utf-8")
    record = json.loads((imported / IMPORT_RECORD).read_text(encoding="utf-8"))
    digest = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    assert "DEQUANTIZED" in readme
    assert digest in readme
    assert record["dequantized"] is True
    assert record["source"]["sha256"] == digest
    assert record["source"]["tensor_types"] == {"F32": 2 * BLOCKS + 1, "Q4_1": 7 * BLOCKS + 1}
    assert {"halfweave", "transformers", "gguf"} <= set(record["versions"])


def test_files_beside_the_source_are_not_taken_for_parts_of_it(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "chat_template.jinja").write_text("another model's")
    import_gguf(file, tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    )
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


def test_progress_says_what_is_read_and_the_result_what_became_of_it(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    steps: list[tuple[int, int, str]] = []
    plan = plan_import(tiny_gguf, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = import_gguf(tiny_gguf, tmp_path / "out", progress=lambda *step: steps.append(step))
    assert steps == [
        (1, 3, f"read {tiny_gguf.name}"),
        (2, 3, "converted 20 tensors to bfloat16"),
        (3, 3, "wrote out"),
    ]
    assert plan.source.parameters == result.parameters
    assert plan.output_bytes == pytest.approx(result.nbytes, rel=0.05)
    assert "DEQUANTIZED to bfloat16" in result.notice
    assert result.nbytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            import_gguf(path, tmp_path / "out")


def test_an_unknown_dtype_is_a_usage_error(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8"):
        import_gguf(tiny_gguf, tmp_path / "out", dtype="int8")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip", b"\x00" * 64])
def test_another_kind_of_file_is_named_as_such(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        import_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_cut_anywhere_is_called_damaged(tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    header = GgufFile.open(tiny_gguf)
    assert header.architecture == "llama"
    cut = tmp_path / "cut.gguf"
    for size in (*range(4, 200, 7), *range(200, len(whole), len(whole) // 50), len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GgufFile.open(cut)


def test_a_model_without_one_of_its_tensors_is_no_whole_model(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    data = file.read_bytes().replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_nowd.weight")
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="whole model"):
        import_gguf(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("taken", ["directory", "file", "dangling link"])
def test_a_taken_output_is_refused_and_left_alone(
    tiny_gguf: Path, tmp_path: Path, taken: str
) -> None:
    """Row 11."""
    out = tmp_path / "out"
    if taken == "directory":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif taken == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RefusedError, match="exists already"):
        import_gguf(tiny_gguf, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_may_be_filled_whatever_its_name(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    """Row 17: spaces, a newline and letters beyond ASCII."""
    out = tmp_path / "new dir" / "ein\nModell ☕"
    out.mkdir(parents=True)
    import_gguf(tiny_gguf, out)
    assert (out / "model.safetensors").is_file()
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_missing_gguf_package_is_told_with_the_command(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError) as caught:
        import_gguf(tiny_gguf, tmp_path / "out")
    assert "pip install" in (caught.value.hint or "")


def test_a_killed_import_leaves_no_directory_that_looks_complete(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    """Row 13: killed as soon as the first weights are on the disk."""
    out = tmp_path / "out"
    script = "import sys; from pathlib import Path; from halfweave.pruner.importers import *; "
    script += "import_gguf(Path(sys.argv[1]), Path(sys.argv[2]))"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_gguf), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not list(tmp_path.glob(".out.*/model.safetensors")):
        time.sleep(0.001)
    process.kill()
    process.wait()
    leftovers = [p.name for p in tmp_path.iterdir()]
    assert "out" not in leftovers or (out / IMPORT_RECORD).is_file()
    assert all(name == "out" or name.endswith(".incomplete") for name in leftovers)
    if not out.exists():
        import_gguf(tiny_gguf, out)
    assert (out / IMPORT_RECORD).is_file()


def test_smollm2_answers_a_question_and_stops(tmp_path: Path) -> None:
    """The real model: fluent, and its end-of-turn token ends it."""
    try:
        file = locate_smollm2()
    except UsageError as error:
        pytest.skip(f"{error.message}; {error.hint}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import_gguf(file, tmp_path / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**ids, max_new_tokens=32, do_sample=False)[0]
    assert tokenizer.decode(output[-1:]) == "<|im_end|>"
    assert "Paris" in tokenizer.decode(output[ids["input_ids"].shape[1] :])
