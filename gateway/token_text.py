"""What each token is in bytes: the decoder of a tokenizer.json, taken apart token by token.

Understands the two kinds that language models use: byte-level BPE, where every character of a token
stands for a byte, and SentencePiece's, where a marker stands for a space and "<0x0A>" for a byte.
With bytes per token, text can be decoded incrementally and exactly, which a decoder that wants the
whole list of tokens cannot do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from stagemesh.errors import UnsupportedModel

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SPACE_MARKER = "▁"


def _byte_level_alphabet() -> dict[str, int]:
    """Characters of byte-level BPE to bytes: printable Latin-1 is itself, the rest is moved up."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(itself)]
    alphabet = {chr(byte): byte for byte in itself}
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(moved)})
    return alphabet


_ALPHABET = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[char] for char in token)
    except KeyError:  # an added token, written as it reads
        return token.encode()


def _sentence_piece(marker: str, byte_fallback: bool) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        match = _BYTE_TOKEN.match(token) if byte_fallback else None
        if match:
            return bytes([int(match[1], 16)])
        return token.replace(marker, " ").encode()

    return to_bytes


class TokenText:
    """Bytes per token id.

    `strips_first_space` says that one space at the very beginning of a text is not shown, since the
    tokenizer put it there. Raises UnsupportedModel for a decoder of another kind.
    """

    def __init__(
        self,
        decoder: Mapping[str, Any] | None,
        token_of: Callable[[int], str | None],
        special: Mapping[int, str],
    ) -> None:
        self.special = special
        self._token_of = token_of
        self._to_bytes, self.strips_first_space = _understand(decoder)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes, special tokens included; b"" for an id that is no token."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def text_of(self, token_id: int) -> str:
        """The token alone, as UTF-8 with replacement characters."""
        return self.bytes_of(token_id).decode("utf-8", errors="replace")

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self.special:
            return self.special[token_id].encode()
        token = self._token_of(token_id)
        return b"" if token is None else self._to_bytes(token)


def _understand(decoder: Mapping[str, Any] | None) -> tuple[Callable[[str], bytes], bool]:
    """The function from token to bytes, and whether the first space of a text is stripped."""
    parts = _parts(decoder)
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return _byte_level, False
    if kinds == ["Metaspace"]:
        never = (
            parts[0].get("prepend_scheme") == "never" or parts[0].get("add_prefix_space") is False
        )
        return _sentence_piece(parts[0].get("replacement", _SPACE_MARKER), False), not never
    if kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        markers = [p["pattern"].get("String") for p in parts if p["type"] == "Replace"]
        to_bytes = _sentence_piece((markers or [None])[0] or _SPACE_MARKER, "ByteFallback" in kinds)
        return to_bytes, any(_strips(part) for part in parts)
    raise UnsupportedModel(f"tokenizer.json has a decoder that is not understood: {kinds or None}")


def _parts(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [inner for part in decoder["decoders"] for inner in _parts(part)]
    return [decoder]


def _strips(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Metaspace":
        return part.get("prepend_scheme") != "never"
    return part["type"] == "Strip" and int(part.get("start", 0)) > 0
