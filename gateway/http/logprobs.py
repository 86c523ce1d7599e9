"""Log-probabilities in their three shapes: OpenAI's old and new one, and vLLM's of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.detokenizer import Detokenizer
from gateway.requests import PromptEcho
from gateway.token_text import TokenText
from stagemesh.plan import SampledToken


class LegacyLogprobs:
    """Of one choice of /v1/completions; knows where in the choice's text each token begins."""

    def __init__(self, token_text: TokenText, *, at_start: bool) -> None:
        self._token_text = token_text
        self._detokenizer = Detokenizer(token_text, at_start=at_start)
        self._num_chars = 0

    def of_prompt(self, echo: PromptEcho) -> dict[str, list[Any]]:
        first = SampledToken(position=0, token_id=echo.token_ids[0])
        return self.of_tokens([first, *echo.logprobs])

    def of_tokens(self, tokens: Sequence[SampledToken]) -> dict[str, list[Any]]:
        return {
            "tokens": [self._token_text.text_of(token.token_id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._candidates(token) for token in tokens],
            "text_offset": [self._offset(token.token_id) for token in tokens],
        }

    def _candidates(self, token: SampledToken) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        text_of = self._token_text.text_of
        candidates = {text_of(token_id): logprob for token_id, logprob in token.alternatives}
        return candidates | {text_of(token.token_id): token.logprob}

    def _offset(self, token_id: int) -> int:
        offset = self._num_chars
        self._num_chars += len(self._detokenizer.push(token_id))
        return offset


def joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Several answers of LegacyLogprobs, one after the other."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry for part in parts for entry in part[name]] for name in names}


def chat_logprobs(token_text: TokenText, tokens: Sequence[SampledToken]) -> list[dict[str, Any]]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        data = token_text.bytes_of(token_id)
        text = data.decode("utf-8", errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    return [
        {
            **entry(token.token_id, token.logprob),
            "top_logprobs": [entry(*alternative) for alternative in token.alternatives],
        }
        for token in tokens
    ]


def prompt_logprobs(token_text: TokenText, echo: PromptEcho) -> list[dict[str, Any] | None]:
    """One entry per prompt token, None for the first: token ids to what is known of them."""

    def entry(token_id: int, logprob: float | None, rank: int | None) -> dict[str, Any]:
        text = token_text.text_of(token_id)
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    def candidates(token: SampledToken) -> dict[str, Any]:
        ranked = {
            str(token_id): entry(token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(token.alternatives, start=1)
        }
        chosen = {str(token.token_id): entry(token.token_id, token.logprob, None)}
        return chosen | ranked

    return [None, *map(candidates, echo.logprobs)]
