"""A model ready to run: checkpoint, spec, decoder and tokenizer, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError, HalfweaveError, UnsupportedModel, UsageError
from ..kernels.cpu.library import library
from ..kernels.device import parse_device
from .checkpoint import Checkpoint, check_tied
from .decoder import Decoder
from .families import decoder_spec
from .fused import FusedBits, FusedDecoder, lacking
from .loading import Loader
from .paged import PagedDecoder
from .spec import DecoderSpec
from .threads import in_passing_thread
from .tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD_BITS, KV_BITS = (8, 4), (16, 8)


@dataclass(frozen=True)
class LoadSettings:
    """How a model is loaded; the fields are the arguments of `load_model`."""

    dtype: str = "auto"
    verify: bool = True
    head_bits: int = 8
    kv_bits: int = 16
    device: str = "cpu"


@dataclass(frozen=True)
class Model:
    """Everything the engine needs.

    `name` is the directory's; `exact` says that nothing is rounded for the sake of speed.
    """

    name: str
    checkpoint: Checkpoint
    spec: DecoderSpec
    decoder: PagedDecoder
    tokenizer: Tokenizer
    exact: bool = True

    @property
    def max_model_len(self) -> int:
        """Most positions, prompt and answer together."""
        return self.spec.max_positions


def load_model(
    path: str | Path,
    dtype: str = "auto",
    verify: bool = True,
    head_bits: int = 8,
    kv_bits: int = 16,
    device: str = "cpu",
) -> Model:
    """Open a directory and make it ready to run on `device`: cpu, cuda or cuda:N.

    `dtype` is what is computed in: "float32" or "bfloat16" throughout, or "auto": whatever is
    fastest here, which rounds the inputs of weights of 4 and 8 bits to 8 bits and, where the fused
    decoder knows the family (docs/families.md), keys and values to fp16.

    `head_bits` are those of the head where `auto` rounds it, which is in models that have weights
    of 4 or 8 bits: 8, or 4, which is faster and less exact. `kv_bits` are those of keys and values
    where `auto` rounds them: 16, or 8 with a scale for every vector, which takes half the memory.

    On a GPU `auto` is the packed kernels (docs/gpu.md) in 16 bits, or torch where a model has parts
    that they lack; `head_bits` says nothing there.

    Raises:
        UsageError: no such directory or device, or unknown dtype or bits.
        HalfweaveError: a GPU is asked for, and Triton is not installed.
        RefusedError, UnsupportedModel, CheckpointError: see Checkpoint, decoder_spec, Tokenizer.
    """
    if dtype not in ("auto", *_DTYPES):
        raise UsageError(f"dtype {dtype!r} is none of auto, {', '.join(_DTYPES)}")
    if head_bits not in HEAD_BITS:
        raise UsageError(f"head bits {head_bits} are neither 8 nor 4")
    if kv_bits not in KV_BITS:
        raise UsageError(f"key and value bits {kv_bits} are neither 16 nor 8")
    where = parse_device(device)
    checkpoint = Checkpoint.open(path, verify)
    spec = decoder_spec(checkpoint.config)
    if spec.tied:
        check_tied(checkpoint.tensors, spec.names.embedding, spec.names.head)
    tokenizer = Tokenizer.open(checkpoint.path)
    _check_vocabulary(checkpoint.path, spec, tokenizer)
    bits = FusedBits(head_bits, kv_bits)
    if where.type == "cuda":
        decoder: PagedDecoder = _gpu_decoder(checkpoint, spec, dtype, kv_bits, where)
    else:
        decoder = in_passing_thread(lambda: _decoder(checkpoint, spec, dtype, bits))
    checkpoint.warn_of_unused()
    name, exact = checkpoint.path.resolve().name, dtype != "auto"
    return Model(name, checkpoint, spec, decoder, tokenizer, exact)


def _decoder(
    checkpoint: Checkpoint, spec: DecoderSpec, dtype: str, bits: FusedBits
) -> PagedDecoder:
    native = library() if dtype == "auto" else None
    if native is not None and not lacking(spec):
        return FusedDecoder(checkpoint, spec, native, bits)
    compute, exact = _DTYPES.get(dtype, torch.float32), dtype != "auto"
    return Decoder(checkpoint, spec, compute, torch.device("cpu"), exact)


def _gpu_decoder(
    checkpoint: Checkpoint, spec: DecoderSpec, dtype: str, kv_bits: int, device: torch.device
) -> PagedDecoder:
    if dtype != "auto":
        return Decoder(checkpoint, spec, _DTYPES[dtype], device, exact=True)
    try:
        from .gpu_decoder import GpuDecoder
    except ImportError as error:
        raise HalfweaveError(
            "the GPU kernels are compiled by Triton, which is not installed",
            "pip install 'halfweave[cuda]', or --dtype bfloat16, which torch computes in",
        ) from error
    compute = gpu_dtype(checkpoint)
    try:
        return GpuDecoder(Loader(checkpoint, spec, compute, device), kv_bits)
    except UnsupportedModel:
        return Decoder(checkpoint, spec, compute, device, exact=False)


def gpu_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What a GPU's kernels compute a model in, if nothing else is asked for."""
    stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    return torch.float16 if stored == "float16" else torch.bfloat16


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
