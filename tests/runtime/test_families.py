"""What families have of their own: names, experts, and which decoder serves them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from halfweave.bench.token_bytes import token_bytes
from halfweave.errors import CheckpointError, UnsupportedModel
from halfweave.kernels.cpu.library import library
from halfweave.kernels.cpu.packed import packed_bytes
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.decoder import Decoder
from halfweave.runtime.engine import Engine
from halfweave.runtime.families import decoder_spec
from halfweave.runtime.fused import FusedDecoder
from halfweave.runtime.inspection import inspect_checkpoint
from halfweave.runtime.model import load_model
from halfweave.runtime.paged import Part
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.request import GenerationRequest, TextDelta
from safetensors.torch import load_file, save_file
from support.tiny import (
    FAMILIES,
    FUSED_FAMILIES,
    VOCABULARY,
    Tiny,
    dense_model,
    pack_directory,
    save_tiny,
)
from torch import Tensor

CPU = torch.device("cpu")


def tokens(count: int, seed: int = 7) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def exact(directory: Path) -> Decoder:
    checkpoint = Checkpoint.open(directory)
    return Decoder(checkpoint, decoder_spec(checkpoint.config), torch.float32, CPU)


def rewrite(directory: Path, tensors: dict[str, Tensor]) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", FAMILIES)
def test_names_without_the_base_prefix_and_old_buffers_are_those_of_transformers(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the hub has them; transformers itself reads the same directory."""
    directory = save_tiny(tmp_path / "model", FAMILIES[name])
    stored = load_file(directory / "model.safetensors")
    prefix = f"{dense_model(directory).base_model_prefix}."
    tensors = {each.removeprefix(prefix): stored[each] for each in stored}
    assert tensors.keys() != stored.keys()
    if name == "gpt2":
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    if name == "gpt_neox":
        tensors["layers.0.attention.bias"] = torch.ones(1, 1, 8, 8)
        tensors["layers.0.attention.rotary_emb.inv_freq"] = torch.ones(3)
    rewrite(directory, tensors)
    ids = tokens(20)
    with torch.inference_mode():
        wanted = dense_model(directory)(ids[None]).logits[0]
    with caplog.at_level(logging.WARNING, "halfweave"):
        decoder = load_model(directory, "float32").decoder
    found = decoder.logits(decoder.forward(ids, decoder.new_cache()))
    assert (found - wanted).abs().max() < 1e-4
    assert "unexpected" not in caplog.text


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", FAMILIES["gpt2"])
    tensors = load_file(directory / "model.safetensors")
    rewrite(directory, {**tensors, "ln_f.bias": tensors["transformer.ln_f.bias"].clone()})
    with pytest.raises(CheckpointError, match=r"ln_f\.bias and another tensor are both"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("name", FAMILIES)
def test_sequences_in_one_batch_get_what_they_get_alone(name: str, tmp_path: Path) -> None:
    decoder = exact(save_tiny(tmp_path / "model", FAMILIES[name]))
    texts = [tokens(length, seed) for seed, length in enumerate((40, 7, 23))]
    alone = [decoder.forward(text, decoder.new_cache()) for text in texts]
    pages, memory = [[5, 2, 8], [7], [0, 6]], decoder.new_memory(9)
    found: list[list[Tensor]] = [[], [], []]
    for start in range(0, 40, 3):
        running = [i for i in range(3) if start < len(texts[i])]
        news = [texts[i][start : start + 3].tolist() for i in running]
        parts = [Part(new, start, pages[i]) for i, new in zip(running, news, strict=True)]
        states = decoder.run(parts, memory).split([len(new) for new in news])
        for i, rows in zip(running, states, strict=True):
            found[i].append(rows)
    for wanted, rows in zip(alone, found, strict=True):
        assert (wanted - torch.cat(rows)).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_fuses_what_it_can_and_stays_near_exact_arithmetic(name: str, tmp_path: Path) -> None:
    packed = pack_directory(
        save_tiny(tmp_path / "model", FAMILIES[name]), tmp_path / "packed", "sparse24_int4"
    )
    fast, ids = load_model(packed), tokens(60)
    assert isinstance(fast.decoder, FusedDecoder if name in FUSED_FAMILIES else Decoder)
    wanted, found = (
        each.logits(each.forward(ids, each.new_cache())).log_softmax(-1)
        for each in (load_model(packed, "float32").decoder, fast.decoder)
    )
    assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) < 0.02


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("gemma2", "less than others, norms behind .*scaled embeddings.*capped scores"),
        ("gemma3", "less than others, norms behind .*a scale of attention of its own"),
        ("mixtral", "experts"),
        ("opt 350m", "norms of sums, no norm before the head, an embedding of another size"),
        ("opt without a last norm", "no norm before the head"),
        ("qwen3_moe", "experts"),
    ],
)
def test_the_fused_decoder_says_what_it_lacks(name: str, lacking: str, tmp_path: Path) -> None:
    checkpoint, native = Checkpoint.open(save_tiny(tmp_path / "m", FAMILIES[name])), library()
    assert native is not None
    with pytest.raises(UnsupportedModel, match=lacking):
        FusedDecoder(checkpoint, decoder_spec(checkpoint.config), native)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - FUSED_FAMILIES.keys()))
