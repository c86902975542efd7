"""The bytes of weights that a model reads for every step, as they lie in memory."""

from __future__ import annotations

from ..runtime.decoder import Decoder
from ..runtime.fused import FusedDecoder
from ..runtime.model import Model


def token_bytes(model: Model) -> int | None:
    """All linears and the head, without keys and values; None on a GPU, which is not known here."""
    decoder, spec = model.decoder, model.spec
    if isinstance(decoder, FusedDecoder):
        blocks, ends = decoder.native.weights
        linears = [linear for block in blocks for linear in block.linears if linear is not None]
        return sum(int(weight.struct.bytes) for weight in (*linears, ends.head))
    if not isinstance(decoder, Decoder) or decoder.device.type != "cpu":
        return None
    shapes = [spec.shape(role) for role in spec.roles] * spec.layers
    weights = sum(rows * columns for rows, columns in (*shapes, (spec.vocab, spec.hidden)))
    return weights * decoder.dtype.itemsize
