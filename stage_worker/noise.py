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

    R rows, V vocabulary, C candidates

What decides is computed for one token alone (`gumbel_of`): a vectorised logarithm may give an
element other bits by where in an array it lies. For many tokens there is the same to within
MAX_ERROR (`gumbel`), and a cheap upper bound (`gumbel_bounds`), to find out which few are to be
decided between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_MASK = 2**64 - 1
# For roundings in float32, of which there are few.
_BOUND_SLACK = 1e-4

MAX_ERROR = 1e-9
"""Of `gumbel`: far more than the last places in which logarithms differ."""


def stream_of(seed: int, position: int) -> int:
    """The state that the noise of all tokens at one position starts from."""
    return _mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN)


def bits_of(stream: int, token_id: int) -> int:
    """64 bits for one token."""
    return _mix(stream + (token_id + 1) * _GOLDEN)


def gumbel_of(stream: int, token_id: int) -> float:
    """The noise of one token."""
    return -math.log(-math.log(((bits_of(stream, token_id) >> 12) + 0.5) * 2.0**-52))


def gumbel(stream: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """[C] -> [C], to within MAX_ERROR."""
    mixed = (token_ids + 1).astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(stream)
    for shift, multiplier in _ROUNDS:
        mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(multiplier)
    mixed ^= mixed >> np.uint64(_LAST_SHIFT)
    noise: NDArray[np.float64] = -np.log(-np.log(((mixed >> np.uint64(12)) + 0.5) * 2.0**-52))
    return noise


def gumbel_bounds(streams: Sequence[int], num_tokens: int, device: torch.device) -> Tensor:
    """float32 [R, V]: more than the noise of tokens [0, V) on each stream, mostly by less than 0.4.

    For u = 1 - e the noise is at most -log(e), and log2 of a float is at least its bits, read as a
    number: the mantissa stands for what a straight line between powers of two would give.
    """
    states = torch.tensor([_signed(stream) for stream in streams], device=device)
    ids = torch.arange(1, num_tokens + 1, device=device)
    mixed = ids * _signed(_GOLDEN) + states[:, None]  # int64 wraps modulo 2**64
    spare = torch.empty_like(mixed)
    for shift, multiplier in _ROUNDS:
        torch.bitwise_right_shift(mixed, shift, out=spare)
        mixed ^= spare.bitwise_and_(2 ** (64 - shift) - 1)  # without the sign that was shifted in
        mixed *= _signed(multiplier)
    # The upper 31 bits, which the last shift does not change: e lies in [n, n + 1) / 2**31.
    mixed.bitwise_right_shift_(64 - _LAST_SHIFT).bitwise_not_().bitwise_and_(2**_LAST_SHIFT - 1)
    as_bits = mixed.to(torch.float32).view(torch.int32).to(torch.float32)
    # Of a float32, 2**23 of its bits are one power of two, and 127 of these are 1.
    bounds: Tensor = as_bits.mul_(-(2.0**-23) * math.log(2))
    return bounds.add_((127 + _LAST_SHIFT) * math.log(2) + _BOUND_SLACK)


def _mix(value: int) -> int:
    value &= _MASK
    for shift, multiplier in _ROUNDS:
        value = (value ^ value >> shift) * multiplier & _MASK
    return value ^ value >> _LAST_SHIFT


def _signed(value: int) -> int:
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value
