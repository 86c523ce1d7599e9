"""Turns the tokens of one request into deltas: text, stop strings, the stop token, the echo.

Plain code without I/O: what comes in decides what goes out.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.detokenizer import Detokenizer
from gateway.prepare import Prepared
from gateway.requests import Delta, PromptEcho
from gateway.stop_strings import StopStrings
from gateway.tokenizer import Tokenizer
from stagemesh.plan import SampledToken


class OutputAssembler:
    """One per choice. Feed `push` until `stop_text` is set or the mesh has finished, then `finish`.

    `num_tokens` counts the tokens that went out, up to and including the one that completed a stop
    string; what comes after that is ignored.
    """

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer) -> None:
        stopping, output = prepared.request.stopping, prepared.request.output
        self.num_tokens = 0
        self._prepared = prepared
        self._tokenizer = tokenizer
        self._stops = StopStrings(stopping.stop, include=stopping.include_stop_in_output)
        self._min_tokens = stopping.min_tokens
        self._show_stop_token = stopping.include_stop_in_output
        self._stop_token_ids = frozenset(prepared.sampling.stop_token_ids)
        self._detokenizer = Detokenizer(
            tokenizer.token_text,
            at_start=all(map(tokenizer.is_special, prepared.prompt_token_ids)),
            skip_special=output.skip_special_tokens,
        )
        self._echo = output.echo_prompt or output.prompt_logprobs is not None

    @property
    def stop_text(self) -> str | None:
        return self._stops.matched

    def push(
        self, tokens: Sequence[SampledToken], prompt_logprobs: Sequence[SampledToken] = ()
    ) -> Delta | None:
        """What these tokens add; None where that is nothing, which only happens without tokens."""
        index, taken, text = self.num_tokens, [], ""
        for token in tokens:
            if self.stop_text is not None:
                break
            taken.append(token)
            self.num_tokens += 1
            text += self._show(token.token_id)
        return self._delta(index, tuple(taken), text, prompt_logprobs)

    def finish(self) -> Delta | None:
        """What was held back; None where that is nothing."""
        text = self._stops.push(self._detokenizer.flush(), may_stop=False) + self._stops.flush()
        return self._delta(self.num_tokens, (), text)

    def _show(self, token_id: int) -> str:
        if token_id not in self._stop_token_ids:
            text = self._detokenizer.push(token_id)
        elif self._show_stop_token:
            text = self._detokenizer.push(token_id, show_special=True)
        else:
            return ""
        return self._stops.push(text, may_stop=self.num_tokens > self._min_tokens)

    def _delta(
        self,
        index: int,
        tokens: tuple[SampledToken, ...],
        text: str,
        prompt_logprobs: Sequence[SampledToken] = (),
    ) -> Delta | None:
        echo = None
        if self._echo:
            self._echo = False
            echo = self._make_echo(tuple(prompt_logprobs))
        if not tokens and not text and echo is None:
            return None
        return Delta(index, tokens, text, echo)

    def _make_echo(self, logprobs: tuple[SampledToken, ...]) -> PromptEcho:
        text = ""
        if self._prepared.request.output.echo_prompt:
            given = self._prepared.prompt_text
            token_ids = self._prepared.prompt_token_ids
            text = self._tokenizer.decode(token_ids) if given is None else given
        return PromptEcho(self._prepared.prompt_token_ids, text, logprobs)
