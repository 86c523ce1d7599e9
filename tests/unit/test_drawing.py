"""Rows drawn together get what the definition gives each alone, however many there are."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stage_worker.candidates import at_least, largest
from stage_worker.drawing import Draw, draw
from stage_worker.noise import gumbel_of, stream_of
from stagemesh.sampling import SamplingSpec

# Sizes that fill vector registers and caches, and such that do not.
VOCABS = [*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 333, 1000, 4099, 32000, 32003]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def expected(logprobs: list[float], each: Draw) -> int:
    """The definition, number by number."""
    spec, highest = each.spec, max(logprobs)
    below = torch.tensor(logprobs) - highest  # float32
    scaled = [x / spec.temperature for x in below.tolist()]
    ids = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if spec.top_k:
        ids = ids[: spec.top_k]
    if spec.top_p < 1.0:
        total, before, kept = math.fsum(math.exp(scaled[i]) for i in ids), 0.0, []
        for i in ids:
            if kept and before >= spec.top_p * total:
                break
            kept.append(i)
            before += math.exp(scaled[i])
        ids = kept
    if spec.min_p > 0.0:
        ids = [i for i in ids if scaled[i] >= math.log(spec.min_p)]
    return max(ids, key=lambda i: (scaled[i] + gumbel_of(each.stream, i), -i))


def random_draw(generator: random.Random) -> Draw:
    spec = SamplingSpec(
        temperature=generator.choice([1e-320, 0.01, 0.6, 1.0, 1.0, 3.0, 100.0]),
        top_k=generator.choice([0, 0, 1, 3, 40, 1000]),
        top_p=generator.choice([1.0, 1.0, 1e-9, 0.5, 0.95, 1 - 1e-12]),
        min_p=generator.choice([0.0, 0.0, 0.05, 1.0, 1e-8]),
    )
    return Draw(spec, stream_of(generator.getrandbits(64), generator.randrange(10_000)))


def random_logprobs(num_rows: int, vocab: int, seed: int) -> Tensor:
    """Peaked and flat rows, of which some have many equal numbers, and some that are masked."""
    generator = torch.Generator().manual_seed(seed)
    spread = 4 * torch.rand(num_rows, 1, generator=generator)
    logits = torch.randn(num_rows, vocab, generator=generator) * spread
    logits[::3] = (logits[::3] * 2).round() / 2
    logits[:, : vocab // 3] = -math.inf
    return logits.log_softmax(dim=1)


@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_are_those_of_the_definition_in_any_company(vocab: int, threads: None) -> None:
    generator = random.Random(vocab)
    num_rows = 40 if vocab < 5000 else 12
    draws = [random_draw(generator) for _ in range(num_rows)]
    logprobs = random_logprobs(num_rows, vocab, vocab)
    tokens = draw(logprobs, draws)
    assert tokens == [
        expected(row, each) for row, each in zip(logprobs.tolist(), draws, strict=True)
    ]
    assert [draw(logprobs[i : i + 1], [draws[i]])[0] for i in range(num_rows)] == tokens
    for start in (1, 2, 5):  # rows that begin elsewhere in memory
        assert draw(logprobs[start:], draws[start:]) == tokens[start:]


def test_draws_are_not_all_alike() -> None:
    """Else the tests here would show little."""
    logprobs = random_logprobs(200, 1000, 7)
    generator = random.Random(7)
    assert len(set(draw(logprobs, [random_draw(generator) for _ in range(200)]))) > 100


@pytest.mark.parametrize("vocab", VOCABS)
def test_sums_of_a_row_have_the_same_bits_in_any_company(vocab: int, threads: None) -> None:
    """What is left to torch's arithmetic: where top_p ends follows from it."""
    rows = torch.randn(9, vocab, dtype=torch.float64) * 5
    alone = torch.cat([row.clone()[None].softmax(dim=1) for row in rows])
    for start in range(3):
        assert torch.equal(rows[start:].softmax(dim=1), alone[start:])


def test_the_largest_of_equal_ones_are_the_lowest_ids() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0], [5.0] * 5, [0.0, 1.0, 2.0, 3.0, 4.0]])
    found = largest(values, [3, 2, 9])
    assert [row.ids.tolist() for row in found] == [[1, 3, 2], [0, 1], [4, 3, 2, 1, 0]]
    assert found[0].values.tolist() == [3.0, 3.0, 2.0]


def test_values_that_reach_a_limit() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0], [7.0, 8.0, 9.0]])
    found = at_least(values, torch.tensor([2.0, 1.0, 7.0]))
    assert [row.ids.tolist() for row in found] == [[1, 2], [], [0, 1, 2]]
    assert found[2].values.tolist() == [7.0, 8.0, 9.0]
