"""The decoder on a GPU: packed linears, keys and values in pages, a few kernels a block.

q, k and v are one product, and so are gate and up, where their weights are stored alike: what the
gate lets through is then made where both are summed. One new token looks at the pages themselves;
several at copies of them, by torch's attention. Steps of one token a sequence are replayed from
graphs (gpu_graphs.py). Under Triton's interpreter the same code runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UnsupportedModel
from ..kernels.cuda.binding import GatedLinear, parts_of
from ..kernels.cuda.linear import GATE_RUN, gate_order
from ..kernels.cuda.steps import Pages, attend_newest, attention_bytes, normed, remember
from ..kernels.dispatch import LinearFunction, on_gpu
from ..kernels.formats import Dense, PackedLinear, stacked, with_rows
from ..kernels.paging import PAGE_POSITIONS
from .draw import Draw, drawn_tokens
from .gpu_graphs import SIZES, StepBuffers, StepGraphs
from .loading import Loader
from .paged import PagedDecoder, Part, pages_for, positions, token_ids
from .rope import inverse_frequencies
from .spec import DecoderSpec, RopeSpec

# Roles of a block, in the order in which they are computed; those of a row are one product.
TOGETHER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
_Result = TypeVar("_Result")
DRAWN_TOGETHER = 32  # rows, see draw.py
_DRAW_BYTES = 60  # for every score of those, sorted and summed up in fp64
_MOST_SHARING = 16  # query heads to a pair of keys and values


@dataclass(frozen=True)
class _Block:
    attention_gain: Tensor
    mlp_gain: Tensor
    qkv: LinearFunction
    o: LinearFunction
    gated: GatedLinear  # gate and up
    down: LinearFunction


class GpuMemory:
    """Pages of every layer, and one more that no sequence has; with the graphs made for them."""

    def __init__(self, layers: Sequence[Pages]) -> None:
        self.layers = list(layers)
        self.graphs: StepGraphs | None = None

    @property
    def pages(self) -> int:
        """Pages that there is memory for; the number of nobody's."""
        return len(self.layers[0].keys) - 1

    def grow(self, pages: int) -> None:
        """Make room for so many; what is there stays."""
        self.layers = [layer.grown(pages + 1) for layer in self.layers]
        self.graphs = None


@dataclass(frozen=True)
class _Batch:
    """Tokens of some sequences, on the device.

    `table` int32 [tokens, most pages] are the pages of each token's sequence. `lengths` int32 are
    the positions of sequences that get one token, with it, and `longest` is at least the most of
    those; `single` int64 are their rows, where there are others too. `long` are the rows of each
    sequence that gets several, with its positions.
    """

    positions: Tensor
    table: Tensor
    lengths: Tensor
    longest: int
    single: Tensor | None = None
    long: Sequence[tuple[slice, int]] = ()


def _on_its_device(method: Callable[..., _Result]) -> Callable[..., _Result]:
    """Triton launches on the thread's current GPU, whatever tensors it is given."""

    @wraps(method)
    def run(self: GpuDecoder, *given: Any) -> _Result:
        with torch.inference_mode(), torch.cuda.device_of(self._embedding):
            return method(self, *given)

    return run


