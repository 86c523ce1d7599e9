"""Turns tokens into text as they come, never emitting half a UTF-8 character.

The cost of a token does not depend on what came before. The pieces put together are the text that
all tokens together give; bytes that are no UTF-8 become U+FFFD, as Unicode recommends.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from gateway.token_text import TokenText


class Detokenizer:
    """Incremental; one per text.

    `at_start`: no text comes before, so that a space which the tokenizer put there is dropped.
    """

    def __init__(
        self, token_text: TokenText, *, at_start: bool = True, skip_special: bool = True
    ) -> None:
        self._token_text = token_text
        self._skip_special = skip_special
        self._drop_space = at_start and token_text.strips_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int, *, show_special: bool = False) -> str:
        """The text that is complete with this token; may be empty."""
        hidden = self._skip_special and not show_special and token_id in self._token_text.special
        if hidden:
            return ""
        data = self._token_text.bytes_of(token_id)
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left of an unfinished character, when nothing more comes."""
        return self._decoder.decode(b"", final=True)


def decode(token_text: TokenText, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
    """The text of all the tokens."""
    detokenizer = Detokenizer(token_text, skip_special=skip_special)
    return "".join([*map(detokenizer.push, token_ids), detokenizer.flush()])
