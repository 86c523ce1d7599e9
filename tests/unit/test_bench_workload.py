"""What a load consists of: lengths, arrivals, prompts, and how a seed decides them."""

from __future__ import annotations

import random

import pytest

from stagemesh.bench.prompts import FIRST_TOKEN_ID, WORDS, WordRate, token_prompt, word_prompt
from stagemesh.bench.traces import TraceEntry
from stagemesh.bench.workload import (
    Ask,
    Lengths,
    drawn_asks,
    poisson_arrivals_s,
    positive_numbers,
    replayed_arrivals_s,
    trace_asks,
    whole_numbers,
    with_cancels,
)
from stagemesh.errors import ConfigError


def test_lengths_are_read_and_drawn_with_both_ends() -> None:
    assert Lengths.read("128") == Lengths(128, 128)
    assert str(Lengths.read(" 64-256 ")) == "64-256"
    rng = random.Random(1)
    assert {Lengths(2, 4).draw(rng) for _ in range(100)} == {2, 3, 4}


@pytest.mark.parametrize("text", ["", "0", "8-4", "-3", "1.5", "a", "4-", "1-2-3"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be lengths"):
        Lengths.read(text)


def test_a_seed_decides_requests_and_another_changes_them() -> None:
    some = drawn_asks(20, Lengths(1, 50), Lengths(1, 50), "seed")
    assert some == drawn_asks(20, Lengths(1, 50), Lengths(1, 50), "seed")
    assert some != drawn_asks(20, Lengths(1, 50), Lengths(1, 50), "other")


def test_poisson_arrivals_have_their_rate_and_exponential_gaps() -> None:
    times_s = poisson_arrivals_s(5.0, 20_000, "seed")
    assert times_s == sorted(times_s)
    assert times_s[-1] / len(times_s) == pytest.approx(0.2, rel=0.05)
    gaps_s = [b - a for a, b in zip([0.0, *times_s], times_s, strict=False)]
    # Memoryless: the share of gaps longer than the mean is 1/e.
    assert sum(gap_s > 0.2 for gap_s in gaps_s) / len(gaps_s) == pytest.approx(0.368, abs=0.02)


def test_a_trace_is_replayed_from_its_first_arrival_and_faster() -> None:
    assert replayed_arrivals_s([10.0, 12.0, 11.0], 2.0) == [0.0, 1.0, 0.5]
    assert replayed_arrivals_s([], 2.0) == []


def test_a_trace_is_scaled_and_what_is_too_long_is_left_out_and_counted() -> None:
    trace = [TraceEntry(0.0, 100, 10), TraceEntry(1.0, 4, 0), TraceEntry(2.0, 1000, 10)]
    asks, arrivals_s, num_left_out = trace_asks(trace, "seed", length_scale=0.5, max_tokens=100)
    assert [(ask.prompt_tokens, ask.output_tokens) for ask in asks] == [(50, 5), (2, 1)]
    assert arrivals_s == [0.0, 1.0]
    assert num_left_out == 1


def test_a_share_is_cancelled_before_its_end() -> None:
    asks = with_cancels(drawn_asks(2000, Lengths(5, 5), Lengths(1, 9), "s"), 0.3, "seed")
    cancelled = [ask for ask in asks if ask.cancel_after_tokens is not None]
    assert all(0 < (ask.cancel_after_tokens or 0) < ask.output_tokens for ask in cancelled)
    assert len(cancelled) / len(asks) == pytest.approx(0.3 * 8 / 9, abs=0.03)
    assert with_cancels(asks[:0], 1.0, "seed") == []


def test_prompts_have_the_length_that_was_asked_for() -> None:
    for length in (1, 7, 600):
        prompt = token_prompt(Ask(length, 1, seed=3), vocab_size=1000)
        assert len(prompt) == length
        assert all(FIRST_TOKEN_ID <= token_id < 1000 for token_id in prompt)
    assert token_prompt(Ask(5, 1, seed=3), 1000) == token_prompt(Ask(5, 9, seed=3), 1000)
    assert token_prompt(Ask(5, 1, seed=3), 1000) != token_prompt(Ask(5, 1, seed=4), 1000)


def test_prompts_share_as_many_tokens_as_their_blocks_say() -> None:
    one = token_prompt(Ask(25, 1, seed=1, blocks=(7, 8, 9), block_tokens=10), 50_000)
    other = token_prompt(Ask(40, 1, seed=2, blocks=(7, 8, 5), block_tokens=10), 50_000)
    assert one[:20] == other[:20]
    assert one[20:25] != other[20:25]
    assert (len(one), len(other)) == (25, 40)
    salted = Ask(25, 1, seed=1, blocks=(7, 8, 9), block_tokens=10, salt="another run")
    assert token_prompt(salted, 50_000)[:10] != one[:10]


def test_words_are_as_many_as_the_server_counts() -> None:
    rate = WordRate.of((16, 23), (144, 183))
    assert rate == WordRate(fixed_tokens=3.0, tokens_per_word=1.25)
    words = word_prompt(Ask(103, 1, seed=5), rate).split(" ")
    assert len(words) == 80
    assert set(words) <= set(WORDS)
    with pytest.raises(ValueError, match="tokens"):
        WordRate.of((16, 20), (144, 20))


def test_lists_of_numbers_name_their_option_where_they_are_none() -> None:
    assert whole_numbers("--batch", ("1", "8")) == (1, 8)
    assert positive_numbers("--rate", ("0.5", "2")) == (0.5, 2.0)
    for bad in ("0", "x", "-1", ""):
        with pytest.raises(ConfigError, match="--batch"):
            whole_numbers("--batch", (bad,))
        with pytest.raises(ConfigError, match="--rate"):
            positive_numbers("--rate", (bad,))
    with pytest.raises(ConfigError, match="--rate"):
        positive_numbers("--rate", ("inf",))
