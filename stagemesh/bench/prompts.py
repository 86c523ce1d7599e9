"""Prompts of a wanted length: random token ids where a server takes them, else random words.

Random, so that no two share a beginning by chance and a prefix cache helps only where a trace says
that prompts are alike.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from stagemesh.bench.workload import Ask

T = TypeVar("T")

# Ids below are special tokens in most vocabularies.
FIRST_TOKEN_ID = 3

# Short and common, so that most are one token in most vocabularies.
_TEXT = """
a about after again all also and any are as at back be because been before but by can come could day
did do down each even find first for from get give go good great had has have he her here him his
house how I if in into is it its just know large last light like line little long look made make man
many may me men more most much must my name never new no not now of off old on one only or other our
out over own part people place right said same saw say see set she should show small so some still
such take tell than that the their them then there these they thing think this those three through
time to too tree two under up us use very want was water way we well went were what when where which
who why will with word work world would write year you young
"""
WORDS = tuple(_TEXT.split())


def token_prompt(ask: Ask, vocab_size: int) -> list[int]:
    kinds = range(min(FIRST_TOKEN_ID, vocab_size - 1), vocab_size)
    return _random(ask, ask.prompt_tokens, ask.block_tokens, kinds)


@dataclass(frozen=True, slots=True)
class WordRate:
    """How a server's tokenizer counts our words: a prompt of n words has
    `fixed_tokens + n * tokens_per_word` tokens, about."""

    fixed_tokens: float
    tokens_per_word: float

    @classmethod
    def of(cls, few: tuple[int, int], many: tuple[int, int]) -> WordRate:
        """From two prompts that the server has counted, each (words, tokens)."""
        per_word = (many[1] - few[1]) / (many[0] - few[0])
        if per_word <= 0:
            raise ValueError(f"{many[0]} words are {many[1]} tokens, {few[0]} are {few[1]}")
        return cls(few[1] - few[0] * per_word, per_word)

    def num_words(self, num_tokens: int) -> int:
        return max(1, round((num_tokens - self.fixed_tokens) / self.tokens_per_word))


def word_prompt(ask: Ask, rate: WordRate) -> str:
    num_words = rate.num_words(ask.prompt_tokens)
    block_words = max(1, round(ask.block_tokens / rate.tokens_per_word))
    return " ".join(_random(ask, num_words, block_words, WORDS))


def _random(ask: Ask, num: int, block_size: int, kinds: Sequence[T]) -> list[T]:
    """`num` of `kinds`: those of the request's blocks first, then its own."""
    made: list[T] = []
    for block in ask.blocks:
        if len(made) >= num:
            break
        made += random.Random(f"{ask.salt} block {block}").choices(kinds, k=block_size)
    del made[num:]
    return made + random.Random(ask.seed).choices(kinds, k=num - len(made))
