"""Which tensors a model's parts consist of: names and shapes in the Hugging Face layout.

Parts are "embedding", "layer.<i>", "norm" and "head", as in `ModelSummary.part_hashes`. The head of
a model with tied embeddings consists of the embedding's tensor. Knows nothing of files.
"""

from __future__ import annotations

from stagemesh.errors import SpanError
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Span

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


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
    """Names and shapes of the tensors of one part."""
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
    """Names and shapes of one decoder layer's tensors."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    query_size = spec.num_heads * spec.head_dim
    kv_size = spec.num_kv_heads * spec.head_dim
    linears = {
        "self_attn.q_proj": (query_size, hidden, spec.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, spec.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, query_size, spec.output_bias),
        "mlp.gate_proj": (inner, hidden, spec.mlp_bias),
        "mlp.up_proj": (inner, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, inner, spec.mlp_bias),
    }
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if spec.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (spec.head_dim,)
    for name, (num_out, num_in, bias) in linears.items():
        shapes[f"{name}.weight"] = (num_out, num_in)
        if bias:
            shapes[f"{name}.bias"] = (num_out,)
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
