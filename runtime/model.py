"""A model ready to run: checkpoint, spec, decoder and tokenizer, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError, UsageError
from .checkpoint import Checkpoint
from .decoder import Decoder
from .spec import DecoderSpec, decoder_spec
from .threads import in_passing_thread
from .tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Model:
    """Everything the engine needs. `name` is the directory's."""

    name: str
    checkpoint: Checkpoint
    spec: DecoderSpec
    decoder: Decoder
    tokenizer: Tokenizer

    @property
    def max_model_len(self) -> int:
        """Most positions, prompt and answer together."""
        return self.spec.max_positions


def load_model(path: str | Path, dtype: str = "auto", verify: bool = True) -> Model:
    """Open a directory and make it ready to run on the CPU.

    `dtype` is what is computed in: "auto" (float32 on a CPU), "float32" or "bfloat16".

    Raises:
        UsageError: no such directory, or unknown dtype.
        RefusedError, UnsupportedModel, CheckpointError: see Checkpoint, decoder_spec, Tokenizer.
    """
    if dtype not in ("auto", *_DTYPES):
        raise UsageError(f"dtype {dtype!r} is none of auto, {', '.join(_DTYPES)}")
    checkpoint = Checkpoint.open(path, verify)
    spec = decoder_spec(checkpoint.config)
    tokenizer = Tokenizer.open(checkpoint.path)
    _check_vocabulary(checkpoint.path, spec, tokenizer)
    compute, device = _DTYPES.get(dtype, torch.float32), torch.device("cpu")
    decoder = in_passing_thread(lambda: Decoder(checkpoint, spec, compute, device))
    checkpoint.warn_of_unused()
    return Model(checkpoint.path.resolve().name, checkpoint, spec, decoder, tokenizer)


def _check_vocabulary(path: Path, spec: DecoderSpec, tokenizer: Tokenizer) -> None:
    """An embedding may be padded beyond the tokenizer, never the other way round."""
    if tokenizer.vocab_size > spec.vocab:
        raise CheckpointError(
            f"{path}: the tokenizer knows {tokenizer.vocab_size} tokens, "
            f"the embedding has {spec.vocab}"
        )
    outside = [token for token in tokenizer.eos_ids if not 0 <= token < spec.vocab]
    if outside:
        raise CheckpointError(
            f"{path}: end token {outside[0]} is outside the vocabulary of {spec.vocab}"
        )
