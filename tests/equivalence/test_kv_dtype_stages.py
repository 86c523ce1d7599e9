"""Stages whose KV is in fewer bits say what one stage with the same says, near what float32 says;
in processes as in one, and preempted as undisturbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mesh import greedy_request, running_mesh
from support.paths import DEMO_MODEL
from support.stages import Chain, Wish

KV_DTYPES = ["bfloat16", "float16", "int8"]
# Mean difference of log-probabilities of the same tokens: measured, and some room.
TOLERANCE = {"float16": 0.002, "bfloat16": 0.01, "int8": 0.02}
PROMPTS = [[5 + 37 * i % 2000 for i in range(a, a + n)] for a, n in ((0, 40), (50, 7), (90, 90))]
NUM_TOKENS = 48


def chain(kv_dtype: str, num_stages: int = 1, **options: Any) -> Chain:
    return Chain(DEMO_MODEL, num_stages, kv_dtype=kv_dtype, **options)


def outputs(of: Chain, **options: Any) -> list[list[int]]:
    lives = of.run([Wish(prompt, NUM_TOKENS) for prompt in PROMPTS], **options)
    assert all(live.error is None for live in lives)
    return [live.tokens[len(live.wish.prompt) :] for live in lives]


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return prompt_logprobs(chain("auto"))


def prompt_logprobs(of: Chain) -> torch.Tensor:
    lives = of.run([Wish(prompt, 1, prompt_logprobs=True) for prompt in PROMPTS], chunk=32)
    return torch.tensor([token.logprob for live in lives for token in live.prompt_logprobs])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_log_probabilities_are_near(kv_dtype: str, exact: torch.Tensor) -> None:
    difference = float((prompt_logprobs(chain(kv_dtype, 2)) - exact).abs().mean())
    print(f"{kv_dtype}: {difference:.2g}")
    assert 0 < difference < TOLERANCE[kv_dtype]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_tokens_do_not_depend_on_the_cut(kv_dtype: str) -> None:
    """The same rows in a step, on one, two or three stages: the same numbers, invariant or not."""
    expected = outputs(chain(kv_dtype))
    for num_stages in (2, 3):
        assert outputs(chain(kv_dtype, num_stages)) == expected


def test_a_sequence_that_began_anew_goes_on_alike() -> None:
    """After a preemption its tokens are computed again, all at once: the same bits in the pages."""
    (live,) = chain("int8", 2, batch_invariant=True).run([Wish(PROMPTS[0], NUM_TOKENS)])
    before = live.tokens[len(PROMPTS[0]) :][:20]
    again = Wish(PROMPTS[0], NUM_TOKENS, outputs=before)
    (anew,) = chain("int8", 3, batch_invariant=True).run([again], chunk=13)
    assert anew.tokens == live.tokens
    assert anew.sampled == live.sampled[20:]


def test_a_mesh_has_more_blocks_and_says_what_its_stages_say() -> None:
    """Of processes, where blocks run out and sequences are preempted."""
    expected = outputs(chain("int8", batch_invariant=True), max_rows=1)
    requests = [greedy_request(prompt, NUM_TOKENS, ignore_eos=True) for prompt in PROMPTS]
    options = ("--kv-dtype", "int8", "--batch-invariant")
    # Two stages of three layers with four KV heads of 32: 13.5 KiB a block, 48 KiB as float32.
    with running_mesh(DEMO_MODEL, *options, "--max-kv-memory", "175KiB", stages=2) as mesh:
        (pipeline,) = mesh.status().pipelines
        assert pipeline.num_blocks == 175 * 1024 // (2 * 3 * 16 * 4 * (32 + 4)) == 12
        assert [output.token_ids for output in mesh.generate_all(requests)] == expected
        assert mesh.wait_idle().queue.num_preempted > 0
