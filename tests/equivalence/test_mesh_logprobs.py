"""With --batch-invariant, log-probabilities are the same to the bit, however work is cut."""

from __future__ import annotations

import json

import pytest
from support.mesh import Mesh, Output, greedy_request, running_mesh
from support.paths import shared

from protos import text_generation_pb2 as pb

MODEL = shared("models/stories260K")
CASES = json.loads((MODEL / "reference.json").read_text())["cases"]
ALL, EVERY_FOURTH = slice(None), slice(None, None, 4)


def requests() -> list[pb.GenerateRequest]:
    return [
        greedy_request(
            case["prompt_ids"],
            32,
            ignore_eos=True,
            output=pb.OutputOptions(logprobs=3, prompt_logprobs=2),
        )
        for case in CASES
    ]


def bits(output: Output) -> list[tuple[int, float]]:
    """Every log-probability of a request; floats compare exactly."""
    assert output.prompt is not None
    found = []
    for entry in [*output.prompt.logprobs[1:], *output.logprobs]:
        found += [(t.token_id, t.logprob) for t in (entry.chosen, *entry.alternatives)]
    return found


def one_at_a_time(mesh: Mesh, some: slice = ALL) -> list[list[tuple[int, float]]]:
    return [bits(mesh.generate(request)) for request in requests()[some]]


@pytest.fixture(scope="module")
def baseline() -> list[list[tuple[int, float]]]:
    with running_mesh(MODEL, "--batch-invariant", stages=1) as mesh:
        return one_at_a_time(mesh)


def test_they_are_the_reference_s(baseline: list[list[tuple[int, float]]]) -> None:
    """The reference holds the chosen tokens' log-probabilities as transformers computed them."""
    with running_mesh(MODEL, "--batch-invariant", stages=2) as mesh:
        outputs = mesh.generate_all(requests())
    assert [bits(output) for output in outputs] == baseline
    for output, case in zip(outputs, CASES, strict=True):
        chosen = [entry.chosen.logprob for entry in output.logprobs]
        assert chosen == pytest.approx(case["logprobs"][: len(chosen)], abs=1e-4)


def test_chunks_and_stages(baseline: list[list[tuple[int, float]]]) -> None:
    with running_mesh(MODEL, "--batch-invariant", "--max-chunk-tokens", "7", stages=5) as mesh:
        assert one_at_a_time(mesh, EVERY_FOURTH) == baseline[EVERY_FOURTH]
        assert [bits(output) for output in mesh.generate_all(requests())] == baseline
