"""The GPU decoder, interpreted on a CPU or on a GPU: test_gpu_decoder.py runs this.

Not collected by itself, since Triton decides once in a process whether it interprets.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from weakref import ref

import pytest
import torch
from halfweave.errors import CapacityError
from halfweave.kernels.cuda import steps
from halfweave.kernels.paging import PAGE_POSITIONS
from halfweave.runtime import draw
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.engine import Engine
from halfweave.runtime.families import decoder_spec
from halfweave.runtime.gpu_decoder import DRAWN_TOGETHER, GpuDecoder
from halfweave.runtime.loading import Loader
from halfweave.runtime.model import load_model
from halfweave.runtime.paged import Part, pages_for
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.request import GenerationRequest, TextDelta
from support.tiny import Tiny, pack_directory, save_tiny
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPT = torch.tensor([5, 17, 3, 99, 42, 8, 61])
NEW = 12


def gpu_decoder(path: Path, kv_bits: int = 16) -> GpuDecoder:
    checkpoint = Checkpoint.open(path)
    loader = Loader(checkpoint, decoder_spec(checkpoint.config), torch.float16, DEVICE)
    return GpuDecoder(loader, kv_bits)


def greedy(decoder: object, count: int = NEW) -> list[int]:
    cache = decoder.new_cache()  # type: ignore[attr-defined]
    ids, found = PROMPT, []
    for _ in range(count):
        hidden = decoder.forward(ids, cache)  # type: ignore[attr-defined]
        ids = decoder.logits(hidden[-1:]).argmax(-1)  # type: ignore[attr-defined]
        found.append(int(ids))
    return found


@pytest.mark.parametrize("kind", ["sparse24", "sparse24_int4", "int4", "int8"])
def test_tokens_are_those_of_the_cpu(kind: str, tmp_path: Path) -> None:
    model = pack_directory(save_tiny(tmp_path / "tiny"), tmp_path / "packed", kind)
    expected = greedy(load_model(model, "float32").decoder)
    assert greedy(gpu_decoder(model)) == expected


@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2"])
def test_what_is_built_like_llama_gives_the_tokens_of_the_cpu(family: str, tmp_path: Path) -> None:
    """Without a window: with biases, or with q, k and v, and gate and up, stored in one."""
    options = {"sliding_window": None} if family != "qwen2" else {}
    tiny = save_tiny(tmp_path / "tiny", Tiny(family=family, layers=1, options=options))
    model = pack_directory(tiny, tmp_path / "packed", "sparse24_int4")
    assert greedy(gpu_decoder(model), 3) == greedy(load_model(model, "float32").decoder, 3)


@pytest.mark.parametrize(
    "tiny",
    [Tiny(layers=1, options={"mlp_bias": True}), Tiny(layers=1, intermediate=100)],
    ids=["biases of gate and up", "a width that is not in turns of eight"],
)
def test_gates_let_through_what_they_do_on_a_cpu(tiny: Tiny, tmp_path: Path) -> None:
    model = pack_directory(save_tiny(tmp_path / "tiny", tiny), tmp_path / "packed", "sparse24_int4")
    assert greedy(gpu_decoder(model), 3) == greedy(load_model(model, "float32").decoder, 3)


def test_gates_and_what_they_let_through_may_be_stored_apart(tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny", Tiny(layers=1))
    others = {"gate_proj": "int4", "up_proj": "sparse24_int4"}
    model = pack_directory(tiny, tmp_path / "packed", "sparse24", others=others)
    assert greedy(gpu_decoder(model), 3) == greedy(load_model(model, "float32").decoder, 3)


def test_the_engine_gives_the_text_of_the_cpu(tmp_path: Path) -> None:
    """The same engine, sampler and tokenizer around it."""
    path = pack_directory(save_tiny(tmp_path / "tiny"), tmp_path / "packed", "sparse24_int4")
    exact = load_model(path, "float32")
    texts = []
    for model in (exact, replace(exact, decoder=gpu_decoder(path))):
        engine = Engine(model)
        request = GenerationRequest("r", (5, 17, 3), SamplingParams(max_tokens=8, temperature=0.0))
        events = list(engine.stream(request))
        texts.append("".join(each.text for each in events if isinstance(each, TextDelta)))
        engine.close()
    assert texts[0] == texts[1] != ""


def test_a_sequence_gives_the_same_however_it_is_cut(tmp_path: Path) -> None:
    model = pack_directory(save_tiny(tmp_path / "tiny"), tmp_path / "packed", "sparse24_int4")
    decoder = gpu_decoder(model)
    whole = decoder.forward(PROMPT, decoder.new_cache())
    cache = decoder.new_cache()
    parts = [decoder.forward(part, cache) for part in PROMPT.split([3, 1, 1, 2])]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=2e-2, atol=2e-2)


def test_8_bit_keys_and_values_are_near(tmp_path: Path) -> None:
    model = pack_directory(save_tiny(tmp_path / "tiny"), tmp_path / "packed", "sparse24")
    exact, rounded = gpu_decoder(model), gpu_decoder(model, kv_bits=8)
    both = []
    for decoder in (exact, rounded):
        cache = decoder.new_cache()
        decoder.forward(PROMPT[:-1], cache)
        both.append(decoder.logits(decoder.forward(PROMPT[-1:], cache)))
    assert float((both[0] - both[1]).norm() / both[0].norm()) < 0.05
    assert not torch.equal(both[0], both[1])


def test_a_cache_grows_and_ends_where_it_should(tmp_path: Path) -> None:
    decoder = gpu_decoder(save_tiny(tmp_path / "tiny"))
    cache = decoder.new_cache(limit=40)
    decoder.forward(PROMPT.repeat(5), cache)
    decoder.forward(PROMPT[:5], cache)
    assert cache.length == 40
    with pytest.raises(CapacityError, match="41 positions"):
        decoder.forward(PROMPT[:1], cache)


def test_a_batch_gives_what_each_sequence_gives_alone(tmp_path: Path) -> None:
    """Steps of 9 sequences down to 1, in whose buffers there is more room than they need."""
    model = pack_directory(save_tiny(tmp_path / "tiny"), tmp_path / "packed", "sparse24_int4")
    decoder, dice = gpu_decoder(model), torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 200, (3 + at,), generator=dice).tolist() for at in range(9)]
    alone = [decoder.forward(torch.tensor(text), decoder.new_cache()) for text in texts]
    memory = decoder.new_memory(9)
    for at in range(len(texts[-1])):
        running = [number for number, text in enumerate(texts) if at < len(text)]
        hidden = decoder.run([Part([texts[n][at]], at, [8 - n]) for n in running], memory)
        for number, row in zip(running, hidden, strict=True):
            torch.testing.assert_close(row, alone[number][at], rtol=3e-2, atol=3e-2)


def test_long_and_short_parts_go_together(tmp_path: Path) -> None:
    model = pack_directory(save_tiny(tmp_path / "tiny"), tmp_path / "packed", "sparse24_int4")
    decoder = gpu_decoder(model)
    texts = [PROMPT.tolist(), PROMPT.flip(0).tolist()]
    alone = [decoder.forward(torch.tensor(text), decoder.new_cache()) for text in texts]
    memory = decoder.new_memory(4)
    decoder.run([Part(texts[0][:6], 0, [3])], memory)
    hidden = decoder.run([Part(texts[1], 0, [1]), Part(texts[0][6:], 6, [3])], memory)
    torch.testing.assert_close(hidden[:7], alone[1], rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(hidden[7], alone[0][6], rtol=3e-2, atol=3e-2)


def test_the_likeliest_token_is_found_where_the_scores_are(tmp_path: Path) -> None:
    decoder = gpu_decoder(save_tiny(tmp_path / "tiny"))
    hidden = decoder.forward(PROMPT, decoder.new_cache()).clone()
    assert torch.equal(decoder.likeliest(hidden)[0], decoder.logits(hidden).argmax(-1))
    hidden[3, 0] = float("nan")
    assert decoder.likeliest(hidden)[1].isfinite().tolist() == [at != 3 for at in range(7)]


def test_tokens_drawn_on_the_device_are_those_of_the_sampler(tmp_path: Path) -> None:
    """Greedy, drawn and penalised answers together, each as if its scores had been copied."""
    path = pack_directory(save_tiny(tmp_path / "tiny"), tmp_path / "packed", "sparse24_int4")
    exact = load_model(path, "float32")
    kinds = [
        SamplingParams(max_tokens=6, temperature=0.0),
        SamplingParams(max_tokens=6, seed=3, top_p=0.9, ignore_eos=True),
        SamplingParams(max_tokens=6, seed=4, top_k=5, ignore_eos=True),
        SamplingParams(max_tokens=6, seed=5, presence_penalty=1.0, ignore_eos=True),
    ]
    answers = []
    for draws in (True, False):
        decoder = gpu_decoder(path)
        decoder.draws = draws
        engine = Engine(replace(exact, decoder=decoder))
        requests = [GenerationRequest(str(at), (5, 17, 3), each) for at, each in enumerate(kinds)]
        streams = [engine.stream(request) for request in requests]
        texts = [
            [token for event in stream if isinstance(event, TextDelta) for token in event.token_ids]
            for stream in streams
        ]
        answers.append(texts)
        engine.close()
    assert answers[0] == answers[1]


def test_the_memory_plan_knows_what_a_step_takes_beside_its_states(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "tiny"), "float32")
    alone, decoder = Engine(model), gpu_decoder(tmp_path / "tiny")
    on_gpu = Engine(replace(model, decoder=decoder))
    spec = model.spec
    written_out = 2 * 2 * spec.ffn * spec.hidden  # gate and up, 16 bits
    drawn = 60 * DRAWN_TOGETHER * spec.vocab
    longest = pages_for(spec.max_positions) * PAGE_POSITIONS
    attended = most_of_attention(decoder, 128, longest)
    beside = on_gpu.memory_plan.workspace_bytes - alone.memory_plan.workspace_bytes
    assert beside == written_out + drawn + attended
    for engine in (alone, on_gpu):
        engine.close()


def most_of_attention(decoder: GpuDecoder, sequences: int, longest: int) -> int:
    """Bytes of fp32 that `attend_newest` makes, its result aside, where it makes the most."""
    spec, made = decoder.spec, []
    for count in range(1, sequences + 1):
        programs = count * spec.kv_heads
        each = max(256 if programs >= 128 else 64, -(-longest // 64 // 64) * 64)
        width = max(16, 2 ** (spec.head_dim - 1).bit_length())
        made.append(4 * programs * -(-longest // each) * 16 * (width + 2))
    return max(made)


def test_as_many_rows_are_drawn_together_as_the_plan_says() -> None:
    assert DRAWN_TOGETHER == draw._ROWS


@pytest.mark.parametrize("count", [1, 3, 20])
def test_attention_makes_no_more_than_it_is_said_to(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room that is asked for in fp32, seen as it is; nothing is computed."""
    heads, dim, longest, taken = 8, 24, 300, []
    monkeypatch.setattr(steps, "attend", {})
    pages = steps.Pages.empty(1, heads, dim, torch.float16, torch.device("cpu"))
    q = torch.zeros(count, heads, dim).half()
    new_empty = Tensor.new_empty

    def counted(self: Tensor, *shape: int, **options: object) -> Tensor:
        made = new_empty(self, *shape, **options)  # type: ignore[call-overload]
        taken.append(made.nbytes)
        return made

    monkeypatch.setattr(Tensor, "new_empty", counted)
    with pytest.raises(KeyError):
        steps.attend_newest(q, pages, torch.zeros(1, 1), torch.zeros(1), longest)
    said = steps.attention_bytes(count, heads, dim, longest)
    assert 0 < sum(taken) <= said


def test_a_memory_is_gone_when_nobody_has_it(tmp_path: Path) -> None:
    """At once, and not when cycles are next looked for: it may be most of a GPU's."""
    decoder = gpu_decoder(save_tiny(tmp_path / "tiny"))
    memory = decoder.new_memory(4)
    decoder.run([Part([5], 0, [1])], memory)
    assert memory.graphs is not None
    gone = ref(memory)
    gc.disable()
    try:
        del memory
        assert gone() is None
    finally:
        gc.enable()
