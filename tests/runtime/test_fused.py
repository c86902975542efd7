"""The fused decoder: what the op-by-op decoder computes, in one call a step."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from halfweave.errors import CapacityError, CheckpointError, HalfweaveError, UsageError
from halfweave.kernels import dispatch
from halfweave.kernels.cpu.decoder import NativeDecoder, Norm
from halfweave.runtime import model as model_module
from halfweave.runtime.attention import FloatMemory
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.decoder import Decoder
from halfweave.runtime.families import decoder_spec
from halfweave.runtime.fused import FusedBits, FusedDecoder
from halfweave.runtime.inspection import inspect_checkpoint
from halfweave.runtime.model import load_model
from halfweave.runtime.paged import Part, SequenceCache
from support.cpu_levels import LEVELS_HERE, UNDER_TEST, at_level
from support.tiny import FUSED_FAMILIES, LLAMA3_ROPE, VOCABULARY, Tiny, pack_directory, save_tiny
from torch import Tensor

# Of the largest, against the same kernels called one by one. Both add floats in their own order, so
# an input at the edge between two codes may take the other one; what reads it later then differs by
# a step of 8 bits here and there. Before the first such input, only floats' last bits differ.
FIRST, MOST, MEAN = 1e-5, 0.05, 0.003
MODELS = {
    "tied": Tiny(),
    "untied": Tiny(tied=False),
    "one key-value head": Tiny(kv_heads=1),
    "no sharing of heads": Tiny(kv_heads=6),
    "biases": Tiny(options={"attention_bias": True, "mlp_bias": True}),
    "own head size": Tiny(options={"head_dim": 16}),
    "large heads": Tiny(heads=2, kv_heads=1, options={"head_dim": 72}),
    "llama3 rope": Tiny(options={"rope_parameters": LLAMA3_ROPE}),
    "many heads share": Tiny(hidden=80, heads=10, kv_heads=1),
    "gelu": Tiny(options={"hidden_act": "gelu"}),
    **FUSED_FAMILIES,
}


def on_the_8_bit_grid(directory: Path) -> Path:
    """Round embedding and head so that 8 bits hold them exactly: the largest of 32 is 127 steps."""
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    spec = decoder_spec(json.loads((directory / "config.json").read_text()))
    for name in {f"{spec.names.embedding}.weight", f"{spec.head_name}.weight"}:
        codes = torch.round(tensors[name] * 256).clamp(-126, 126)
        codes[:, ::32] = 127
        tensors[name] = (codes / 256).contiguous()
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return directory


def packed(tmp_path: Path, tiny: Tiny, kind: str = "sparse24_int4") -> Checkpoint:
    dense = on_the_8_bit_grid(save_tiny(tmp_path / "dense", tiny))
    return Checkpoint.open(pack_directory(dense, tmp_path / "packed", kind))


def fused(checkpoint: Checkpoint, level: str = LEVELS_HERE[0]) -> FusedDecoder:
    return FusedDecoder(checkpoint, decoder_spec(checkpoint.config), at_level(level))


def tokens(count: int, seed: int = 7) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def logits(decoder: FusedDecoder | Decoder, ids: Tensor, sizes: list[int]) -> Tensor:
    cache = decoder.new_cache()
    parts = [decoder.forward(part, cache) for part in ids.split(sizes)]  # type: ignore[arg-type]
    return decoder.logits(torch.cat(parts))


class HalfMemory(FloatMemory):
    """Keys and values rounded as the fused decoder's are."""

    def store(self, layer: int, at: Tensor, keys: Tensor, values: Tensor) -> None:
        super().store(layer, at, keys.half().float(), values.half().float())


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_kernels_called_one_by_one(
    name: str, level: str, tmp_path: Path
) -> None:
    checkpoint = packed(tmp_path, MODELS[name])
    spec = decoder_spec(checkpoint.config)
    unfused = Decoder(checkpoint, spec, torch.float32, torch.device("cpu"), exact=False)
    decoder, ids = fused(checkpoint, level), tokens(70)
    with torch.inference_mode():
        shape = (spec.layers, spec.kv_heads, spec.head_dim)
        cache = SequenceCache(HalfMemory(shape, 5, torch.float32, torch.device("cpu")), 70)
        wanted = unfused.forward(ids, cache)
    found = decoder.forward(ids, decoder.new_cache())
    difference, largest = (found - wanted).abs(), wanted.abs().max()
    assert difference[0].max() < FIRST * largest
    assert difference.max() < MOST * largest
    assert difference.mean() < MEAN * largest
    # The head rounds its inputs too, which the other decoder's does not.
    loss = unfused.logits(wanted) - decoder.logits(wanted)
    assert loss.abs().max() < 0.02 * unfused.logits(wanted).abs().max()


