"""All cases of stories260K's reference, token for token, through 1, 2, 3 and 5 stages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.paths import shared
from support.stages import GREEDY, Chain, Wish
from support.thorough import thorough

MODEL = shared("models/stories260K")
REFERENCE = json.loads((MODEL / "reference.json").read_text())
CASES: list[dict[str, Any]] = REFERENCE["cases"]


def wishes(cases: list[dict[str, Any]]) -> list[Wish]:
    return [Wish(case["prompt_ids"], REFERENCE["max_new_tokens"]) for case in cases]


@pytest.mark.parametrize(
    ("num_stages", "batch_invariant", "chunk"),
    [
        pytest.param(1, False, None, marks=thorough),
        (2, False, 7),
        pytest.param(3, False, None, marks=thorough),
        (5, False, 7),
        (1, True, 7),
        (3, True, None),
    ],
)
def test_all_cases_at_once(num_stages: int, batch_invariant: bool, chunk: int | None) -> None:
    chain = Chain(MODEL, num_stages, batch_invariant=batch_invariant, num_blocks=1024)
    for case, live in zip(CASES, chain.run(wishes(CASES), chunk=chunk), strict=True):
        assert live.tokens[case["n_prompt"] :] == case["output_ids_ignore_eos"]
        errors = [
            abs((token.logprob or 0.0) - known)
            for token, known in zip(live.sampled, case["logprobs"], strict=True)
        ]
        assert max(errors) < 1e-4


@pytest.mark.parametrize("num_stages", [pytest.param(1, marks=thorough), 3])
def test_one_case_at_a_time(num_stages: int) -> None:
    chain = Chain(MODEL, num_stages)
    lives = chain.run(wishes(CASES[::4]), chunk=7 if num_stages == 3 else None, max_rows=1)
    for case, live in zip(CASES[::4], lives, strict=True):
        assert live.tokens[case["n_prompt"] :] == case["output_ids_ignore_eos"]


def test_prefill_again_with_known_output_goes_on_as_before() -> None:
    """As after a preemption: a new run brings the tokens so far, and the rest is the same."""
    case = CASES[0]
    expected = case["output_ids_ignore_eos"]
    chain = Chain(MODEL, 2)
    resumed = Wish(case["prompt_ids"], len(expected), GREEDY, outputs=expected[:20])
    (live,) = chain.run([resumed], chunk=7)
    assert live.tokens[case["n_prompt"] :] == expected
    assert [token.token_id for token in live.sampled] == expected[20:]
