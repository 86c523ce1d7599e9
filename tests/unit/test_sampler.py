"""Tokens are drawn as the parameters define; definitions are written out again here, in floats."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from stage_worker.sampler import SampleRequest, sample
from stagemesh.plan import SampledToken
from stagemesh.sampling import SamplingSpec

VOCAB = 24
NUM_DRAWS = 2500
# Chi-square: the quantile below which it falls with probability 1 - 1e-4, by Wilson and Hilferty.
NORMAL_QUANTILE = 3.719


def logits_of(seed: int, vocab: int = VOCAB) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(0.0, 1.5) for _ in range(vocab)]


def reference(
    logits: Sequence[float], spec: SamplingSpec, prompt: Sequence[int], output: Sequence[int]
) -> tuple[dict[int, float], list[float]]:
    """(probabilities of the tokens that can be drawn, log-probabilities told), from definitions."""
    values = [x + spec.logit_bias.get(i, 0.0) for i, x in enumerate(logits)]
    for token in {*prompt, *output}:
        value, penalty = values[token], spec.repetition_penalty
        values[token] = value / penalty if value > 0 else value * penalty
    for token, count in Counter(output).items():
        values[token] -= spec.presence_penalty + spec.frequency_penalty * count
    if len(output) < spec.min_tokens:
        for token in spec.stop_token_ids:
            if token < len(values):
                values[token] = -math.inf
    total = math.log(sum(math.exp(x) for x in values))
    logprobs = [x - total for x in values]
    weights = {i: math.exp(x / spec.temperature) for i, x in enumerate(logprobs)}
    ranked = sorted(weights, key=lambda i: (-weights[i], i))
    if spec.top_k:
        ranked = ranked[: spec.top_k]
    mass, kept, everything = 0.0, [], sum(weights[i] for i in ranked)
    for token in ranked:
        if mass < spec.top_p * everything:
            kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= spec.min_p * weights[kept[0]]]
    kept_mass = sum(weights[i] for i in kept)
    return {i: weights[i] / kept_mass for i in kept if weights[i] > 0}, logprobs


def draw(
    logits: Sequence[float],
    spec: SamplingSpec,
    prompt: Sequence[int],
    output: Sequence[int],
    num: int = NUM_DRAWS,
) -> list[SampledToken]:
    """Tokens for `num` seeds, each a row of one batch."""
    rows = torch.tensor([list(logits)] * num, dtype=torch.float32)
    requests = [
        SampleRequest(len(prompt) + len(output), replace_seed(spec, seed), prompt, output)
        for seed in range(num)
    ]
    return [token for token in sample(rows, requests) if token is not None]


def replace_seed(spec: SamplingSpec, seed: int) -> SamplingSpec:
    return dataclasses.replace(spec, seed=seed)


def check_distribution(counts: Counter[int], expected: dict[int, float]) -> None:
    """Chi-square at the 1e-4 level; rare tokens are put together. The seeds are fixed."""
    assert set(counts) <= set(expected), "a token that the filters exclude was drawn"
    num = sum(counts.values())
    cells: list[tuple[float, float]] = [(0.0, 0.0)]
    for token in sorted(expected, key=lambda i: expected[i]):
        observed, wanted = counts[token], expected[token] * num
        if cells[-1][1] < 10:
            cells[-1] = (cells[-1][0] + observed, cells[-1][1] + wanted)
        else:
            cells.append((observed, wanted))
    statistic = sum((observed - wanted) ** 2 / wanted for observed, wanted in cells)
    freedom = max(1, len(cells) - 1)
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + NORMAL_QUANTILE * math.sqrt(spread)) ** 3


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 5},
    "top_k_1": {"top_k": 1},
    "top_k_all": {"top_k": VOCAB + 5},
    "top_p": {"top_p": 0.7},
    "top_p_tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "filters": {"temperature": 1.3, "top_k": 12, "top_p": 0.85, "min_p": 0.08},
    "repetition": {"repetition_penalty": 1.6},
    "repetition_below_1": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "frequency_negative": {"frequency_penalty": -0.5},
    "bias": {"logit_bias": {3: 4.0, 7: -100.0, 900: 5.0}},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (0, 4, 900)},
    "min_tokens_reached": {"min_tokens": 7, "stop_token_ids": (0, 4)},
    "everything": {
        "temperature": 0.9,
        "top_k": 15,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "logit_bias": {1: 1.0, 2: -1.0},
        "min_tokens": 8,
        "stop_token_ids": (5,),
    },
}
PROMPT, OUTPUT = [1, 2, 3, 3, 9], [4, 4, 4, 2, 11, 0, 0]


@pytest.mark.parametrize("parameters", CASES.values(), ids=CASES)
def test_distribution_and_log_probabilities(parameters: dict[str, Any]) -> None:
    logits = logits_of(1)
    spec = SamplingSpec(**parameters, num_logprobs=3)
    expected, logprobs = reference(logits, spec, PROMPT, OUTPUT)
    tokens = draw(logits, spec, PROMPT, OUTPUT)
    assert len(tokens) == NUM_DRAWS
    check_distribution(Counter(token.token_id for token in tokens), expected)
    likeliest = sorted(range(VOCAB), key=lambda i: -logprobs[i])[:3]
    for token in tokens[:50]:
        assert token.position == len(PROMPT) + len(OUTPUT)
        assert token.logprob == pytest.approx(logprobs[token.token_id], abs=1e-5)
        assert [i for i, _ in token.alternatives] == likeliest
        told = [value for _, value in token.alternatives]
        assert told == pytest.approx([logprobs[i] for i in likeliest], abs=1e-5)


def test_the_check_notices_a_wrong_distribution() -> None:
    logits = logits_of(1)
    expected, _ = reference(logits, SamplingSpec(temperature=1.3), PROMPT, OUTPUT)
    drawn = Counter(t.token_id for t in draw(logits, SamplingSpec(), PROMPT, OUTPUT))
    with pytest.raises(AssertionError):
        check_distribution(drawn, expected)


def test_positions_of_one_request_are_independent_draws() -> None:
    logits, spec = logits_of(2), SamplingSpec(seed=7)
    expected, _ = reference(logits, spec, [], [])
    rows = torch.tensor([logits] * NUM_DRAWS)
    tokens = sample(rows, [SampleRequest(p, spec, [1], []) for p in range(NUM_DRAWS)])
    check_distribution(Counter(t.token_id for t in tokens if t is not None), expected)


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    rows = torch.zeros(2, 1000)
    rows[0, [999, 500, 7]] = 3.0
    greedy = SamplingSpec(temperature=0.0)
    tokens = sample(rows, [SampleRequest(1, greedy, [1], [])] * 2)
    assert [token.token_id for token in tokens if token] == [7, 0]


def test_equal_logits_at_the_edge_of_top_k_keep_the_lowest_ids() -> None:
    tokens = draw([1.0] * 10, SamplingSpec(top_k=3), [], [1], 400)
    assert {token.token_id for token in tokens} == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-30, 1e-8, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = logits_of(3)
    tokens = draw(logits, SamplingSpec(temperature=temperature), [], [1], 300)
    likeliest = max(range(VOCAB), key=lambda i: logits[i])
    if temperature < 1:
        assert {token.token_id for token in tokens} == {likeliest}
    else:
        assert len({token.token_id for token in tokens}) > VOCAB // 2


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = random.Random(4)
    specs = [
        SamplingSpec(
            temperature=generator.choice([0.0, 0.5, 1.0, 2.0]),
            top_k=generator.choice([0, 3, 10]),
            top_p=generator.choice([1.0, 0.8]),
            min_p=generator.choice([0.0, 0.1]),
            repetition_penalty=generator.choice([1.0, 1.3]),
            presence_penalty=generator.choice([0.0, 0.5]),
            frequency_penalty=generator.choice([0.0, 1.0]),
            logit_bias=generator.choice([{}, {3: 9.0, 7: -2.0, 900: 1.0}]),
            min_tokens=generator.choice([0, 9]),
            stop_token_ids=(4, 900),
            seed=generator.getrandbits(64),
            num_logprobs=generator.choice([None, 2]),
        )
        for _ in range(64)
    ]
    rows = torch.tensor([logits_of(10 + i, 300) for i in range(64)])
    outputs = [[2 * i] * (i % 3) + [i, 3] * (i % 2) for i in range(64)]
    requests = [SampleRequest(i, spec, [i, i], outputs[i]) for i, spec in enumerate(specs)]
    together = sample(rows.clone(), requests)
    for i, request in enumerate(requests):
        (alone,) = sample(rows[i : i + 1].clone(), [request])
        assert alone == together[i]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_alone(value: float) -> None:
    rows = torch.tensor([logits_of(i) for i in range(3)])
    request = SampleRequest(4, SamplingSpec(seed=3, num_logprobs=1), [1], [])
    clean = sample(rows.clone(), [request] * 3)
    rows[1, 5] = value
    got = sample(rows, [request] * 3)
    assert got[1] is None
    assert (got[0], got[2]) == (clean[0], clean[2])


def test_a_row_without_any_candidate_fails() -> None:
    every = SamplingSpec(min_tokens=3, stop_token_ids=tuple(range(VOCAB)))
    assert sample(torch.tensor([logits_of(1)]), [SampleRequest(1, every, [1], [])]) == [None]
