"""What a decoder is made of, as typed data: one spec per model.

Knows no config.json: `families` reads those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

ROLES = ("q", "k", "v", "o", "gate", "up", "down")  # linears of a block; a plain MLP has no gate
MLP_ROLES = ROLES[4:]


@dataclass(frozen=True)
class NormSpec:
    """`kind` is rms (Zhang and Sennrich, 1910.07467) or layer (Ba et al., 1607.06450).

    A gain is what is stored and `offset`.
    """

    kind: str
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions (Su et al., 2104.09864) and how they are stretched to longer contexts.

    `kind` is default, linear (positions divided by `factor`) or llama3 (low frequencies divided by
    `factor`, with a smooth passage between the two wavelength limits). The first `share` of a
    head's dimensions are turned.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    share: float = 1.0

    def dims(self, head_dim: int) -> int:
        """How many dimensions of a head are turned."""
        return int(head_dim * self.share)


@dataclass(frozen=True)
class LearnedSpec:
    """A vector for every position, added to the embedding; that of position 0 is row `first`."""

    first: int = 0


@dataclass(frozen=True)
class AlibiSpec:
    """Scores fall with the distance, by a slope of every head's own (Press et al., 2108.12409)."""


@dataclass(frozen=True)
class Sight:
    """What tells layers' attention apart: the positions that a token sees, and how it is turned.

    `window` counts the token itself; None: all before it. `rope` is None without rotary positions.
    """

    window: int | None
    rope: RopeSpec | None


@dataclass(frozen=True)
class LocalSpec:
    """Layers that see a window only, where others see all; `rope` if they are turned otherwise."""

    layers: frozenset[int]
    window: int
    rope: RopeSpec | None = None


@dataclass(frozen=True)
class Stored:
    """Which rows of which stored linear a linear is, by its name in the block.

    A linear of its own has nobody `beside` it. Else those are the roles that are stored together,
    in order: all rows of one behind all of the other or, `by_head`, head after head each one's.
    `transposed`: one that is not packed is stored as [K, N].
    """

    name: str
    beside: tuple[str, ...] = ()
    by_head: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Names:
    """Names of tensors without their last part; those of a block are without its beginning.

    What has no name is not there.
    """

    blocks: str
    embedding: str
    norm: str
    attention_norm: str
    mlp_norm: str
    linears: Mapping[str, Stored]  # by role
    head: str = "lm_head"
    positions: str = ""
    embedding_norm: str = ""
    q_norm: str = ""
    k_norm: str = ""
    attention_out_norm: str = ""
    mlp_out_norm: str = ""
    project_in: str = ""
    project_out: str = ""


@dataclass(frozen=True)
class ExpertsSpec:
    """MLPs of which each token takes a few (Shazeer et al., 1701.06538).

    A linear of hidden states, the router, gives each expert a score, and softmax a weight. The
    `chosen` heaviest are run, and their sum is weighted; `renormalised`: by weights that add up
    to one.

    Attributes:
        layers: whose MLP this is; others have a plain one.
        ffn: inner size of each expert.
        router: its name in the block.
        linears: by role, of an expert whose number belongs where their names have {expert}.
    """

    count: int
    chosen: int
    ffn: int
    renormalised: bool
    layers: frozenset[int]
    router: str
    linears: Mapping[str, Stored]


