"""How the weights of a stage are split over the ranks of its worker: one table, by their names.

    N ranks; H query heads, K KV heads

Query heads and what the MLP has inside go to the ranks in equal parts, one after another; KV heads
too, or, where there are fewer of them than ranks, each to N / K ranks. So q, k, v, gate and up are
split by their outputs, o and down by their inputs, and what these give is summed over the ranks.
The vocabulary need not divide. Plain arithmetic, without torch: counts that do not divide are told
before anything is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from stage_worker.expert_placement import Placement, first_placement
from stagemesh.errors import ConfigError, UnsupportedModel
from stagemesh.model_spec import ModelSpec


class Split(Enum):
    WHOLE = "every rank has it"
    OUTPUTS = "outputs, in equal parts"
    KV_OUTPUTS = "outputs, by KV heads"
    INPUTS = "inputs, in equal parts; results are summed, a bias is added by one rank"
    VOCABULARY = "outputs, in parts that differ by one at most"
    EACH_HEAD = "one vector that is used for each head: every rank has it"


# By the module that a weight or bias is of.
SPLITS = {
    "embed_tokens": Split.VOCABULARY,
    "lm_head": Split.VOCABULARY,
    "q_proj": Split.OUTPUTS,
    "k_proj": Split.KV_OUTPUTS,
    "v_proj": Split.KV_OUTPUTS,
    "o_proj": Split.INPUTS,
    "gate_proj": Split.OUTPUTS,
    "up_proj": Split.OUTPUTS,
    "down_proj": Split.INPUTS,
    "w1": Split.OUTPUTS,  # gate, up and down of an expert, as some families call them
    "w3": Split.OUTPUTS,
    "w2": Split.INPUTS,
    "gate": Split.WHOLE,  # of experts: every rank chooses the same ones
    "router": Split.WHOLE,  # as some families call it
    "shared_expert_gate": Split.WHOLE,
    "sinks": Split.OUTPUTS,  # a number for each query head
    "q_norm": Split.EACH_HEAD,
    "k_norm": Split.EACH_HEAD,
    "input_layernorm": Split.WHOLE,
    "post_attention_layernorm": Split.WHOLE,
    "pre_feedforward_layernorm": Split.WHOLE,
    "post_feedforward_layernorm": Split.WHOLE,
    "norm": Split.WHOLE,
}
# Norms of queries and keys in models that have one over all heads together: they go with the heads.
OVER_ALL_HEADS = {"q_norm": Split.OUTPUTS, "k_norm": Split.KV_OUTPUTS}
# Tensors that hold the outputs of several of these modules, one after another.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank has of a weight: these outputs (rows) and inputs (columns; a vector has none)."""

    rows: slice
    columns: slice


ALL = slice(None)
EVERYTHING = Part(ALL, ALL)


