"""Which models the decoder on CUDA devices can compute: what its kernels lack is refused by name.

Imports no kernel: it is asked before one is compiled, and on any machine.
"""

from __future__ import annotations

from stagemesh.errors import UnsupportedModel
from stagemesh.families import SILU, Norms, Scales
from stagemesh.model_spec import ModelSpec


def check_supported(spec: ModelSpec) -> None:
    """Raises UnsupportedModel, naming everything of the model that there is no kernel for."""
    norms, scales, neutral = spec.norms, spec.scales, Scales()
    missing = {
        "capped attention scores (attn_logit_softcapping)": scales.attention_cap is not None,
        "attention sinks": spec.sinks,
        "capped logits (final_logit_softcapping)": scales.logit_cap is not None,
        "scaled embeddings": scales.embedding != neutral.embedding,
        "scaled residuals (residual_multiplier)": scales.residual != neutral.residual,
        "scaled attention scores": scales.attention is not None,
        "scaled logits (logits_scaling)": scales.logits != neutral.logits,
        "norms after attention and feed-forward part": norms.after or not norms.before,
        "norms of whole projections": norms.projections,
        "norms multiplied in float32": norms.wide != Norms().wide,
        "mixtures of experts": spec.moe is not None,
        "activation " + spec.activation: spec.activation != SILU,
        "layers without rotation (no_rope_layers)": None in spec.layer_ropes,
        "several rotary embeddings": len(spec.ropes) > 1,
        "heads rotated in part (partial_rotary_factor)": spec.rope.share != 1.0,
    }
    named = [name for name, is_needed in missing.items() if is_needed]
    if named:
        raise UnsupportedModel(
            f"{spec.family} models do not run on device cuda: {', '.join(named)}"
        )