def test_logits_follow_those_of_exact_arithmetic(tmp_path: Path) -> None:
    checkpoint = packed(tmp_path, Tiny())
    exact = Decoder(checkpoint, decoder_spec(checkpoint.config), torch.float32, torch.device("cpu"))
    ids = tokens(70)
    with torch.inference_mode():
        wanted = logits(exact, ids, [70]).log_softmax(-1)
    found = logits(fused(checkpoint), ids, [70]).log_softmax(-1)
    assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) < 0.005


@pytest.mark.parametrize("level", LEVELS_HERE)
def test_a_sequence_gets_the_same_bits_however_it_is_cut(level: str, tmp_path: Path) -> None:
    decoder = fused(packed(tmp_path, Tiny(kv_heads=1)), level)
    ids = tokens(90)
    whole = logits(decoder, ids, [90])
    for sizes in ([1] * 90, [17, 1, 1, 31, 40], [64, 26]):
        assert torch.equal(whole, logits(decoder, ids, sizes)), sizes


def test_sequences_in_one_batch_get_the_bits_they_get_alone(tmp_path: Path) -> None:
    """Three sequences of different lengths in shared pages, a few tokens of each in one call."""
    decoder = fused(packed(tmp_path, Tiny()))
    texts = [tokens(length, seed) for seed, length in enumerate((40, 7, 23))]
    alone = [decoder.forward(text, decoder.new_cache()) for text in texts]
    pages, memory = [[5, 2, 8], [7], [0, 6]], decoder.new_memory(9)
    memory.bytes.fill_(255)  # NaN, were it read
    found: list[list[Tensor]] = [[], [], []]
    starts, cut = [0, 0, 0], random.Random(1)
    while running := [i for i in range(3) if starts[i] < len(texts[i])]:
        parts = []
        for i in running:
            new = texts[i][starts[i] : starts[i] + cut.randint(1, 5)]
            parts.append(Part(new.tolist(), starts[i], pages[i]))
        states = decoder.run(parts, memory).split([len(part.tokens) for part in parts])
        for i, part, rows in zip(running, parts, states, strict=True):
            found[i].append(rows)
            starts[i] = part.end
    for wanted, rows in zip(alone, found, strict=True):
        assert torch.equal(wanted, torch.cat(rows))


def test_a_full_cache_is_refused_and_stays_usable(tmp_path: Path) -> None:
    decoder = fused(packed(tmp_path, Tiny()))
    cache = decoder.new_cache(limit=20)
    decoder.forward(tokens(18), cache)
    with pytest.raises(CapacityError, match="21 positions, the model has 20"):
        decoder.forward(tokens(3), cache)
    decoder.forward(tokens(2), cache)
    assert cache.length == 20


@pytest.mark.parametrize(
    ("ids", "positions", "pages", "starts"),
    [
        ([VOCABULARY], [0], [0], [0]),
        ([-1], [0], [0], [0]),
        ([1], [-1], [0], [0]),
        ([1], [16], [0], [0]),
        ([1], [2**62], [0], [0]),
        ([1], [0], [1], [0]),
        ([1], [0], [-1], [0]),
        ([1], [0], [0], [1]),
        ([1], [0], [0], [-(2**62)]),
    ],
)
def test_what_is_out_of_range_is_refused_by_the_library(
    ids: list[int], positions: list[int], pages: list[int], starts: list[int], tmp_path: Path
) -> None:
    native = fused(packed(tmp_path, Tiny())).native
    memory = torch.zeros(native.page_bytes, dtype=torch.uint8)
    arguments = (torch.tensor(positions), torch.tensor(pages, dtype=torch.int32))
    with pytest.raises(HalfweaveError, match="out of range"):
        native.forward(
            torch.tensor(ids, dtype=torch.int32), *arguments, torch.tensor(starts), memory
        )


