"""How a model is laid out, as the pruner sees it: where its blocks and linears are.

Names are those that weights are stored under. Knows no config.json: `families` reads those.
"""

from __future__ import annotations

from dataclasses import dataclass

Stages = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class FreeChannels:
    """Linears of a block, by short name: the rows of `makers` are the columns of `reader`.

    A maker may hold the rows of several, one whole set after the other.
    """

    makers: tuple[str, ...]
    reader: str


@dataclass(frozen=True)
class Experts:
    """MLPs of which a router gives every token `chosen` out of `count`.

    `place` is where they are in a block; `gate`, `up` and `down` are the linears of each.
    """

    place: str
    gate: str
    up: str
    down: str
    count: int
    chosen: int

    @property
    def router(self) -> str:
        """Short name of what chooses; it is never pruned, and its input is every expert's."""
        return f"{self.place}.gate"

    def linear(self, index: int, name: str) -> str:
        """Short name of a linear of one expert."""
        return f"{self.place}.experts.{index}.{name}"

    @property
    def stages(self) -> Stages:
        """Those of all experts, one expert behind the other."""
        return tuple(
            stage
            for index in range(self.count)
            for stage in (
                (self.linear(index, self.gate), self.linear(index, self.up)),
                (self.linear(index, self.down),),
            )
        )

    @property
    def free(self) -> tuple[FreeChannels, ...]:
        """The intermediate channels of each."""
        return tuple(
            FreeChannels(
                (self.linear(index, self.gate), self.linear(index, self.up)),
                self.linear(index, self.down),
            )
            for index in range(self.count)
        )


@dataclass(frozen=True)
class Family:
    """Layout of one model.

    Attributes:
        layers: the number of blocks.
        blocks, embedding, norm, head: where these are; `norm` is the last one, and may be missing.
        stages: a block's linears in the order of the forward pass; those of one stage read the same
            input and so share one Hessian.
        free: channels inside a block whose order is nobody's business.
        context: most positions the model has learned; None: no limit is stated.
        tied: the head is the embedding.
        transposed: linears that are not packed are stored [K, N] (Conv1D).
        attention: transformers' implementation that computes all of it.
        capped: the scores are squeezed before they are used, which nothing here repeats.
        tuples: transformers' block returns its output as the first of several.
        experts: the MLP is one of several.
        stored_mlp: what an `mlp` of transformers' is stored as.
    """

    layers: int
    blocks: str
    embedding: str
    norm: str
    stages: Stages
    free: tuple[FreeChannels, ...]
    context: int | None
    tied: bool
    head: str = "lm_head"
    transposed: bool = False
    attention: str = "sdpa"
    capped: bool = False
    tuples: bool = False
    experts: Experts | None = None
    stored_mlp: str = "mlp"

    @property
    def linears(self) -> tuple[str, ...]:
        """All prunable linears of a block, in order."""
        return tuple(name for stage in self.stages for name in stage)

    @property
    def inner(self) -> str:
        """Everything but the head."""
        return self.blocks.partition(".")[0]

    def block_prefix(self, index: int) -> str:
        """Tensor-name prefix of a block, with its final dot."""
        return f"{self.blocks}.{index}."

    @property
    def observed(self) -> Stages:
        """The stages, and before the first experts their router, whose input is theirs."""
        if self.experts is None:
            return self.stages
        before = len(self.stages) - len(self.experts.stages)
        return (*self.stages[:before], (self.experts.router,), *self.stages[before:])

    def is_routed(self, short: str) -> bool:
        """Whether only some of the tokens reach a linear, by short name."""
        return self.experts is not None and short.startswith(f"{self.experts.place}.experts.")

    def share(self, short: str) -> float:
        """The part of all tokens that reaches a linear, if the router is fair."""
        if self.experts is None or not self.is_routed(short):
            return 1.0
        return self.experts.chosen / self.experts.count
