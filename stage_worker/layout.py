"""Which weights a model's parts consist of, and which tensors hold them: Hugging Face's layout.

Parts are "embedding", "layer.<i>", "norm" and "head", as in `ModelSummary.part_hashes`. The head of
a model with tied embeddings consists of the embedding's tensor. Knows nothing of files.
"""

from __future__ import annotations

from typing import NamedTuple

from stagemesh.errors import SpanError
from stagemesh.model_spec import ModelSpec
from stagemesh.moe_spec import MoeSpec
from stagemesh.plan import Span
from stagemesh.stored_format import StoredWeights

Shape = tuple[int, ...]


class MlpNames(NamedTuple):
    """Of the three matrices of a feed-forward part."""

    gate: str
    up: str
    down: str


DENSE = MlpNames("gate_proj", "up_proj", "down_proj")

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
_MATRICES = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")


def all_parts(spec: ModelSpec) -> list[str]:
    return ["embedding", *(f"layer.{i}" for i in range(spec.num_layers)), "norm", "head"]


def span_parts(spec: ModelSpec, span: Span) -> list[str]:
    """The parts that the stage of `span` holds; SpanError where it is not in the model."""
    if not 0 <= span.start < span.end <= spec.num_layers:
        raise SpanError(
            f"layers [{span.start}, {span.end}) are not in the model, which has "
            f"{spec.num_layers} layers"
        )
    parts = [f"layer.{i}" for i in range(span.start, span.end)]
    if span.start == 0:
        parts.insert(0, "embedding")
    if span.end == spec.num_layers:
        parts += ["norm", "head"]
    return parts


def part_tensors(spec: ModelSpec, part: str) -> dict[str, Shape]:
    """Names and shapes of the tensors that files have of one part."""
    tensors: dict[str, Shape] = {}
    for name, shape in part_weights(spec, part).items():
        way = stored_way(spec, name)
        tensors |= {name: shape} if way is None else stored_tensors(name, shape, way)
    return tensors


def stored_way(spec: ModelSpec, name: str) -> StoredWeights | None:
    """How files hold a weight; None where it is a tensor of floats."""
    return spec.stored.of_weight(name) if spec.stored and is_quantisable(name) else None


def is_quantisable(name: str) -> bool:
    """Matrices but for the embedding, and for what chooses experts or weighs them."""
    return name.endswith(_MATRICES) or name == HEAD


def part_weights(spec: ModelSpec, part: str) -> dict[str, Shape]:
    """Names and shapes of one part's weights, however they are stored."""
    if part == "embedding":
        return {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    if part == "norm":
        return {NORM: (spec.hidden_size,)}
    if part == "head":
        return {head_name(spec): (spec.vocab_size, spec.hidden_size)}
    return layer_tensors(spec, int(part.removeprefix("layer.")))


def head_name(spec: ModelSpec) -> str:
    return EMBEDDING if spec.tie_embeddings else HEAD


def layer_tensors(spec: ModelSpec, layer: int) -> dict[str, Shape]:
    """Names and shapes of one decoder layer's weights."""
    hidden = spec.hidden_size
    query_size = spec.num_heads * spec.head_dim
    kv_size = spec.num_kv_heads * spec.head_dim
    linears = {
        "self_attn.q_proj": (query_size, hidden, spec.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, spec.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, query_size, spec.output_bias),
    }
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if spec.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (spec.head_dim,)
    if is_sparse(spec, layer):
        assert spec.moe is not None
        shapes |= _sparse_tensors(spec, spec.moe)
    else:
        linears |= _mlp("mlp", DENSE, hidden, spec.intermediate_size, spec.mlp_bias)
    for name, (num_out, num_in, bias) in linears.items():
        shapes[f"{name}.weight"] = (num_out, num_in)
        if bias:
            shapes[f"{name}.bias"] = (num_out,)
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def is_sparse(spec: ModelSpec, layer: int) -> bool:
    """Whether the layer has a mixture of experts."""
    return spec.moe is not None and spec.moe.sparse[layer]


def moe_names(spec: ModelSpec) -> tuple[str, MlpNames]:
    """Of the module of a layer that holds the experts, and of an expert's matrices."""
    if spec.family == "mixtral":
        return "block_sparse_moe", MlpNames("w1", "w3", "w2")
    return "mlp", DENSE


def _mlp(
    module: str, names: MlpNames, hidden: int, inner: int, bias: bool
) -> dict[str, tuple[int, int, bool]]:
    """(outputs, inputs, whether it has a bias) of each matrix."""
    return {
        f"{module}.{names.gate}": (inner, hidden, bias),
        f"{module}.{names.up}": (inner, hidden, bias),
        f"{module}.{names.down}": (hidden, inner, bias),
    }


def _sparse_tensors(spec: ModelSpec, moe: MoeSpec) -> dict[str, Shape]:
    module, names = moe_names(spec)
    hidden = spec.hidden_size
    shapes: dict[str, Shape] = {f"{module}.gate.weight": (moe.num_experts, hidden)}
    matrices: dict[str, tuple[int, int, bool]] = {}
    for expert in range(moe.num_experts):
        inner = moe.intermediate_size
        matrices |= _mlp(f"{module}.experts.{expert}", names, hidden, inner, False)
    if moe.shared_size:
        matrices |= _mlp(f"{module}.shared_expert", names, hidden, moe.shared_size, False)
        shapes[f"{module}.shared_expert_gate.weight"] = (1, hidden)
    return shapes | {f"{name}.weight": size[:2] for name, size in matrices.items()}


def stored_tensors(name: str, shape: Shape, way: StoredWeights) -> dict[str, Shape]:
    """Names and shapes of the tensors that hold the matrix `name` of that shape."""
    num_outputs, num_inputs = shape
    module = name.removesuffix("weight")
    per_int = 32 // way.bits
    num_groups = -(-num_inputs // (way.group_size or num_inputs))
    if way.layout == "gptq":
        return {
            module + "qweight": (num_inputs // per_int, num_outputs),
            module + "qzeros": (num_groups, num_outputs // per_int),
            module + "scales": (num_groups, num_outputs),
            module + "g_idx": (num_inputs,),
        }
    if way.layout == "awq":
        return {
            module + "qweight": (num_inputs, num_outputs // per_int),
            module + "qzeros": (num_groups, num_outputs // per_int),
            module + "scales": (num_groups, num_outputs),
        }
    if way.layout == "fp8":
        return {name: shape, **_fp8_scale(module, shape, way)}
    scales = {module + "weight_scale": (num_outputs, num_groups)}
    if way.layout == "int":
        return {name: shape, **scales}
    tensors = {
        module + "weight_packed": (num_outputs, -(-num_inputs // per_int)),
        module + "weight_shape": (2,),
        **scales,
    }
    if not way.symmetric:
        tensors[module + "weight_zero_point"] = (-(-num_outputs // per_int), num_groups)
    return tensors


def _fp8_scale(module: str, shape: Shape, way: StoredWeights) -> dict[str, Shape]:
    if way.block is None:
        return {module + "weight_scale": (1,) if way.is_per_matrix else (shape[0], 1)}
    blocks = tuple(-(-size // block) for size, block in zip(shape, way.block, strict=True))
    return {module + way.scale_name: blocks}
