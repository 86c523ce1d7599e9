"""Which weights a model's parts consist of, and which tensors hold them: Hugging Face's layout.

Parts are "embedding", "layer.<i>", "norm" and "head", as in `ModelSummary.part_hashes`. The head of
a model with tied embeddings consists of the embedding's tensor. Knows nothing of files.
"""

from __future__ import annotations

from stage_worker import weight_names as roles
from stage_worker.expert_stacks import stack_of
from stage_worker.weight_names import is_sparse, layer_names, moe_names, tensor_name
from stagemesh.errors import SpanError
from stagemesh.model_spec import ModelSpec
from stagemesh.moe_spec import MoeSpec
from stagemesh.plan import Span
from stagemesh.stored_format import StoredWeights

Shape = tuple[int, ...]

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
        way, stack = stored_way(spec, name), stack_of(spec, name, shape)
        if stack is not None:
            tensors |= stack.tensors
        else:
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
    linears, vectors = _linears(spec), _vectors(spec)
    shapes: dict[str, Shape] = {}
    for name, held in layer_names(spec, layer).items():
        weight = tensor_name(layer, name)
        if held[0] in vectors:
            shapes[weight] = (vectors[held[0]],)
            continue
        num_outputs = sum(linears[role][0] for role in held)
        _, num_inputs, has_bias = linears[held[0]]
        shapes[weight] = (num_outputs, num_inputs)
        if has_bias:
            shapes[bias_name(weight)] = (num_outputs,)
    if is_sparse(spec, layer):
        assert spec.moe is not None
        for name, shape in _expert_tensors(spec, spec.moe).items():
            weight = tensor_name(layer, name)
            shapes[weight] = shape
            if spec.moe.biased:
                shapes[bias_name(weight)] = shape[:1]
    return shapes


def _expert_tensors(spec: ModelSpec, moe: MoeSpec) -> dict[str, Shape]:
    """Names, without a layer, and shapes of all matrices of a mixture of experts."""
    module, router, names = moe_names(spec)
    hidden = spec.hidden_size
    shapes: dict[str, Shape] = {f"{module}.{router}": (moe.num_experts, hidden)}
    parts = {f"{module}.experts.{i}": moe.intermediate_size for i in range(moe.num_experts)}
    if moe.shared_size:
        parts[f"{module}.shared_expert"] = moe.shared_size
        shapes[f"{module}.shared_expert_gate"] = (1, hidden)
    for part, inner in parts.items():
        shapes[f"{part}.{names.gate}"] = shapes[f"{part}.{names.up}"] = (inner, hidden)
        shapes[f"{part}.{names.down}"] = (hidden, inner)
    return shapes


def _linears(spec: ModelSpec) -> dict[str, tuple[int, int, bool]]:
    """By role: outputs, inputs, and whether there is a bias."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    query_size = spec.num_heads * spec.head_dim
    kv_size = spec.num_kv_heads * spec.head_dim
    return {
        roles.QUERY: (query_size, hidden, spec.qkv_bias),
        roles.KEY: (kv_size, hidden, spec.qkv_bias),
        roles.VALUE: (kv_size, hidden, spec.qkv_bias),
        roles.OUTPUT: (hidden, query_size, spec.output_bias),
        roles.GATE: (inner, hidden, spec.mlp_bias),
        roles.UP: (inner, hidden, spec.mlp_bias),
        roles.DOWN: (hidden, inner, spec.mlp_bias),
    }


def bias_name(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _vectors(spec: ModelSpec) -> dict[str, int]:
    """By role: how many numbers."""
    whole = spec.norms.projections
    hidden = (roles.INPUT_NORM, roles.ATTENDED_NORM, roles.MLP_NORM, roles.MLP_OUTPUT_NORM)
    return {
        **dict.fromkeys(hidden, spec.hidden_size),
        roles.QUERY_NORM: spec.head_dim * (spec.num_heads if whole else 1),
        roles.KEY_NORM: spec.head_dim * (spec.num_kv_heads if whole else 1),
        roles.SINKS: spec.num_heads,
    }


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
