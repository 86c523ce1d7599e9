"""A seeded request gives the same tokens alone, in a batch, in any cut, after preemption."""

from __future__ import annotations

import pytest
from support.mesh import running_mesh
from support.paths import shared
from support.thorough import THOROUGH

from protos import text_generation_pb2 as pb

MODEL = shared("models/stories260K")
NUM_REQUESTS = 32 if THOROUGH else 16


def seeded_request(seed: int) -> pb.GenerateRequest:
    """Every seed another mixture of parameters, so that neighbours in a batch differ."""
    sampling = pb.SamplingParams(temperature=0.5 + (seed % 5) * 0.25, seed=seed)
    if seed % 2:
        sampling.top_k = 5 + seed
    if seed % 3:
        sampling.top_p = 0.9
    if seed % 5 == 1:
        sampling.min_p = 0.05
    if seed % 4 == 2:
        sampling.repetition_penalty = 1.2
        sampling.presence_penalty = 0.5
        sampling.frequency_penalty = 0.3
    if seed % 7 == 3:
        sampling.logit_bias[400 + seed] = 3.0
    return pb.GenerateRequest(
        text="Once upon a time" if seed % 2 else "The little dog",
        sampling=sampling,
        stopping=pb.StoppingCriteria(max_tokens=32, ignore_eos=True),
    )


REQUESTS = [seeded_request(seed) for seed in range(NUM_REQUESTS)]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Tokens of each request when it has a mesh of one stage to itself."""
    with running_mesh(MODEL, "--batch-invariant", stages=1) as mesh:
        return [list(mesh.generate(request).token_ids) for request in REQUESTS]


def test_different_seeds_give_different_tokens(alone: list[list[int]]) -> None:
    assert len({tuple(tokens) for tokens in alone}) > NUM_REQUESTS * 3 // 4


def test_all_at_once(alone: list[list[int]]) -> None:
    with running_mesh(MODEL, "--batch-invariant", stages=3) as mesh:
        outputs = mesh.generate_all(REQUESTS)
        assert [output.token_ids for output in outputs] == alone
        assert mesh.wait_idle().queue.num_preempted == 0


def test_after_preemption(alone: list[list[int]]) -> None:
    options = ("--batch-invariant", "--block-size", "4", "--num-blocks", "130")
    with running_mesh(MODEL, *options, stages=3) as mesh:
        outputs = mesh.generate_all(REQUESTS)
        assert [output.token_ids for output in outputs] == alone
        assert mesh.wait_idle().queue.num_preempted > 0


def test_without_batch_invariant_kernels(alone: list[list[int]]) -> None:
    """Noise is a hash, so tokens change only where two candidates are within rounding error."""
    with running_mesh(MODEL, stages=2) as mesh:
        outputs = mesh.generate_all(REQUESTS)
    same = sum(output.token_ids == tokens for output, tokens in zip(outputs, alone, strict=True))
    assert same >= NUM_REQUESTS - 1


def test_an_unseeded_request_can_be_repeated_by_its_summary() -> None:
    with running_mesh(MODEL, "--batch-invariant", stages=2) as mesh:
        request = pb.GenerateRequest(
            text="One day",
            sampling=pb.SamplingParams(temperature=1.0),
            stopping=pb.StoppingCriteria(max_tokens=24, ignore_eos=True),
        )
        first, second = mesh.generate(request), mesh.generate(request)
        assert first.token_ids != second.token_ids
        assert first.summary is not None
        request.sampling.seed = first.summary.seed
        assert mesh.generate(request).token_ids == first.token_ids
