"""The closed table of architectures the pruner knows: where their blocks and linears are.

Keyed by the `model_type` of config.json. A name from a config is only ever looked up here; it
never chooses a path or an import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, UnsupportedModel


@dataclass(frozen=True)
class FreeChannels:
    """Linears of a block, by short name: the rows of `makers` are the columns of `reader`."""

    makers: tuple[str, ...]
    reader: str


@dataclass(frozen=True)
class Family:
    """Layout of one architecture.

    `stages` lists a block's linears in the order of the forward pass; those of one stage read the
    same input and so share one Hessian.
    """

    blocks: str
    embedding: str
    stages: tuple[tuple[str, ...], ...]
    free: FreeChannels | None = None  # channels inside a block whose order is nobody's business

    @property
    def linears(self) -> tuple[str, ...]:
        """All prunable linears of a block, in order."""
        return tuple(name for stage in self.stages for name in stage)

    def block_prefix(self, index: int) -> str:
        """Tensor-name prefix of a block, with its final dot."""
        return f"{self.blocks}.{index}."


_LLAMA = Family(
    blocks="model.layers",
    embedding="model.embed_tokens",
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    free=FreeChannels(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
)

FAMILIES: Mapping[str, Family] = {"llama": _LLAMA}


def family_of(config: Mapping[str, Any]) -> Family:
    """Look up the family of a parsed config.json.

    Raises:
        UnsupportedModel: the config asks for code of its own, or its model_type is unknown.
        CheckpointError: the number of layers is missing or absurd.
    """
    if "auto_map" in config:
        raise UnsupportedModel(
            "config.json has an auto_map: the model asks for code of its own, which is never run"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedModel(
            f"config.json: model_type {str(kind)[:40]!r} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= 10_000:
        raise CheckpointError(f"config.json: num_hidden_layers {str(layers)[:40]} is no number")
    return FAMILIES[kind]
