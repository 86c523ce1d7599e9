"""A pretend model whose every output depends on everything that it should have read.

A layer's output at a position hashes its input with the layer's KV at every position up to there,
in order. So one wrong block, one stale page or one position never computed gives another token.
Integers stand for hidden states and KV; None stands for NaN. Tuples of integers hash alike in
every process.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagemesh.plan import SampledToken
from stagemesh.sampling import SamplingSpec

NUM_LAYERS = 4
VOCAB_SIZE = 40
ADAPTERS = ("", "adapter a", "adapter b")

_MASK = 2**61 - 2


def mix(*numbers: int) -> int:
    return hash(numbers) & _MASK


def embed(token_id: int, position: int, rope_length: int, adapter: int) -> int:
    return mix(11, token_id, position, rope_length, *([adapter] if adapter else []))


def key_value(layer: int, hidden: int | None, position: int) -> int | None:
    return None if hidden is None else mix(12, layer, hidden, position)


def attend(layer: int, hidden: int | None, cache: Sequence[int | None]) -> int | None:
    """`cache`: the layer's KV of positions [0, position], the present one included."""
    if hidden is None or None in cache:
        return None
    return hash((13, layer, hidden, *cache)) & _MASK


def sample(
    hidden: int, position: int, outputs: Sequence[int], num_prompt: int, spec: SamplingSpec
) -> int:
    """The token after `position`. As with penalties, prompt and output count apart."""
    token_id = mix(14, hidden, position, spec.seed, num_prompt, *outputs) % VOCAB_SIZE
    while len(outputs) < spec.min_tokens and token_id in spec.stop_token_ids:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def prompt_logprob(hidden: int, position: int, token_id: int) -> SampledToken:
    """What the model says after `position` of the token that stands behind it."""
    return SampledToken(position + 1, token_id, logprob=-(mix(15, hidden, token_id) % 997) / 100)


def rope_length(total_length: int, dynamic_rope_length: int) -> int:
    return total_length if 0 < dynamic_rope_length < total_length else 0


def adapter_number(adapter: str) -> int:
    """Texts do not hash alike in every process."""
    return ADAPTERS.index(adapter)


class RightAnswer:
    """The one right output of a request: all layers, all positions, no blocks, no batches."""

    def __init__(
        self,
        prompt: tuple[int, ...],
        spec: SamplingSpec,
        total_length: int,
        dynamic_rope: int,
        adapter: str = "",
    ) -> None:
        self._spec = spec
        self._num_prompt = len(prompt)
        self._rope = rope_length(total_length, dynamic_rope)
        self._adapter = adapter_number(adapter)
        self._tokens = list(prompt)
        self._caches: list[list[int | None]] = [[] for _ in range(NUM_LAYERS)]
        self._hidden: list[int] = []

    def output(self, num_tokens: int) -> tuple[int, ...]:
        """The first tokens of the output, stop tokens notwithstanding."""
        while len(self._tokens) < self._num_prompt + num_tokens:
            position = len(self._tokens) - 1
            hidden = self._hidden_after(position)
            outputs = self._tokens[self._num_prompt :]
            self._tokens.append(sample(hidden, position, outputs, self._num_prompt, self._spec))
        return tuple(self._tokens[self._num_prompt : self._num_prompt + num_tokens])

    def prompt_logprobs(self) -> tuple[SampledToken, ...]:
        return tuple(
            prompt_logprob(self._hidden_after(position), position, self._tokens[position + 1])
            for position in range(self._num_prompt - 1)
        )

    def _hidden_after(self, position: int) -> int:
        while len(self._hidden) <= position:
            here = len(self._hidden)
            hidden: int | None = embed(self._tokens[here], here, self._rope, self._adapter)
            for layer, cache in enumerate(self._caches):
                cache.append(key_value(layer, hidden, here))
                hidden = attend(layer, hidden, cache)
            assert hidden is not None
            self._hidden.append(hidden)
        return self._hidden[position]