@dataclass(frozen=True)
class Linear:
    """One linear [N, K] of a block.

    `name` and `stored_shape` are the stored linear's that its rows are in; `expert` is whose it
    is, where a block has several of its role, of which a token takes the share `read`.
    """

    role: str
    name: str
    shape: tuple[int, int]
    stored: Stored
    stored_shape: tuple[int, int]
    biased: bool
    expert: int | None = None
    read: float = 1.0


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer: blocks of attention and an MLP, and a head.

    Attributes:
        kv_heads: heads that keys and values have; consecutive query heads share one.
        max_positions: most positions of a sequence.
        activation: silu, gelu, gelu_tanh (its usual approximation) or relu.
        gated: the activated vector is multiplied by a second one.
        biased: roles of the linears that have a bias.
        window: positions that a token sees, its own included; None: all before it.
        tied: the head is the embedding.
        names: where the weights are. Norms of every head's queries and keys, of the embedding and
            of what attention and MLP give, and a table of positions are there where they have a
            name.
        residual: where a block's norms are. pre: attention and then the MLP read normed states,
            and are added to them; post: they are added first, and the sum is normed; parallel:
            as pre, but the MLP reads the states that attention reads.
        word_size: size of the embedding's and the head's vectors, where linears lead to the hidden
            size and back; None: the hidden size.
        embedding_factor: that embeddings are multiplied by.
        attention_scale: that scores are multiplied by; None: one over the root of head_dim.
        attention_cap: scores s become cap tanh(s / cap) (Gemma Team, 2408.00118); None: they stay.
        logit_cap: the same for the next token's scores.
        local: layers that see less than the others, and how.
        experts: what some layers have instead of an MLP.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm: NormSpec
    positions: RopeSpec | LearnedSpec | AlibiSpec
    activation: str
    gated: bool
    biased: frozenset[str]
    tied: bool
    names: Names
    window: int | None = None
    residual: str = "pre"
    word_size: int | None = None
    embedding_factor: float = 1.0
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    local: LocalSpec | None = None
    experts: ExpertsSpec | None = None

    @property
    def embedded(self) -> int:
        """Size of the embedding's and the head's vectors."""
        return self.hidden if self.word_size is None else self.word_size

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head rotary positions turn."""
        rope = self.positions
        return rope.dims(self.head_dim) if isinstance(rope, RopeSpec) else 0

    @property
    def head_name(self) -> str:
        """Full name of what gives the next token's scores."""
        return self.names.embedding if self.tied else self.names.head

    @property
    def never_packed(self) -> Mapping[str, tuple[int, int]]:
        """(N, K) by full name of linears beside the blocks' and the head: routers, projections."""
        found: dict[str, tuple[int, int]] = {}
        if self.names.project_in:
            found[self.names.project_in] = self.hidden, self.embedded
            found[self.names.project_out] = self.embedded, self.hidden
        if self.experts is not None:
            for layer in sorted(self.experts.layers):
                found[self.router_name(layer)] = self.experts.count, self.hidden
        return found

    def router_name(self, layer: int) -> str:
        """Full name of the router of a layer that has experts."""
        assert self.experts is not None
        return f"{self.names.blocks}.{layer}.{self.experts.router}"

    def sight(self, layer: int) -> Sight:
        """What a layer's attention sees."""
        rope = self.positions if isinstance(self.positions, RopeSpec) else None
        if self.local is None or layer not in self.local.layers:
            return Sight(self.window, rope)
        return Sight(self.local.window, self.local.rope or rope)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts instead of an MLP."""
        return self.experts is not None and layer in self.experts.layers

    @property
    def roles(self) -> tuple[str, ...]:
        """Those that the linears of a block without experts have here, in order."""
        return tuple(role for role in ROLES if role in self.names.linears)

    def shape(self, role: str) -> tuple[int, int]:
        """(N, K) of a linear of a block without experts."""
        return self._shape(role, self.ffn)

    def linear(self, layer: int, role: str, expert: int | None = None) -> Linear:
        """A linear of a block; of `expert`, where that is one of the block's own."""
        of_experts = self.experts if expert is not None else None
        stored = (self.names if of_experts is None else of_experts).linears[role]
        ffn = self.ffn if of_experts is None else of_experts.ffn
        beside = [self._shape(each, ffn)[0] for each in stored.beside]
        rows, columns = self._shape(role, ffn)
        return Linear(
            role,
            f"{self.names.blocks}.{layer}.{stored.name.format(expert=expert)}",
            (rows, columns),
            stored,
            (sum(beside) or rows, columns),
            role in self.biased and of_experts is None,
            expert,
            1.0 if of_experts is None else of_experts.chosen / of_experts.count,
        )

    def linears(self, layer: int) -> tuple[Linear, ...]:
        """All linears of a block, in order."""
        if self.experts is None or not self.has_experts(layer):
            return tuple(self.linear(layer, role) for role in self.roles)
        attention = [self.linear(layer, role) for role in self.roles if role not in MLP_ROLES]
        of_experts = [
            self.linear(layer, role, expert)
            for expert in range(self.experts.count)
            for role in self.experts.linears
        ]
        return (*attention, *of_experts)

    @property
    def stored_linears(self) -> tuple[Linear, ...]:
        """One linear for each that is stored in the blocks, in order."""
        found: dict[str, Linear] = {}
        for linear in chain.from_iterable(self.linears(layer) for layer in range(self.layers)):
            found.setdefault(linear.name, linear)
        return tuple(found.values())

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Full names of all stored linears of the blocks, in order."""
        return tuple(linear.name for linear in self.stored_linears)

    def _shape(self, role: str, ffn: int) -> tuple[int, int]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = {"q": q, "k": kv, "v": kv, "gate": ffn, "up": ffn}.get(role, self.hidden)
        return rows, {"o": q, "down": ffn}.get(role, self.hidden)
