"""RMS norms, as a model's family has them.

T tokens; W numbers that are normed together
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage_worker.collectives import Group
from stagemesh.model_spec import ModelSpec


class RmsNorm:
    """In float32, whatever the type of what is normed."""

    def __init__(self, spec: ModelSpec) -> None:
        self._eps = spec.rms_norm_eps
        self._wide = spec.norms.wide

    def __call__(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Over the last dimension, [..., W]; x itself where there is no weight, [W]."""
        if weight is None:
            return x
        if x.dtype == torch.float32:
            return torch.nn.functional.rms_norm(x, weight.shape, weight, self._eps)
        wide = x.float()
        return self._scaled(wide, _mean_square(wide), weight, x.dtype)

    def over_ranks(
        self, parts: Sequence[Tensor], weights: Sequence[Tensor], group: Group
    ) -> list[Tensor]:
        """Each over what all ranks have of it together; this one has `parts`, [T, its numbers].

        All ranks have equally many numbers, and where some are on several ranks (KV heads that are
        fewer than ranks), all are on equally many: so the mean of the ranks' means is the mean over
        each number once.
        """
        if group.size == 1:
            return [self(part, weight) for part, weight in zip(parts, weights, strict=True)]
        wide = [part.float() for part in parts]
        means = torch.stack([_mean_square(part) for part in wide])
        group.all_reduce(means).div_(group.size)
        return [
            self._scaled(part, mean, weight, parts[0].dtype)
            for part, mean, weight in zip(wide, means, weights, strict=True)
        ]

    def _scaled(self, wide: Tensor, mean: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`mean` of the squares, [..., 1]."""
        scaled = wide * torch.rsqrt(mean + self._eps)
        # In half precision most models round before they multiply by the weight, and torch after.
        return (weight * scaled).to(dtype) if self._wide else weight * scaled.to(dtype)


def _mean_square(x: Tensor) -> Tensor:
    """[..., W] -> [..., 1]"""
    return x.square().mean(dim=-1, keepdim=True)
