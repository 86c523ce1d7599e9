"""Rotary position embedding: inverse frequencies of every kind, and the rotation itself.

    T tokens, H heads, D head dim, P <= D dimensions of a head that are rotated

Cosine and sine are computed for the positions of a step, once per step, so there is no table to
grow, and the angle of a position does not depend on how it was reached.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stagemesh.model_spec import ModelSpec
from stagemesh.rope_spec import RopeSpec


def all_frequencies(spec: ModelSpec, total_length: int) -> tuple[Tensor, ...]:
    """`inverse_frequencies` of each of the model's `ropes`."""
    return tuple(inverse_frequencies(rope, spec.head_dim, total_length) for rope in spec.ropes)


def inverse_frequencies(rope: RopeSpec, head_dim: int, total_length: int) -> Tensor:
    """[P / 2] float32 on the CPU.

    `total_length` (prompt + max_tokens of the request) sets the scale of the dynamic kind and the
    factors of longrope, for all positions alike; other kinds do not look at it.
    """
    num_dims = rope.rotated_dims(head_dim)
    if rope.kind == "dynamic":
        return _base_frequencies(_dynamic_theta(rope, num_dims, total_length), num_dims)
    plain = _base_frequencies(rope.theta, num_dims)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, num_dims)
    if rope.kind == "longrope":
        is_long = total_length > rope.original_max_position
        factors = torch.tensor(rope.long_factors if is_long else rope.short_factors)
        return 1.0 / (factors * rope.theta ** _exponents(num_dims))
    return plain


def angles(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, 1, P / 2], float32, times the attention factor.

    positions: [T]; frequencies: [P / 2], or [T, P / 2] where sequences differ.
    """
    theta = positions.to(torch.float32)[:, None] * frequencies
    return (theta.cos() * factor)[:, None], (theta.sin() * factor)[:, None]


def both_halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What `rotate` multiplies by, [T, 1, P], from cosine and sine [T, 1, P / 2]."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, H, D], the two halves of whose first P dimensions are the two coordinates; cos and
    sin, in x's dtype, are those of `both_halves`."""
    num_dims = cos.shape[-1]
    if num_dims < x.shape[-1]:
        return torch.cat((rotate(x[..., :num_dims], cos, sin), x[..., num_dims:]), dim=-1)
    turned = x.roll(x.shape[-1] // 2, dims=-1).mul_(sin)
    return turned.add_(x * cos)


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim


def _base_frequencies(theta: float, head_dim: int) -> Tensor:
    frequencies: Tensor = 1.0 / (theta ** _exponents(head_dim))
    return frequencies


def _dynamic_theta(rope: RopeSpec, head_dim: int, total_length: int) -> float:
    """NTK-aware scaling: theta grows with the length, so that low frequencies are stretched."""
    length = max(total_length, rope.original_max_position)
    stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
    return float(rope.theta * stretch ** (head_dim / (head_dim - 2)))


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Long waves are slowed down by the factor, short ones kept, those between blended."""
    wavelength = 2 * math.pi / frequencies
    longest_kept = rope.original_max_position / rope.high_freq_factor
    shortest_slowed = rope.original_max_position / rope.low_freq_factor
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    slowed = torch.where(wavelength > shortest_slowed, frequencies / rope.factor, blended)
    return torch.where(wavelength < longest_kept, frequencies, slowed)


def _yarn(rope: RopeSpec, head_dim: int) -> Tensor:
    """NTK by parts (arXiv 2309.00071, section 3.2): a ramp over dimensions from kept to slowed."""
    low, high = (_yarn_dimension(rope, head_dim, n) for n in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step and not a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    waves = rope.theta ** _exponents(head_dim)
    kept = 1 - ramp
    return (1.0 / (rope.factor * waves)) * (1 - kept) + (1.0 / waves) * kept


def _yarn_dimension(rope: RopeSpec, head_dim: int, num_rotations: float) -> float:
    """The dimension that turns `num_rotations` times within the original context."""
    turns = rope.original_max_position / (num_rotations * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(rope.theta))