def test_auto_fuses_and_float32_does_not(tmp_path: Path) -> None:
    checkpoint = packed(tmp_path, Tiny())
    for path in (checkpoint.path, tmp_path / "packed-dense"):
        assert isinstance(load_model(path).decoder, FusedDecoder)
        assert isinstance(load_model(path, "float32").decoder, Decoder)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_exact_results_come_without_the_kernels(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the head: it must be possible to test the kernels against them."""

    def forbidden(*_: object) -> None:
        raise AssertionError("the kernels were asked for")

    for module in (dispatch, model_module):
        monkeypatch.setattr(module, "library", forbidden)
    decoder = load_model(packed(tmp_path, MODELS[name]).path, "float32").decoder
    decoder.logits(decoder.forward(tokens(5), decoder.new_cache()))


@pytest.mark.parametrize("kind", ["sparse24_int4", "sparse24", "dense"])
@pytest.mark.parametrize("name", ["tied", "untied", "bloom", "gpt2", "gpt_neox", "phi3"])
def test_the_roof_counts_what_a_token_reads(name: str, kind: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "dense", MODELS[name])
    path = source if kind == "dense" else pack_directory(source, tmp_path / "packed", kind)
    blocks, ends = fused(Checkpoint.open(path)).native.weights
    linears = [weight for block in blocks for weight in block.linears if weight]
    roof = inspect_checkpoint(path).roof
    assert roof is not None
    assert roof.token_bytes == sum(w.struct.bytes for w in [*linears, ends.head])


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_head_of_4_bits_is_smaller_and_near_the_one_of_8(name: str, tmp_path: Path) -> None:
    checkpoint = packed(tmp_path, MODELS[name])
    spec, library = decoder_spec(checkpoint.config), at_level(LEVELS_HERE[0])
    fine, coarse = (
        FusedDecoder(checkpoint, spec, library, FusedBits(head=bits)) for bits in (8, 4)
    )
    heads = [decoder.native.weights[1].head.struct for decoder in (fine, coarse)]
    assert heads[1].bytes < 0.6 * heads[0].bytes
    hidden = fine.forward(tokens(30), fine.new_cache())
    assert torch.equal(hidden, coarse.forward(tokens(30), coarse.new_cache()))  # and nothing else
    wanted, found = fine.logits(hidden), coarse.logits(hidden)
    assert 0 < (found - wanted).norm() < 0.15 * wanted.norm()


class CodeMemory(FloatMemory):
    """Keys and values rounded to 8 bits, a scale for every vector of a head."""

    def store(self, layer: int, at: Tensor, keys: Tensor, values: Tensor) -> None:
        super().store(layer, at, *(on_127_steps(each) for each in (keys, values)))


def on_127_steps(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale) * scale


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("name", ["tied", "large heads", "mistral", "bloom"])
def test_keys_and_values_of_8_bits(name: str, level: str, tmp_path: Path) -> None:
    """Fewer bytes than half and a bit, and what arithmetic on rounded keys and values gives."""
    checkpoint = Checkpoint.open(save_tiny(tmp_path / "dense", MODELS[name]))
    spec, library = decoder_spec(checkpoint.config), at_level(level)
    exact = Decoder(checkpoint, spec, torch.float32, torch.device("cpu"))
    halves, codes = (FusedDecoder(checkpoint, spec, library, FusedBits(kv=b)) for b in (16, 8))
    ids = tokens(70)
    with torch.inference_mode():
        shape = (spec.layers, spec.kv_heads, spec.head_dim)
        cache = SequenceCache(CodeMemory(shape, 5, torch.float32, torch.device("cpu")), 70)
        wanted = exact.forward(ids, cache)
    found = codes.forward(ids, codes.new_cache())
    of_halves = halves.forward(ids, halves.new_cache())
    # A number at the edge between two codes may take the other one, which later tokens then see.
    assert (found - wanted)[0].abs().max() < FIRST * wanted.abs().max()
    assert (found - wanted).norm() < 0.2 * (of_halves - wanted).norm()
    assert torch.equal(logits(codes, ids, [70]), logits(codes, ids, [1] * 30 + [23, 17]))
    sizes = [decoder.native.page_bytes for decoder in (codes, halves)]
    assert sizes[0] == sizes[1] * (0.5 + 2 / (-(-spec.head_dim // 16) * 16))


def test_a_number_that_is_none_spoils_the_sequence_and_no_other(tmp_path: Path) -> None:
    """As in any other arithmetic: 8 bits must not make a zero of it."""
    source = save_tiny(tmp_path / "dense", Tiny())
    path = source / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.embed_tokens.weight"][5] = torch.nan
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    checkpoint = Checkpoint.open(source)
    spec = decoder_spec(checkpoint.config)
    decoder = FusedDecoder(checkpoint, spec, at_level(LEVELS_HERE[0]), FusedBits(kv=8))
    assert decoder.forward(torch.tensor([1, 5, 2]), decoder.new_cache())[2].isnan().all()
    assert decoder.forward(torch.tensor([1, 2]), decoder.new_cache()).isfinite().all()


def test_impossible_decoders_are_refused_and_never_fatal(tmp_path: Path) -> None:
    """Sizes that fit no weight, and vectors that fit no size: random ones, and the edges."""
    native = fused(packed(tmp_path, MODELS["qwen3"])).native
    library, (blocks, ends) = at_level(LEVELS_HERE[0]), native.weights
    draw = random.Random(3)
    fields = [field.name for field in dataclasses.fields(native.shape)]
    for _ in range(400):
        name = draw.choice([field for field in fields if field not in ("norm_eps", "activation")])
        edge = draw.choice([0, 1, -1, 2**31, 2**62, -(2**63), draw.randrange(2**63)])
        shape = replace(native.shape, **{name: edge})
        if (name == "window" and edge >= 0) or (name == "parallel" and edge in (0, 1)):
            continue  # any number of positions may be seen, and both ways are known
        with pytest.raises(HalfweaveError):
            NativeDecoder(library, shape, blocks, ends)
    with pytest.raises(HalfweaveError, match=r"float32 \[71\] .*float32 \[72\] on cpu is needed"):
        norm = Norm(ends.norm.gain[:71].clone())
        NativeDecoder(library, native.shape, blocks, replace(ends, norm=norm))
    with pytest.raises(HalfweaveError, match="1 blocks are not 2 layers"):
        NativeDecoder(library, native.shape, blocks[:1], ends)


STEP = {  # of one token
    "ids": torch.tensor([1], dtype=torch.int32),
    "positions": torch.tensor([0]),
    "pages": torch.tensor([0], dtype=torch.int32),
    "starts": torch.tensor([0]),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ids", lambda ids: ids.long()),
        ("ids", lambda ids: ids.expand(2)),  # not contiguous
        ("ids", lambda ids: ids[None]),
        ("ids", lambda ids: ids.to("meta")),
        ("positions", lambda positions: positions.int()),
        ("positions", lambda positions: positions[:0]),
        ("positions", lambda positions: positions.repeat(2)),
        ("pages", lambda pages: pages.long()),
        ("pages", lambda pages: pages.repeat(4)[::2]),
        ("starts", lambda starts: starts.int()),
        ("starts", lambda starts: starts[:0]),
        ("memory", lambda memory: memory.view(torch.int8)),
        ("memory", lambda memory: memory.repeat(2)[::2]),
        ("memory", lambda memory: memory.to("meta")),
    ],
)
def test_tensors_that_the_library_would_misread_are_refused(
    name: str, change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    native = fused(packed(tmp_path, Tiny())).native
    step = {**STEP, "memory": torch.zeros(native.page_bytes, dtype=torch.uint8)}
    assert native.forward(**step).shape == (1, 72)
    with pytest.raises(HalfweaveError, match=rf"^{name} is .* on cpu is needed"):
        native.forward(**{**step, name: change(step[name])})


def test_hidden_states_that_the_library_would_misread_are_refused(tmp_path: Path) -> None:
    native = fused(packed(tmp_path, Tiny())).native
    hidden = torch.randn(4, 3, 72)
    wanted = native.logits(hidden)
    assert wanted.shape == (4, 3, VOCABULARY)
    assert torch.equal(native.logits(hidden.transpose(0, 1)), wanted.transpose(0, 1))
    assert native.logits(torch.zeros(0, 72)).shape == (0, VOCABULARY)
    for shape in ([1, 64 * 72], [1, 71], [72, 1], [3, 0], []):
        with pytest.raises(HalfweaveError, match="are not 72"):
            native.logits(torch.zeros(shape))
    with pytest.raises(HalfweaveError, match="on meta"):
        native.logits(torch.zeros(1, 72, device="meta"))


def test_nothing_is_freed_at_exit_while_a_thread_may_be_in_a_call(tmp_path: Path) -> None:
    """Threads that end with the process may be anywhere then; what is dropped before is freed."""
    code = """
import sys
from pathlib import Path
from halfweave.kernels.cpu.library import load, open_level
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.families import decoder_spec
from halfweave.runtime.fused import FusedDecoder

functions = load(Path(sys.argv[1]))
for name in ("hw_decoder_free", "hw_pool_free"):
    setattr(functions, name, lambda _, name=name: print(name))
checkpoint = Checkpoint.open(Path(sys.argv[2]))
spec = decoder_spec(checkpoint.config)
held, dropped = (FusedDecoder(checkpoint, spec, open_level(functions)) for _ in range(2))
del dropped
"""
    command = [sys.executable, "-c", code, str(UNDER_TEST), str(packed(tmp_path, Tiny()).path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert sorted(ran.stdout.split()) == ["hw_decoder_free", "hw_pool_free"]


def test_positions_beyond_the_table_are_refused_by_the_library(tmp_path: Path) -> None:
    native = fused(packed(tmp_path, MODELS["opt"])).native
    memory = torch.zeros(17 * native.page_bytes, dtype=torch.uint8)
    ids, pages = torch.tensor([1], dtype=torch.int32), torch.arange(17, dtype=torch.int32)
    native.forward(ids, torch.tensor([255]), pages, torch.tensor([0]), memory)
    with pytest.raises(HalfweaveError, match="out of range"):
        native.forward(ids, torch.tensor([256]), pages, torch.tensor([0]), memory)


def test_only_16_and_8_bits_are_known_for_keys_and_values(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="key and value bits 4 are neither 16 nor 8"):
        load_model(save_tiny(tmp_path / "dense", Tiny()), kv_bits=4)


def test_only_8_and_4_bits_are_known_and_floats_keep_their_head(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "dense", Tiny())
    with pytest.raises(UsageError, match="head bits 3 are neither 8 nor 4"):
        load_model(source, head_bits=3)
    ids = tokens(9)
    found = [logits(load_model(source, head_bits=bits).decoder, ids, [9]) for bits in (8, 4)]
    assert torch.equal(*found)


def test_a_packed_embedding_is_refused(tmp_path: Path) -> None:
    checkpoint = packed(tmp_path, Tiny())
    entry = next(iter(checkpoint.linears.values()))
    spoilt = replace(checkpoint, linears={**checkpoint.linears, "model.embed_tokens": entry})
    with pytest.raises(CheckpointError, match="embeddings never are"):
        fused(spoilt)


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("kind", ["sparse24", "dense"])
@pytest.mark.parametrize("name", ["tied", "untied", *FUSED_FAMILIES])
def test_of_a_checkpoint_of_floats_only_keys_and_values_are_rounded(
    name: str, kind: str, level: str, tmp_path: Path
) -> None:
    """Embedding and head as stored too: fp32 arithmetic with a cache of halves gives the same."""
    source = save_tiny(tmp_path / "dense", MODELS[name])
    path = source if kind == "dense" else pack_directory(source, tmp_path / "packed", kind)
    checkpoint = Checkpoint.open(path)
    spec = decoder_spec(checkpoint.config)
    exact = Decoder(checkpoint, spec, torch.float32, torch.device("cpu"))
    decoder, ids = fused(checkpoint, level), tokens(70)
    with torch.inference_mode():
        shape = (spec.layers, spec.kv_heads, spec.head_dim)
        cache = SequenceCache(HalfMemory(shape, 5, torch.float32, torch.device("cpu")), 70)
        wanted = exact.logits(exact.forward(ids, cache))
    # A key or value at the edge of two halves may take the other one: 2^-11 of itself.
    difference = (logits(decoder, ids, [70]) - wanted).abs()
    assert difference.max() < 5e-4 * wanted.abs().max()
    assert difference.mean() < 2e-5 * wanted.abs().max()
    assert torch.equal(logits(decoder, ids, [70]), logits(decoder, ids, [1] * 70))
