"""The noise is what its definition says, to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stage_worker.noise import bits_of, gumbel, gumbel_bounds, gumbel_of, stream_of

MASK = 2**64 - 1
# (seed, position, token id, bits): also in docs/sampling.md.
VECTORS: list[tuple[int, int, int, int]] = [
    (0, 0, 0, 0x238275BC38FCBE91),
    (0, 0, 1, 0xF89A2566B5822C54),
    (0, 1, 0, 0x2F101FE21496EA20),
    (1, 0, 0, 0xB18A02F46D8D86C3),
    (42, 17, 319, 0xAB8B43706EDEE7B9),
    (2**64 - 1, 131071, 151935, 0x6467542D1552E233),
]


def split_mix_64(state: int, count: int) -> int:
    """Output number `count` (from 0) of SplitMix64, stepping as the generator is defined."""
    value = 0
    for _ in range(count + 1):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        value = state
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        value ^= value >> 31
    return value


def test_split_mix_64_itself() -> None:
    """The generator's published first outputs from state 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [split_mix_64(1234567, i) for i in range(3)] == published


@pytest.mark.parametrize(("seed", "position", "token", "bits"), VECTORS)
def test_vectors(seed: int, position: int, token: int, bits: int) -> None:
    assert bits_of(stream_of(seed, position), token) == bits


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, MASK])
@pytest.mark.parametrize("position", [0, 7, 2**31])
def test_bits_are_outputs_of_the_generator(seed: int, position: int) -> None:
    stream = split_mix_64((split_mix_64(seed, 0) + position * 0x9E3779B97F4A7C15) & MASK, 0)
    assert stream_of(seed, position) == stream
    assert [bits_of(stream, t) for t in range(20)] == [split_mix_64(stream, t) for t in range(20)]


STREAMS = [(0, 0), (42, 3), (MASK, 100_000), (2**63 + 5, 2**20)]


@pytest.mark.parametrize(("seed", "position"), STREAMS)
def test_arrays_and_integers_agree(seed: int, position: int) -> None:
    ids = np.array([0, 1, 2, 1000, 151_935, 2**31 - 1])
    stream = stream_of(seed, position)
    uniforms = [((bits_of(stream, t) >> 12) + 0.5) / 2**52 for t in ids.tolist()]
    expected = [-math.log(-math.log(u)) for u in uniforms]
    assert [gumbel_of(stream, t) for t in ids.tolist()] == expected
    assert gumbel(stream, ids).tolist() == pytest.approx(expected, rel=1e-14, abs=1e-14)


def test_extreme_bits_make_noise_that_is_finite_and_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for bits, noise in ((0, -3.604), (MASK, 36.737)):
        monkeypatch.setattr("stage_worker.noise.bits_of", lambda stream, token, bits=bits: bits)
        assert gumbel_of(0, 0) == pytest.approx(noise, abs=1e-3)


@pytest.mark.parametrize("num_tokens", [1, 7, 20_000])
def test_bounds_are_above_the_noise_and_near_where_it_is_large(num_tokens: int) -> None:
    streams = [stream_of(*each) for each in STREAMS]
    bounds = gumbel_bounds(streams, num_tokens, torch.device("cpu")).numpy()
    assert bounds.shape == (len(streams), num_tokens)
    noise = np.stack([gumbel(stream, np.arange(num_tokens)) for stream in streams])
    assert (bounds > noise).all()
    large = noise > 0.37  # where u > 1/2
    assert (bounds[large] < noise[large] + 0.4).all()


def test_noise_is_gumbel_distributed() -> None:
    """Kolmogorov-Smirnov distance to exp(-exp(-x)) over tokens, and over positions."""
    over_tokens = gumbel(stream_of(1, 1), np.arange(6_000))
    over_positions = np.array([gumbel_of(stream_of(1, p), 7) for p in range(6_000)])
    for values in (over_tokens, over_positions):
        cdf = np.exp(-np.exp(-np.sort(values)))
        steps = np.arange(1, len(values) + 1) / len(values)
        distance = float(np.abs(cdf - steps).max())
        assert distance < 1.63 / math.sqrt(len(values))  # 1 % level
