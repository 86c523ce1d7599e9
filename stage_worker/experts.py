"""Feed-forward parts of a layer: one for all tokens, or a mixture of experts.

    T tokens, E hidden size, N experts, K experts that a token is given to

A token's experts are chosen by a router; the tokens of an expert are one matrix product, however
few or many they are. What a token comes to does not depend on the tokens beside it, but for what
the linear layers themselves make of the number of rows: its experts' outputs are summed in the
experts' order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_worker.expert_placement import Placement, Turn, turns
from stage_worker.linear import Linear

Gate = Callable[[Tensor, Tensor], Tensor]
"""Joins what the halves of gate_up gave, of which it may overwrite the second."""
Add = Callable[[str, Tensor, Tensor], None]
"""Of a matrix's name here, what went in and what came out: adds to the latter."""


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """down(join(gate(x), up(x))), with gate and up as one matrix."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor, join: Gate, add: Add | None = None) -> Tensor:
        """[T, E] -> [T, E]; `add` adds to what either matrix gives."""
        both = self.gate_up(x)
        if add is not None:
            add("gate_up", x, both)
        inner = join(*both.chunk(2, dim=-1))
        output = self.down(inner)
        if add is not None:
            add("down", inner, output)
        return output


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """Takes every token; `gate` [T, E] -> [T, 1] says how much of it counts."""

    mlp: DenseMlp
    gate: Linear

    def __call__(self, x: Tensor, join: Gate) -> Tensor:
        """[T, E] -> [T, E]"""
        # Not torch.sigmoid, whose bits depend on where in a tensor an element lies.
        return self.mlp(x, join).div_(1.0 + torch.exp(-self.gate(x)))


@dataclass(frozen=True, slots=True)
class Router:
    """`scores` [T, E] -> [T, N]. `renormalised`: the weights of a token sum up to one."""

    scores: Linear
    num_chosen: int
    renormalised: bool

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, E] -> the experts of each token, [T, K], and their weights, [T, K] float32."""
        likelihoods = torch.softmax(self.scores(x), dim=-1, dtype=torch.float32)
        weights, chosen = likelihoods.topk(self.num_chosen, dim=-1)
        if self.renormalised:
            weights /= weights.sum(dim=-1, keepdim=True)
        return chosen, weights


class SparseMlp:
    """A mixture of experts, or those of them that this rank has: the others' are added elsewhere.

    `tokens_routed` [N] counts the tokens that each was given, whoever has it.
    """

    def __init__(
        self,
        router: Router,
        placement: Placement,
        rank: int,
        load: Callable[[int], DenseMlp],
        shared: SharedExpert | None,
    ) -> None:
        """`load` makes an expert."""
        self._router = router
        self._experts: dict[int, DenseMlp] = {}
        self._turns: dict[int, Turn] = {}
        self._shared = shared
        num_experts = len({expert for held in placement for expert in held})
        self.tokens_routed = torch.zeros(num_experts, dtype=torch.int64)
        self.hold(placement, rank, load)

    def lacking(self, placement: Placement, rank: int) -> list[int]:
        """The rank's experts of `placement` that it does not have."""
        return [expert for expert in placement[rank] if expert not in self._experts]

    def hold(self, placement: Placement, rank: int, load: Callable[[int], DenseMlp]) -> None:
        """From now on this rank has its experts of `placement`; `load` makes those that it lacks.
        Where that fails all is as it was."""
        wanted = turns(placement, rank)
        self._experts = {
            expert: self._experts[expert] if expert in self._experts else load(expert)
            for expert in wanted
        }
        self._turns = wanted

    def __call__(self, x: Tensor, join: Gate) -> Tensor:
        """[T, E] -> [T, E]"""
        chosen, weights = self._router(x)
        output = torch.zeros_like(x)
        for expert, tokens, shares in self._groups(chosen, weights.to(x.dtype)):
            part = self._experts[expert](x[tokens], join)
            output.index_add_(0, tokens, part.mul_(shares))
        return output if self._shared is None else output.add_(self._shared(x, join))

    def _groups(self, chosen: Tensor, weights: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """(expert, its tokens [n], their weights [n, 1]) of every expert here that has any, in
        order: those that are this rank's to take."""
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.tokens_routed))
        self.tokens_routed += counts
        sizes = counts.tolist()
        tokens = torch.split(order // chosen.shape[1], sizes)
        shares = torch.split(weights.flatten()[order].unsqueeze(1), sizes)
        found = []
        for expert, turn in self._turns.items():
            if sizes[expert] > turn.first:
                own = slice(turn.first, None, turn.num_holders)
                found.append((expert, tokens[expert][own], shares[expert][own]))
        return found
