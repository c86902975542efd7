"""From the flags of `serve` to what the server and its engines take."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..files import find_directory
from ..runtime.engine_settings import EngineSettings
from ..server.serve import Offer
from .flags import Scheduling, Serving

KEY_VARIABLE = "HALFWEAVE_API_KEY"
_LEAST_KEY_CHARS = 8


def offers(paths: Sequence[str], names: Sequence[str]) -> list[Offer]:
    """The models to serve, each under its directory's name or the one given in its place.

    Raises:
        UsageError: there are more names than models, or two of one name.
    """
    if len(names) > len(paths):
        raise UsageError(f"{len(names)} names are given for {len(paths)} models")
    own = [find_directory(path).resolve().name for path in paths]
    chosen = [*names, *own[len(names) :]]
    twice = [name for name in chosen if chosen.count(name) > 1]
    if twice:
        raise UsageError(f"two models are called {twice[0]!r}", "--name gives each its own")
    return [Offer(path, name) for path, name in zip(paths, chosen, strict=True)]


def engine_settings(scheduling: Scheduling) -> EngineSettings:
    """What the engines are to keep to."""
    return EngineSettings(
        max_running=scheduling.max_num_seqs,
        max_waiting=scheduling.max_waiting,
        max_model_len=scheduling.max_model_len,
        tokens_per_step=scheduling.step_tokens,
        kv_bytes=None if scheduling.kv_mib is None else scheduling.kv_mib * 2**20,
        share_prefixes=scheduling.prefix_cache,
        queue_timeout_s=scheduling.queue_timeout,
    )


def api_keys(serving: Serving) -> tuple[str, ...]:
    """The keys of flags, file and environment; none means that anybody may ask.

    Raises:
        UsageError: a key is too short to be one, or the file cannot be read or can be by others.
    """
    keys = [*serving.api_key]
    if serving.api_key_file is not None:
        keys += _keys_of(serving.api_key_file)
    elif (from_environment := os.environ.get(KEY_VARIABLE)) is not None:
        keys.append(from_environment)
    for key in keys:
        legal = key.isascii() and key.isprintable() and key == key.strip()
        if len(key) < _LEAST_KEY_CHARS or not legal:
            raise UsageError(
                f"an API key has at least {_LEAST_KEY_CHARS} visible characters of ASCII, which "
                "headers can hold"
            )
    return tuple(keys)


def _keys_of(file: Path) -> list[str]:
    try:
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise UsageError(f"{file}: others can read these keys", f"chmod 600 {file}")
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: no file of API keys: {error}") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UsageError(f"{file}: there is no key in it")
    return keys
