"""Drawing many rows at once is drawing each alone."""

from __future__ import annotations

import torch

from stage_worker.batched_draw import draw_rows, is_unfiltered
from stage_worker.noise import gumbel, gumbel_rows, stream_of
from stage_worker.sampler import SampleRequest, sample
from stagemesh.sampling import MAX_SEED, SamplingSpec


def test_rows_have_the_noise_of_each_alone() -> None:
    streams = [stream_of(seed, position) for seed, position in ((0, 0), (MAX_SEED, 131071), (7, 3))]
    ids = torch.arange(1000)
    for row, stream in zip(gumbel_rows(streams, ids), streams, strict=True):
        torch.testing.assert_close(row, gumbel(stream, ids), rtol=1e-15, atol=1e-15)


def test_rows_draw_what_each_alone_draws() -> None:
    logits = torch.randn(70, 500, generator=torch.Generator().manual_seed(0)) * 2
    specs = [SamplingSpec(temperature=0.1 + i / 20, seed=i) for i in range(70)]
    requests = [SampleRequest(5 + i, spec, [1], []) for i, spec in enumerate(specs)]
    alone = [token.token_id for token in sample(logits.clone(), requests) if token is not None]
    together = draw_rows(
        logits.log_softmax(dim=1),
        [spec.temperature for spec in specs],
        [stream_of(request.spec.seed, request.position) for request in requests],
    )
    assert together == alone
    assert len(set(alone)) > 10


def test_only_plain_draws_are_unfiltered() -> None:
    assert is_unfiltered(SamplingSpec(temperature=0.5))
    for filters in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        assert not is_unfiltered(SamplingSpec(temperature=0.5, **filters))  # type: ignore[arg-type]
    assert not is_unfiltered(SamplingSpec(temperature=0.0))
