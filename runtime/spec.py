"""What a decoder is made of, as typed data: one spec per model.

Knows no config.json: `families` reads those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROLES = ("q", "k", "v", "o", "gate", "up", "down")  # linears of a block; a plain MLP has no gate


@dataclass(frozen=True)
class NormSpec:
    """`kind` is rms (Zhang and Sennrich, 1910.07467) or layer (Ba et al., 1607.06450)."""

    kind: str
    eps: float


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions (Su et al., 2104.09864) and how they are stretched to longer contexts.

    `kind` is default, linear (positions divided by `factor`) or llama3 (low frequencies divided by
    `factor`, with a smooth passage between the two wavelength limits).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class LearnedSpec:
    """A vector for every position, added to the embedding; that of position 0 is row `first`."""

    first: int = 0


@dataclass(frozen=True)
class AlibiSpec:
    """Scores fall with the distance, by a slope of every head's own (Press et al., 2108.12409)."""


@dataclass(frozen=True)
class Stored:
    """Where a linear's rows are: all of a stored linear's, or one of three that take turns.

    In a fused q, k and v the rows of a head are its q, then its k, then its v; `part` says which.
    """

    name: str
    part: int | None = None


@dataclass(frozen=True)
class Names:
    """Names of tensors without their last part; those of a block are without its beginning."""

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


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer with pre-norm blocks: attention, then an MLP.

    Attributes:
        kv_heads: heads that keys and values have; consecutive query heads share one.
        max_positions: most positions of a sequence.
        activation: silu, gelu, gelu_tanh (its usual approximation) or relu.
        gated: the activated vector is multiplied by a second one.
        biased: roles of the linears that have a bias.
        window: positions that a token sees, its own included; None: all before it.
        tied: the head is the embedding.
        names: where the weights are. Norms of every head's queries and keys, of the embedding, and
            a table of positions are there where they have a name.
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

    @property
    def roles(self) -> tuple[str, ...]:
        """Those that the linears of a block have here, in order."""
        return tuple(role for role in ROLES if role in self.names.linears)

    def shape(self, role: str) -> tuple[int, int]:
        """(N, K) of a linear of a block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = {"q": q, "k": kv, "v": kv, "gate": self.ffn, "up": self.ffn}.get(role, self.hidden)
        return rows, {"o": q, "down": self.ffn}.get(role, self.hidden)

    def stored_shape(self, role: str) -> tuple[int, int]:
        """(N, K) of the stored linear that a linear's rows are in."""
        rows, columns = self.shape(role)
        return (rows if self.names.linears[role].part is None else 3 * rows), columns

    def linear_name(self, layer: int, role: str) -> str:
        """Full name of the stored linear that a linear's rows are in."""
        return f"{self.names.blocks}.{layer}.{self.names.linears[role].name}"

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Full names of all stored linears of the blocks, in order."""
        names = [self.linear_name(layer, r) for layer in range(self.layers) for r in self.roles]
        return tuple(dict.fromkeys(names))
