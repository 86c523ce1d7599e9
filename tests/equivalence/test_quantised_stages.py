"""Stages with weights of 16, 8 and 4 bits follow float32 as closely as their bits allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mesh import greedy_request, running_mesh
from support.paths import DEMO_MODEL
from support.stages import Chain, Live, Wish

from stage_worker import fbgemm
from stage_worker.linear_schemes import Numerics, choose_scheme
from stage_worker.weight_source import FloatSource
from stagemesh.errors import ConfigError
from stagemesh.quantization import parse_quantization
from stagemesh.sampling import SamplingSpec

pytestmark = pytest.mark.skipif(not fbgemm.is_available(), reason="needs AVX2")

PROMPTS = [[5 + 37 * i % 2000 for i in range(a, a + n)] for a, n in ((0, 40), (50, 7), (90, 90))]
SPEC = SamplingSpec(temperature=0.0, num_logprobs=3)
# Mean difference of log-probabilities of the same tokens: measured, and some room.
TOLERANCE = {"auto": 1e-5, "int8": 0.08, "int4-g32": 0.25, "int4-g128": 0.35}


def chain(quantization: str, num_stages: int = 1, **options: Any) -> Chain:
    return Chain(DEMO_MODEL, num_stages, quantization=quantization, **options)


def prompt_logprobs(of: Chain) -> torch.Tensor:
    lives = of.run([Wish(prompt, 1, prompt_logprobs=True) for prompt in PROMPTS], chunk=32)
    return torch.tensor([token.logprob for live in lives for token in live.prompt_logprobs])


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return prompt_logprobs(chain("none"))


@pytest.mark.parametrize("quantization", TOLERANCE)
def test_log_probabilities_are_near(quantization: str, exact: torch.Tensor) -> None:
    difference = float((prompt_logprobs(chain(quantization, 2)) - exact).abs().mean())
    print(f"{quantization}: {difference:.2g}")
    assert difference < TOLERANCE[quantization]
    assert difference > 0 or quantization == "auto"


def test_memory_is_what_the_scheme_takes() -> None:
    """Of the demo model's weights, all but a thousandth are linear, head and embedding. What an
    int4 matrix takes beside its weights is half of what it takes in so small a model."""
    whole = chain("none").stages[0].facts.weight_bytes
    share = {
        name: chain(name).stages[0].facts.weight_bytes / whole
        for name in ("auto", "int8", "int4-g64,head=int4", "int4-g32,head=int4")
    }
    assert share["auto"] == pytest.approx(0.5, abs=0.002)
    assert share["int8"] == pytest.approx(0.26, abs=0.01)
    assert share["int4-g64,head=int4"] == pytest.approx(0.31, abs=0.01)
    assert share["int4-g32,head=int4"] == pytest.approx(0.36, abs=0.01)


def test_parts_that_differ(exact: torch.Tensor) -> None:
    """Each part that is quantised moves the numbers further away, and nothing else does."""
    few = prompt_logprobs(chain("none,2:3=int8"))
    more = prompt_logprobs(chain("int8,head=none", 3))
    assert 0 < float((few - exact).abs().mean()) < float((more - exact).abs().mean())


def facts(live: Live) -> tuple[list[int], list[Any]]:
    return live.tokens, live.sampled


@pytest.mark.parametrize("quantization", ["int8", "int4-g64"])
def test_bits_do_not_depend_on_the_batch(quantization: str) -> None:
    wishes = [Wish(prompt, 4, SPEC, prompt_logprobs=True) for prompt in PROMPTS]
    alone = chain(quantization, batch_invariant=True)
    expected = [facts(live) for live in alone.run(wishes, max_rows=1)]
    together = chain(quantization, 3, batch_invariant=True)
    assert [facts(live) for live in together.run(wishes, chunk=11)] == expected


def test_other_devices_are_refused_by_name() -> None:
    numerics = Numerics(torch.bfloat16, torch.device("cuda"), parse_quantization("int8"))
    weights = [FloatSource(torch.zeros(8, 8))]
    with pytest.raises(ConfigError, match="int8 needs device cpu"):
        choose_scheme("layer.0", weights, numerics)
    plain = Numerics(torch.bfloat16, torch.device("cuda"))
    assert choose_scheme("layer.0", weights, plain).held_bytes(8, 8, plain) == 128


def test_a_mesh_of_quantised_stages() -> None:
    """What processes make of --quantization is what the stages of the tests above do."""
    prompt = PROMPTS[0]
    (live,) = chain("int8,head=none", batch_invariant=True).run([Wish(prompt, 24)])
    options = ("--batch-invariant", "--quantization", "int8, head=none")
    with running_mesh(DEMO_MODEL, *options, stages=2) as mesh:
        output = mesh.generate(greedy_request(prompt, 24, ignore_eos=True))
    assert output.token_ids == live.tokens[len(prompt) :]
