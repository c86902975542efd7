"""The names that a checkpoint's tensors have, whoever saved it.

Some checkpoints were saved from a model without its head, and their names lack the beginning that
transformers gives to everything but the head; it adds it on loading, and so does this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...kernels.shards import ShardedTensors

_PREFIXES: Mapping[str, str] = {
    "bloom": "transformer.",
    "gemma2": "model.",
    "gemma3_text": "model.",
    "gpt2": "transformer.",
    "gpt_neox": "gpt_neox.",
    "llama": "model.",
    "mistral": "model.",
    "mixtral": "model.",
    "opt": "model.",
    "phi3": "model.",
    "qwen2": "model.",
    "qwen3": "model.",
    "qwen3_moe": "model.",
}
_TRANSPOSED = frozenset({"gpt2"})
_HEADS = ("lm_head.", "embed_out.")
# Buffers that older versions of transformers saved, and newer ones compute and pass over.
_BUFFERS = (
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
    "rotary_emb.inv_freq",
)


# Classes that transformers took over as they are, and that configs of before still ask for.
_ADOPTED: Mapping[str, frozenset[str]] = {"phi3": frozenset({"Phi3Config", "Phi3ForCausalLM"})}


def asks_for_own_code(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names code beside it, other than what transformers has by that name."""
    named = config.get("auto_map", {})
    kind = config.get("model_type")
    known = _ADOPTED.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
    if not isinstance(named, dict):
        return True
    classes = {each.rpartition(".")[2] if isinstance(each, str) else "" for each in named.values()}
    return not classes <= known


def with_base_prefix(config: Mapping[str, Any], tensors: ShardedTensors) -> ShardedTensors:
    """The tensors of a model with that config.json, by the names that transformers has for them.

    Those of an unknown family keep theirs.

    Raises:
        CheckpointError: a tensor is there with its beginning and without.
    """
    kind = config.get("model_type")
    prefix = _PREFIXES.get(kind) if isinstance(kind, str) else None
    if prefix is None:
        return tensors
    outside = (prefix, *_HEADS)
    return tensors.renamed(lambda name: name if name.startswith(outside) else prefix + name)


def dense_is_transposed(config: Mapping[str, Any]) -> bool:
    """Whether linears of the blocks that are not packed are stored as [K, N], as by GPT-2."""
    return config.get("model_type") in _TRANSPOSED


def is_ignored(name: str) -> bool:
    """Whether a tensor is one that nobody reads, and nobody misses."""
    return name.endswith(tuple(f".{buffer}" for buffer in _BUFFERS))
