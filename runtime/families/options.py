"""What the readers of several families ask a config for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError, UnsupportedModel
from ..fields import flag, positive_int
from ..spec import MLP_ROLES, ROLES

_MAX_LAYERS = 1000
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
ATTENTION_ROLES = tuple(role for role in ROLES if role not in MLP_ROLES)


def layers_of(config: Mapping[str, Any], key: str = "num_hidden_layers") -> int:
    """The number of blocks."""
    layers = positive_int(config, key)
    if layers > _MAX_LAYERS:
        raise CheckpointError(f"config.json: {key} is {layers}, over {_MAX_LAYERS}")
    return layers


def heads_of(config: Mapping[str, Any], key: str, hidden: int) -> int:
    """Heads that part the hidden size evenly."""
    heads = positive_int(config, key)
    if hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is no multiple of {heads} heads")
    return heads


def activation_of(config: Mapping[str, Any], key: str, default: str) -> str:
    """The spec's name of an activation."""
    name = config.get(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json: {key} {str(name)[:40]!r} is not supported; "
            f"supported: {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]


def present(config: Mapping[str, Any], *keys: str) -> str:
    """The first of these spellings that the config has; older ones differ."""
    return next((key for key in keys if config.get(key) is not None), keys[0])


def require(config: Mapping[str, Any], key: str, wanted: bool) -> None:
    """Refuse a config that asks for the other way; a missing field is the wanted one."""
    if flag(config, key, wanted) is not wanted:
        raise UnsupportedModel(f"config.json: {key} {str(not wanted).lower()} is not supported")
