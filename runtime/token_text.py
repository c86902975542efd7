"""What a single token stands for: bytes, which need not be whole characters."""

from __future__ import annotations

from functools import cache

from .tokenizer import Tokenizer

_SPACE = "\u2581"  # SentencePiece's sign for a space


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token by itself, those of control tokens included."""
    piece = tokenizer.piece(token)
    if piece is None:
        return b""  # a row of a padded embedding, which no token has
    if tokenizer.is_added(token):
        return piece.encode()
    if tokenizer.byte_level:
        table = _byte_of_letter()
        if all(letter in table for letter in piece):
            return bytes(table[letter] for letter in piece)
    elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token; where its bytes are no text, `bytes:\\x..` as OpenAI writes them."""
    found = token_bytes(tokenizer, token)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


@cache
def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE (Radford et al., 2019) writes each byte as one visible letter.

    Bytes that are visible in Latin-1 stand for themselves; the others, in order, for the letters
    from 256 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + at): byte for at, byte in enumerate(hidden)
    }
