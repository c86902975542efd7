"""Times whole decoders on a GPU by format of the weights: steps of some sequences, and prompts.

    python benchmarks/gpu_decode.py --results docs/results

The models have the sizes of Llama-3-8B and random weights, which take as long as real ones; their
words mean nothing, so no quality stands beside these speeds. Interleaved: in every round each
format takes its turn. A step is what the engine does: a batch is copied to the device, the
recorded step replayed, its likeliest tokens copied back. Writes gpu_decode.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import triton
from halfweave.kernels.formats import Dense, Int4, PackedLinear, Sparse24, Sparse24Int4
from halfweave.kernels.paging import PAGE_POSITIONS
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.families import decoder_spec
from halfweave.runtime.gpu_decoder import GpuDecoder, GpuMemory
from halfweave.runtime.loading import Loader, Norm
from halfweave.runtime.paged import Part
from halfweave.runtime.spec import DecoderSpec
from torch import Tensor

DEVICE, DTYPE, GROUP = torch.device("cuda"), torch.bfloat16, 64
BATCHES, CONTEXT, PROMPT = (1, 8, 32, 128), 1024, 512
ROUNDS, STEPS = 5, 24
# meta-llama/Meta-Llama-3-8B's config.json
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def dense(weight: Tensor) -> PackedLinear:
    return Dense(weight)


def sparse24(weight: Tensor) -> PackedLinear:
    return Sparse24.from_dense(weight * kept(weight))


def sparse24_int4(weight: Tensor) -> PackedLinear:
    return Sparse24Int4.from_codes(codes(weight), kept(weight), scales(weight), GROUP)


def int4(weight: Tensor) -> PackedLinear:
    return Int4.from_codes(codes(weight), scales(weight), GROUP)


def kept(weight: Tensor) -> Tensor:
    fours = weight.view(len(weight), -1, 4)
    keep = torch.zeros_like(fours, dtype=torch.bool)
    return keep.scatter_(2, fours.abs().topk(2).indices, True).view_as(weight)


def codes(weight: Tensor) -> Tensor:
    return torch.randint(-8, 8, weight.shape, device=weight.device, dtype=torch.int8)


def scales(weight: Tensor) -> Tensor:
    shape = len(weight), weight.shape[1] // GROUP
    return torch.full(shape, 0.004, dtype=torch.float16, device=weight.device)


FORMATS: dict[str, Callable[[Tensor], PackedLinear]] = {
    "dense": dense,
    "sparse24": sparse24,
    "int4": int4,
    "sparse24_int4": sparse24_int4,
}


@dataclass(frozen=True)
class RandomLoader(Loader):
    """Gives random weights of one format, each layer copies of its own."""

    pack: Callable[[Tensor], PackedLinear] = dense

    def embedding(self) -> Tensor:
        """[vocab, hidden]."""
        return self._random(self.spec.vocab, self.spec.hidden)

    def norm(self, name: str) -> Norm:
        """Ones."""
        gain = torch.ones(self.spec.hidden, dtype=self.dtype, device=self.device)
        return Norm(gain, None, self.spec.norm.eps)

    def linear(self, layer: int, role: str, expert: int | None = None) -> PackedLinear:
        """A linear of a block."""
        return self.pack(self._random(*self.spec.shape(role)))

    def end(self, name: str) -> PackedLinear:
        """The head, which stays dense."""
        return Dense(self._random(self.spec.vocab, self.spec.hidden))

    def _random(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=self.dtype, device=self.device) * 0.02


@dataclass(frozen=True)
class Loaded:
    """A decoder with pages for its sequences; bytes are those of its weights."""

    decoder: GpuDecoder
    memory: GpuMemory
    bytes: int


def load(spec: DecoderSpec, pack: Callable[[Tensor], PackedLinear]) -> Loaded:
    """A decoder of one format."""
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated()
    # The checkpoint is not read: every method that would is overridden.
    loader = RandomLoader(cast(Checkpoint, None), spec, DTYPE, DEVICE, pack)
    decoder = GpuDecoder(loader)
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_allocated() - before
    memory = decoder.new_memory(max(BATCHES) * (CONTEXT // PAGE_POSITIONS))
    return Loaded(decoder, memory, taken)


def step_seconds(loaded: Loaded, batch: int) -> float:
    """The median time of a step of `batch` sequences, CONTEXT - STEPS positions long at first."""
    each = CONTEXT // PAGE_POSITIONS
    pages = [list(range(row * each, (row + 1) * each)) for row in range(batch)]
    times = []
    for at in range(CONTEXT - STEPS, CONTEXT):
        parts = [Part([7], at, own) for own in pages]
        start = time.perf_counter()
        loaded.decoder.likeliest(loaded.decoder.run(parts, loaded.memory))
        times.append(time.perf_counter() - start)
    return median(times)


def prompt_seconds(loaded: Loaded) -> float:
    """The time of PROMPT new tokens."""
    part = Part(list(range(PROMPT)), 0, list(range(PROMPT // PAGE_POSITIONS)))
    torch.cuda.synchronize()
    start = time.perf_counter()
    hidden = loaded.decoder.run([part], loaded.memory)
    loaded.decoder.likeliest(hidden[-1:])
    return time.perf_counter() - start


def measure(models: dict[str, Loaded]) -> list[dict[str, Any]]:
    """Steps of every batch size, and prompts, of every format."""
    rows = []
    for batch in (*BATCHES, None):
        times: dict[str, list[float]] = {name: [] for name in models}
        for lap in range(ROUNDS + 1):
            for name, loaded in models.items():
                took = prompt_seconds(loaded) if batch is None else step_seconds(loaded, batch)
                if lap:  # the first one compiles and records
                    times[name].append(took)
        tokens = PROMPT if batch is None else batch
        for name, own in times.items():
            rows.append(
                {
                    "format": name,
                    "what": "prompt" if batch is None else "decode",
                    "tokens": tokens,
                    "context": 0 if batch is None else CONTEXT,
                    "ms": 1e3 * median(own),
                    "least_ms": 1e3 * min(own),
                    "greatest_ms": 1e3 * max(own),
                    "tokens_per_s": tokens / median(own),
                    "to_dense": median(times["dense"]) / median(own),
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Load every format, measure in turns, write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=LLAMA_3_8B["num_hidden_layers"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing to measure")
    config = {**LLAMA_3_8B, "num_hidden_layers": options.layers}
    spec = decoder_spec(config)
    models = {name: load(spec, pack) for name, pack in FORMATS.items()}
    document = {
        "date": str(date.today()),
        "command": f"python benchmarks/gpu_decode.py --layers {options.layers}",
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "model": config,
        "spec": {key: value for key, value in asdict(spec).items() if isinstance(value, int)},
        "weight_bytes": {name: loaded.bytes for name, loaded in models.items()},
        "rows": measure(models),
    }
    path = options.results / "gpu_decode.json"
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
