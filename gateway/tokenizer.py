"""A model directory's tokenizer: text to ids as transformers' AutoTokenizer does it, and back.

Special tokens come from the post-processor. Where tokenizer_config.json says add_bos_token or
add_eos_token, that replaces the post-processor, as it does in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from gateway.detokenizer import decode
from gateway.token_text import TokenText
from stagemesh.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} where there is no such file; raises CheckpointError."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


class Tokenizer:
    """Thread-safe; encoding long texts takes long, so keep it off the event loop."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        self._backend = backend
        self.bos_token = _content(config.get("bos_token"))
        self.eos_token = _content(config.get("eos_token"))
        backend.no_padding()
        backend.no_truncation()
        if "add_bos_token" in config or "add_eos_token" in config:
            self._add_special_tokens_as(config)
        self.token_text = TokenText(
            json.loads(backend.to_str())["decoder"],
            backend.id_to_token,
            {
                token_id: added.content
                for token_id, added in backend.get_added_tokens_decoder().items()
                if added.special
            },
        )

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Reads tokenizer.json and tokenizer_config.json; raises CheckpointError."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: a gateway needs the model's tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return cls(backend, read_json(directory / "tokenizer_config.json"))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        return decode(self.token_text, token_ids, skip_special=skip_special)

    def is_special(self, token_id: int) -> bool:
        return token_id in self.token_text.special

    def _add_special_tokens_as(self, config: Mapping[str, Any]) -> None:
        before = self.bos_token if config.get("add_bos_token") else ""
        after = self.eos_token if config.get("add_eos_token") else ""
        special = [(token, self._backend.token_to_id(token)) for token in (before, after) if token]
        single = [f"{before}:0"] * bool(before) + ["$A:0"] + [f"{after}:0"] * bool(after)
        pair = [*single, *(piece.replace(":0", ":1").replace("$A", "$B") for piece in single)]
        self._backend.post_processor = TemplateProcessing(
            single=single, pair=pair, special_tokens=list(dict.fromkeys(special))
        )


def _content(token: object) -> str:
    """The text of a token that a config gives as a string, an object, or not at all."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""
