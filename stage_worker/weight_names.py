"""Which tensors of a checkpoint hold a layer's weights: a table for each way of naming them.

A weight is known by its role in the decoder. A tensor holds the weight of one role, or those of
several, one's outputs (rows) below another's in the order of the table: what needs a part of one
takes its rows. Knows nothing of shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from stagemesh.model_spec import ModelSpec

QUERY, KEY, VALUE, OUTPUT = "query", "key", "value", "output"
GATE, UP, DOWN = "gate", "up", "down"
INPUT_NORM, MLP_NORM = "input_norm", "mlp_norm"
ATTENDED_NORM, MLP_OUTPUT_NORM = "attended_norm", "mlp_output_norm"
QUERY_NORM, KEY_NORM = "query_norm", "key_norm"
SINKS = "sinks"

Names = Mapping[str, tuple[str, ...]]
"""Of a tensor, without its layer and ".weight": the roles of what it holds."""

# Of no module: a tensor of its own, whose name does not end with ".weight".
_SINKS_NAME = "self_attn.sinks"

_ATTENTION: Names = {
    "self_attn.q_proj": (QUERY,),
    "self_attn.k_proj": (KEY,),
    "self_attn.v_proj": (VALUE,),
    "self_attn.o_proj": (OUTPUT,),
    "self_attn.q_norm": (QUERY_NORM,),
    "self_attn.k_norm": (KEY_NORM,),
}
_MLP: Names = {"mlp.gate_proj": (GATE,), "mlp.up_proj": (UP,), "mlp.down_proj": (DOWN,)}
# Llama's "post attention" norm is of what the feed-forward part takes; where there are norms of
# what a part gives as well, it is of what attention gives.
_PRE_NORMS: Names = {
    "input_layernorm": (INPUT_NORM,),
    "post_attention_layernorm": (MLP_NORM,),
}
_POST_NORMS: Names = {
    "post_attention_layernorm": (ATTENDED_NORM,),
    "post_feedforward_layernorm": (MLP_OUTPUT_NORM,),
}
_LLAMA: Names = {**_PRE_NORMS, **_ATTENTION, **_MLP}
_OLMO2: Names = {**_POST_NORMS, **_ATTENTION, **_MLP}
_GEMMA: Names = {
    "input_layernorm": (INPUT_NORM,),
    "pre_feedforward_layernorm": (MLP_NORM,),
    **_POST_NORMS,
    **_ATTENTION,
    **_MLP,
}
_PHI3: Names = {
    **_PRE_NORMS,
    "self_attn.qkv_proj": (QUERY, KEY, VALUE),
    "self_attn.o_proj": (OUTPUT,),
    "mlp.gate_up_proj": (GATE, UP),
    "mlp.down_proj": (DOWN,),
}
_TABLES = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _OLMO2,
    "phi3": _PHI3,
    "gpt_oss": {**_LLAMA, _SINKS_NAME: (SINKS,)},
}


class MlpNames(NamedTuple):
    """Of the matrices of one feed-forward part."""

    gate: str
    up: str
    down: str


_DENSE = MlpNames("gate_proj", "up_proj", "down_proj")


class MoeNames(NamedTuple):
    """Of the module of a layer that holds the experts; in it, of what chooses them, and of the
    matrices of each."""

    module: str
    router: str
    expert: MlpNames


def layer_names(spec: ModelSpec, layer: int) -> Names:
    """The tensors of a layer of the model, but for those of a mixture of experts."""
    left_out: set[str] = set()
    if not spec.qk_norm:
        left_out |= {QUERY_NORM, KEY_NORM}
    if is_sparse(spec, layer):
        left_out |= {GATE, UP, DOWN}
    table = _TABLES.get(spec.family, _LLAMA)
    return {name: roles for name, roles in table.items() if roles[0] not in left_out}


def is_sparse(spec: ModelSpec, layer: int) -> bool:
    """Whether the layer has a mixture of experts."""
    return spec.moe is not None and spec.moe.sparse[layer]


def moe_names(spec: ModelSpec) -> MoeNames:
    if spec.family == "mixtral":
        return MoeNames("block_sparse_moe", "gate", MlpNames("w1", "w3", "w2"))
    return MoeNames("mlp", "router" if spec.family == "gpt_oss" else "gate", _DENSE)


def tensor_name(layer: int, name: str) -> str:
    """In full, of a weight."""
    return f"model.layers.{layer}.{name}" + ("" if name == _SINKS_NAME else ".weight")


def names_of(spec: ModelSpec, layer: int, *roles: str) -> list[str]:
    """The tensors, in full, that hold these roles one after another; [] where a model has none."""
    found = [
        (name, held) for name, held in layer_names(spec, layer).items() if set(held) & set(roles)
    ]
    found.sort(key=lambda entry: roles.index(entry[1][0]))
    return [tensor_name(layer, name) for name, _ in found]