def test_the_engine_writes_what_transformers_writes(name: str, tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "model", FAMILIES[name]), "float32")
    oracle = dense_model(model.checkpoint.path)
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [tokens(length, seed).tolist() for seed, length in enumerate((30, 5))]
    with Engine(model) as engine:
        streams = [
            engine.stream(GenerationRequest(str(at), tuple(prompt), greedy))
            for at, prompt in enumerate(prompts)
        ]
        answers = [
            [token for event in stream if isinstance(event, TextDelta) for token in event.token_ids]
            for stream in streams
        ]
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = oracle.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert wanted[0, len(prompt) :].tolist() == answer


def test_an_expert_is_run_on_those_tokens_only_that_chose_it(tmp_path: Path) -> None:
    """One that gives no numbers spoils nobody else."""
    directory, ids = save_tiny(tmp_path / "model", Tiny(family="mixtral", layers=1)), tokens(40)
    with torch.inference_mode():
        told = dense_model(directory)(ids[None], output_router_logits=True)
    chose = (told.router_logits[0].topk(2).indices == 3).any(-1)
    assert 0 < int(chose.sum()) < 40
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"][:] = torch.nan
    rewrite(directory, tensors)
    decoder = exact(directory)
    hidden = decoder.forward(ids, decoder.new_cache())
    assert torch.equal(hidden.isnan().any(-1), chose)


@pytest.mark.parametrize("kind", ["sparse24_int4", "dense"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_token_reads_the_experts_it_chose(name: str, kind: str, tmp_path: Path) -> None:
    """Of 5 experts 2, of 7 experts 3; and attention, routers and the head as a whole."""
    source, native = save_tiny(tmp_path / "model", FAMILIES[name]), library()
    path = source if kind == "dense" else pack_directory(source, tmp_path / "packed", kind)
    assert native is not None
    group, dtype = (32, None) if kind == "sparse24_int4" else (None, torch.float32)
    total = 0.0
    tensors = load_file(source / "model.safetensors")
    for tensor, weight in tensors.items():
        of_block = tensor.startswith("model.layers.") and weight.dim() == 2
        if not of_block and tensor != f"{decoder_spec(config_of(path)).head_name}.weight":
            continue
        packed = of_block and not tensor.endswith(".gate.weight")
        stored = (kind, group, dtype) if packed else ("dense", None, torch.float32)
        share = 1.0 if ".experts." not in tensor else 2 / 5 if name == "mixtral" else 3 / 7
        total += share * packed_bytes(native, stored[0], tuple(weight.shape), *stored[1:])
    roof = inspect_checkpoint(path).roof
    assert roof is not None
    assert roof.token_bytes == token_bytes(load_model(path)) == round(total)
    assert roof.experts == ((2, 5) if name == "mixtral" else (3, 7))


def config_of(directory: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((directory / "config.json").read_text())
    return config


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_tells_of_every_linear(name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", FAMILIES[name])
    packed = pack_directory(source, tmp_path / "packed", "sparse24_int4")
    for path in (source, packed):
        report = inspect_checkpoint(path)
        shapes = {linear.name: linear.shape for linear in report.linears}
        entries = Checkpoint.open(packed).linears
        assert shapes == {linear: entry.shape for linear, entry in entries.items()}
