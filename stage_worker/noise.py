"""The noise that decides between candidate tokens: a pure function of seed, position and token id.

SplitMix64 (Steele, Lea, Flood 2014) gives the bits. All arithmetic is modulo 2**64:

    mix(z):  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
             z = (z ^ z >> 27) * 0x94D049BB133111EB
             return z ^ z >> 31
    G      = 0x9E3779B97F4A7C15
    stream = mix(mix(seed + G) + (position + 1) * G)
    bits   = mix(stream + (token_id + 1) * G)

so the bits of token t are output number t of a SplitMix64 generator whose state is `stream`.
`position` is that of the token to be chosen, counted from the start of the prompt. The upper 52
bits make u = ((bits >> 12) + 0.5) / 2**52, exact in float64 and never 0 or 1, and the noise is
-log(-log(u)) in float64, which is Gumbel distributed. docs/sampling.md has test vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1


def stream_of(seed: int, position: int) -> int:
    """The state that the noise of all tokens at one position starts from."""
    return _mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN)


def bits_of(stream: int, token_id: int) -> int:
    """64 bits for one token: what `gumbel` computes for many."""
    return _mix(stream + (token_id + 1) * _GOLDEN)


def gumbel(stream: int, token_ids: Tensor) -> Tensor:
    """Noise of each token: int64 ids of any shape -> float64 of the same."""
    return _noise((token_ids + 1) * _signed(_GOLDEN) + _signed(stream))


def gumbel_rows(streams: Sequence[int], token_ids: Tensor) -> Tensor:
    """The same for several positions: ids [V] -> [len(streams), V]."""
    states = torch.tensor([_signed(stream) for stream in streams], device=token_ids.device)
    return _noise((token_ids + 1) * _signed(_GOLDEN) + states[:, None])


def _noise(mixed: Tensor) -> Tensor:
    """From the states of generators; int64 wraps modulo 2**64."""
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(_MULTIPLIERS[0])
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(_MULTIPLIERS[1])
    mixed = mixed ^ _shift_right(mixed, 31)
    uniform = (_shift_right(mixed, 12).to(torch.float64) + 0.5) * 2.0**-52
    noise: Tensor = -torch.log(-torch.log(uniform))
    return noise


def _mix(value: int) -> int:
    value &= _MASK
    value = (value ^ value >> 30) * _MULTIPLIERS[0] & _MASK
    value = (value ^ value >> 27) * _MULTIPLIERS[1] & _MASK
    return value ^ value >> 31


def _shift_right(values: Tensor, count: int) -> Tensor:
    """Shift of unsigned 64-bit numbers, which int64 would fill with its sign."""
    shifted: Tensor = (values >> count) & (2 ** (64 - count) - 1)
    return shifted


def _signed(value: int) -> int:
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value