@dataclass(frozen=True, slots=True)
class Shards:
    """What rank `rank` of `size` has of a model. The group of one has everything.

    With `whole_experts` the experts of a mixture are spread over the ranks (expert parallelism),
    and each rank has `redundant_experts` more than its share, at first; else each expert is split
    as other layers are.
    """

    spec: ModelSpec
    rank: int = 0
    size: int = 1
    whole_experts: bool = False
    redundant_experts: int = 0

    def part(self, name: str, shape: tuple[int, ...]) -> Part | None:
        """Of the weight or bias `name`, [outputs, inputs] or [outputs]; None where other ranks
        have it. Raises UnsupportedModel for one that the table does not know."""
        if self.size == 1:
            return EVERYTHING
        expert = _expert_of(name)
        if self.whole_experts and expert is not None:
            return EVERYTHING if expert in self.placement[self.expert_rank] else None
        module, kind = name.split(".")[-2:]
        if kind == "sinks":  # a tensor of no module
            module = kind
        split = SPLITS.get(module)
        if self.spec.norms.projections:
            split = OVER_ALL_HEADS.get(module, split)
        if split is None or (split is Split.EACH_HEAD and shape != (self.spec.head_dim,)):
            raise UnsupportedModel(f"tensor parallelism does not know how to split {name}")
        if split in (Split.WHOLE, Split.EACH_HEAD):
            return EVERYTHING
        if split is Split.VOCABULARY:
            return Part(_slice(self.vocabulary), ALL)
        if split is Split.KV_OUTPUTS:
            return Part(_slice(_scaled(self.kv_heads, self.spec.head_dim)), ALL)
        if split is Split.OUTPUTS:
            return Part(_slice(self._even(shape[0], name)), ALL)
        if kind == "bias":
            return EVERYTHING if self.rank == 0 else None
        return Part(ALL, _slice(self._even(shape[1], name)))

    def parts(self, name: str, shape: tuple[int, ...]) -> list[Part]:
        """As `part`, of a matrix that may hold several modules' outputs: a part of each."""
        *path, module, kind = name.split(".")
        if self.size == 1 or module not in FUSED:
            part = self.part(name, shape)
            return [] if part is None else [part]
        kv_size = self.spec.num_kv_heads * self.spec.head_dim
        sizes = {"q_proj": shape[0] - 2 * kv_size, "k_proj": kv_size, "v_proj": kv_size}
        found, first = [], 0
        for each in FUSED[module]:
            size = sizes.get(each, shape[0] // 2)
            part = self.part(".".join((*path, each, kind)), (size, *shape[1:]))
            assert part is not None
            found.append(Part(slice(first + part.rows.start, first + part.rows.stop), ALL))
            first += size
        return found

    @property
    def placement(self) -> Placement:
        """The experts that each rank computes at first, its part of each or the whole."""
        num_experts = self.spec.moe.num_experts if self.spec.moe else 0
        if not self.whole_experts:
            return (tuple(range(num_experts)),)
        return first_placement(num_experts, self.size, self.redundant_experts)

    @property
    def expert_rank(self) -> int:
        """Of this rank in `placement`."""
        return self.rank if self.whole_experts else 0

    @property
    def vocabulary(self) -> range:
        """The tokens whose embeddings and logits are this rank's."""
        return _share(self.spec.vocab_size, self.rank, self.size)

    @property
    def kv_heads(self) -> range:
        num_heads = self.spec.num_kv_heads
        if num_heads >= self.size:
            return _share(num_heads, self.rank, self.size)
        first = self.rank * num_heads // self.size
        return range(first, first + 1)

    @property
    def local_spec(self) -> ModelSpec:
        """The model as this rank computes it: with its own heads and its part of the MLP."""
        if self.size == 1:
            return self.spec
        return replace(
            self.spec,
            num_heads=self.spec.num_heads // self.size,
            num_kv_heads=len(self.kv_heads),
            intermediate_size=self.spec.intermediate_size // self.size,
        )

    def _even(self, total: int, name: str) -> range:
        if total % self.size:
            raise ConfigError(
                f"--tensor-parallel {self.size}: the {total} of {name} are no multiple of it"
            )
        return _share(total, self.rank, self.size)


def num_outputs(parts: Sequence[Part], whole: int) -> int:
    """Of these parts of a matrix that has `whole` outputs."""
    return sum(len(range(whole)[part.rows]) for part in parts)


def _expert_of(name: str) -> int | None:
    """The expert that a weight is of; None where it is of none, or of the shared one."""
    path = name.split(".")
    return int(path[path.index("experts") + 1]) if "experts" in path else None


def check_divides(spec: ModelSpec, size: int, whole_experts: bool = False) -> None:
    """Raises ConfigError where the model's counts do not divide among `size` ranks."""
    sizes = {"query heads": spec.num_heads}
    if whole_experts and (spec.moe is None or spec.moe.num_experts < size):
        num_experts = spec.moe.num_experts if spec.moe else 0
        raise ConfigError(f"--expert-parallel: {num_experts} experts are too few for {size} ranks")
    if spec.moe is not None:
        sizes |= {"the shared expert's size": spec.moe.shared_size}
        if not whole_experts:
            sizes |= {"an expert's size": spec.moe.intermediate_size}
    if spec.moe is None or not all(spec.moe.sparse):
        sizes |= {"intermediate_size": spec.intermediate_size}
    for what, count in sizes.items():
        if count % size:
            raise ConfigError(f"--tensor-parallel {size}: {what} {count} is no multiple of it")
    if spec.num_kv_heads % size and size % spec.num_kv_heads:
        raise ConfigError(
            f"--tensor-parallel {size}: KV heads {spec.num_kv_heads} are neither a multiple nor a "
            "divisor of it"
        )


def _share(total: int, rank: int, size: int) -> range:
    """Parts that differ by one at most, the larger ones first."""
    small, num_large = divmod(total, size)
    start = rank * small + min(rank, num_large)
    return range(start, start + small + (rank < num_large))


def _scaled(some: range, factor: int) -> range:
    return range(some.start * factor, some.stop * factor)


def _slice(some: range) -> slice:
    return slice(some.start, some.stop)