class GpuDecoder(PagedDecoder):
    """As `Decoder`, by the kernels of halfweave.kernels.cuda."""

    draws = True

    def __init__(self, loader: Loader, kv_bits: int = 16) -> None:
        """Read and repack every weight; the loader's dtype is float16 or bfloat16.

        Raises:
            UnsupportedModel: the model has parts that these kernels lack.
            CheckpointError: a tensor is missing, illegal, or does not fit the config.
        """
        spec = loader.spec
        if missing := lacking(spec):
            raise UnsupportedModel(f"the GPU kernels lack {', '.join(missing)}")
        self.spec, self._dtype, self.device = spec, loader.dtype, loader.device
        self._stored = self._dtype if kv_bits == 16 else torch.int8
        self._embedding = loader.embedding()
        self._blocks = [_block(loader, layer) for layer in range(spec.layers)]
        self._gain = loader.norm(spec.names.norm).gain
        head = Dense(self._embedding) if spec.tied else loader.end(spec.names.head)
        self._head = _bound(head, None, loader)
        self.scratch_bytes = _scratch_bytes(spec)
        assert isinstance(spec.positions, RopeSpec)
        self._frequencies = inverse_frequencies(spec.positions, spec.head_dim).to(self.device)

    @property
    def page_bytes(self) -> int:
        """What a page takes, over all layers."""
        return sum(each.nbytes for each in self._layer_pages(1).tensors) * self.spec.layers

    def new_memory(self, pages: int) -> GpuMemory:
        """Room for so many pages."""
        return GpuMemory([self._layer_pages(pages + 1) for _ in range(self.spec.layers)])

    def _layer_pages(self, pages: int) -> Pages:
        spec = self.spec
        return Pages.empty(pages, spec.kv_heads, spec.head_dim, self._stored, self.device)

    @_on_its_device
    def run(self, parts: Sequence[Part], memory: GpuMemory) -> Tensor:
        """Append all parts at once: their final hidden states [tokens of all, hidden], in order."""
        graphs = self._graphs(memory)
        if graphs.fits(parts):
            return graphs.run(parts)
        return self._layers(token_ids(parts).to(self.device), self._batch(parts), memory)

    def _graphs(self, memory: GpuMemory) -> StepGraphs:
        if memory.graphs is None:
            width = min(memory.pages, pages_for(self.spec.max_positions))
            # The graphs are the memory's own: held by them, it would outlive its last user.
            held = ref(memory)

            def step(newest: StepBuffers) -> Tensor:
                memory = held()
                assert memory is not None
                longest = width * PAGE_POSITIONS  # of all steps to come
                batch = _Batch(newest.positions, newest.table, newest.lengths, longest)
                return self._layers(newest.ids, batch, memory)

            memory.graphs = StepGraphs(step, width, memory.pages, self.device)
        return memory.graphs

    def _layers(self, ids: Tensor, batch: _Batch, memory: GpuMemory) -> Tensor:
        eps = self.spec.norm.eps
        x, delta = self._embedding[ids], None
        for block, pages in zip(self._blocks, memory.layers, strict=True):
            qkv = parts_of(block.qkv, normed(x, delta, block.attention_gain, eps))
            q = x.new_empty(len(x), self.spec.heads, self.spec.head_dim)
            remember(qkv, batch.positions, batch.table, self._frequencies, pages, q)
            delta = parts_of(block.o, self._attended(q, pages, batch))
            let_through = block.gated(normed(x, delta, block.mlp_gain, eps))
            delta = parts_of(block.down, let_through)
        return normed(x, delta, self._gain, eps)

    @_on_its_device
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every next token, fp32 [..., vocab], on the CPU, where they are sampled."""
        return self._head(hidden).float().cpu()

    @_on_its_device
    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As `PagedDecoder`; two numbers a row are copied from the device, not a vocabulary."""
        scores, tokens = self._head(hidden).float().max(-1)
        return tokens.cpu(), scores.cpu()

    @_on_its_device
    def drawn(self, hidden: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """As `PagedDecoder`, on the device."""
        tokens, best = drawn_tokens(self._head(hidden).float(), draws)
        return tokens.cpu(), best.cpu()

    def _batch(self, parts: Sequence[Part]) -> _Batch:
        counts = [len(part.tokens) for part in parts]
        width = max(len(part.pages) for part in parts)
        table = torch.zeros(len(parts), width, dtype=torch.int32)
        for row, part in enumerate(parts):
            table[row, : len(part.pages)] = torch.tensor(part.pages, dtype=torch.int32)
        ends = list(accumulate(counts))
        single = [end - 1 for end, count in zip(ends, counts, strict=True) if count == 1]
        lengths = [part.end for part in parts if len(part.tokens) == 1]
        return _Batch(
            positions(parts).to(self.device, torch.int32),
            table.repeat_interleave(torch.tensor(counts), 0).to(self.device),
            torch.tensor(lengths, dtype=torch.int32, device=self.device),
            max(lengths, default=0),
            torch.tensor(single, dtype=torch.int64, device=self.device) if single else None,
            [
                (slice(end - count, end), part.end)
                for end, count, part in zip(ends, counts, parts, strict=True)
                if count > 1
            ],
        )

    def _attended(self, q: Tensor, pages: Pages, batch: _Batch) -> Tensor:
        """[tokens, heads dim] for queries [tokens, heads, dim]."""
        if not batch.long:
            newest = attend_newest(q, pages, batch.table, batch.lengths, batch.longest)
            return newest.flatten(1)
        mixed = torch.empty_like(q)
        if batch.single is not None:
            rows = batch.single
            mixed[rows] = attend_newest(
                q[rows], pages, batch.table[rows], batch.lengths, batch.longest
            )
        for part, end in batch.long:
            keys, values = pages.first(batch.table[part.start], end, self._dtype)
            mixed[part] = self._attended_long(q[part], keys, values)
        return mixed.flatten(1)

    def _attended_long(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The newest tokens of one sequence to all of it: as q [tokens, heads, dim]."""
        count, end = len(q), len(keys)
        seen = None
        if count < end:
            at = torch.arange(end, device=self.device)
            seen = at <= at[end - count :, None]
        q, keys, values = (each.transpose(0, 1)[None] for each in (q, keys, values))
        # Faster where torch knows that a token sees those before it, which it takes no mask for.
        mixed = functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=seen, is_causal=seen is None, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)


def lacking(spec: DecoderSpec) -> list[str]:
    """What a model has and these kernels do not, in words."""
    return [
        what
        for what, missing in (
            ("positions that are not rotary", not isinstance(spec.positions, RopeSpec)),
            ("heads that are turned in part", 0 < spec.rotary_dim < spec.head_dim),
            ("norms other than RMSNorm", spec.norm.kind != "rms"),
            ("MLPs other than gated SiLU ones", not spec.gated or spec.activation != "silu"),
            ("a sliding window", spec.window is not None or spec.local is not None),
            ("residuals other than Llama's", spec.residual != "pre"),
            ("experts", spec.experts is not None),
            ("norms behind attention and MLP", bool(spec.names.attention_out_norm)),
            ("an embedding of another size", spec.word_size is not None),
            ("scaled embeddings", spec.embedding_factor != 1),
            ("a scale of attention of its own", spec.attention_scale is not None),
            ("capped scores", spec.attention_cap is not None or spec.logit_cap is not None),
            ("norms of heads", bool(spec.names.q_norm)),
            ("a norm of the embedding", bool(spec.names.embedding_norm)),
            ("over 16 query heads to a key", spec.heads > _MOST_SHARING * spec.kv_heads),
        )
        if missing
    ]


def _scratch_bytes(spec: DecoderSpec) -> int:
    """Of a weight that is written out, of attention's parts, and of a draw.

    Graphs keep the parts, and torch what it has allocated for the others.
    """
    longest = pages_for(spec.max_positions) * PAGE_POSITIONS
    parts = attention_bytes(SIZES[-1], spec.kv_heads, spec.head_dim, longest)
    return _largest_dense_bytes(spec) + parts + _DRAW_BYTES * DRAWN_TOGETHER * spec.vocab


def _largest_dense_bytes(spec: DecoderSpec) -> int:
    """Of a product's weight in 16 bits: long prompts have it written out (see kernels/cuda)."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    rows = max(q + 2 * kv, 2 * spec.ffn)
    return 2 * max(rows * spec.hidden, spec.hidden * max(q, spec.ffn))


def _block(loader: Loader, layer: int) -> _Block:
    names = loader.spec.names
    qkv, o, gate_up, down = (_rows_of(loader, layer, roles) for roles in TOGETHER)
    return _Block(
        loader.block_norm(layer, names.attention_norm).gain,
        loader.block_norm(layer, names.mlp_norm).gain,
        qkv=_together(loader, *qkv),
        o=_together(loader, *o),
        gated=_gated(loader, *gate_up),
        down=_together(loader, *down),
    )


def _together(
    loader: Loader, weights: Sequence[PackedLinear], bias: Tensor | None
) -> LinearFunction:
    """One linear whose rows are those of several, one behind the other."""
    if _alike(weights):
        return _bound(stacked(weights), bias, loader)
    counts = [weight.shape[0] for weight in weights]
    biases = [None] * len(weights) if bias is None else bias.split(counts)
    parts = [_bound(*each, loader) for each in zip(weights, biases, strict=True)]
    return lambda x: torch.cat([part(x) for part in parts], -1)


def _gated(loader: Loader, weights: Sequence[PackedLinear], bias: Tensor | None) -> GatedLinear:
    """Gate and up as one, their rows in turns where a gate's run divides them."""
    size = weights[0].shape[0]
    if not _alike(weights) or size % GATE_RUN:
        return GatedLinear(_together(loader, weights, bias), in_turns=False)
    order = gate_order(size)
    bias = None if bias is None else bias[order]
    return GatedLinear(_bound(with_rows(stacked(weights), order), bias, loader), in_turns=True)


def _rows_of(
    loader: Loader, layer: int, roles: Sequence[str]
) -> tuple[list[PackedLinear], Tensor | None]:
    """Weights, and the biases of all their rows, if one has any."""
    weights = [loader.linear(layer, role) for role in roles]
    biases = [loader.bias(layer, role) for role in roles]
    if all(bias is None for bias in biases):
        return weights, None
    known = zip(biases, weights, strict=True)
    return weights, torch.cat(
        [torch.zeros(w.shape[0], device=loader.device) if b is None else b for b, w in known]
    )


def _alike(weights: Sequence[PackedLinear]) -> bool:
    """Whether they can be one."""
    return len({(weight.kind, getattr(weight, "group", None)) for weight in weights}) == 1


def _bound(weight: PackedLinear, bias: Tensor | None, loader: Loader) -> LinearFunction:
    return on_gpu(weight, bias, loader.device, loader.dtype)
