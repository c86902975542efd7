"""The bytes of weights that a model reads for every step, as they lie in memory."""

from __future__ import annotations

import math

from ..kernels.cpu.library import library
from ..runtime import roof
from ..runtime.decoder import Decoder
from ..runtime.fused import FusedDecoder
from ..runtime.model import Model


def token_bytes(model: Model) -> int | None:
    """All linears and the head, of experts those chosen, without keys and values.

    None on a GPU, which is not known here.
    """
    decoder, spec = model.decoder, model.spec
    if isinstance(decoder, FusedDecoder):
        blocks, ends = decoder.native.weights
        linears = [linear for block in blocks for linear in block.linears if linear is not None]
        return sum(int(weight.struct.bytes) for weight in (*linears, ends.head))
    if not isinstance(decoder, Decoder) or decoder.device.type != "cpu":
        return None
    native = None if model.exact else library()
    if native is not None:
        return roof.token_bytes(native, model.checkpoint, spec)
    inside = (linear for layer in range(spec.layers) for linear in spec.linears(layer))
    weights = sum(linear.read * math.prod(linear.shape) for linear in inside)
    others = (*spec.never_packed.values(), (spec.vocab, spec.embedded))
    return round(weights + sum(map(math.prod, others))) * decoder.dtype.itemsize
