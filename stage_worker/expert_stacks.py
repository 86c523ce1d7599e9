"""Where an expert's weights lie in files that have those of all experts in one tensor: GPT-OSS.

    N experts, E hidden size, I size of an expert

An expert's matrices are known by names of their own, as in families whose files have them so:
"….experts.3.gate_proj.weight". Here the files have, without a number,

    gate_up_proj [N, E, 2 I]         outputs last, of gate and up in turn
    down_proj [N, I, E]
    gate_up_proj_bias [N, 2 I], down_proj_bias [N, E]

and as MXFP4, in place of the matrices, codes of 4 bits, two in a byte, and a scale for each block:

    gate_up_proj_blocks [N, 2 I, E / 32, 16], gate_up_proj_scales [N, 2 I, E / 32]
    down_proj_blocks [N, E, I / 32, 16], down_proj_scales [N, E, I / 32]

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stagemesh.model_spec import ModelSpec
from stagemesh.stored_format import MXFP4_BLOCK

# By an expert's module: the tensor that holds it, and which of its outputs those are.
_HOLDERS = {
    "gate_proj": ("gate_up_proj", slice(0, None, 2)),
    "up_proj": ("gate_up_proj", slice(1, None, 2)),
    "down_proj": ("down_proj", slice(None)),
}


@dataclass(frozen=True, slots=True)
class Stack:
    """`tensors` are names and shapes of what holds a weight: that of `expert`, those `outputs`."""

    tensors: Mapping[str, tuple[int, ...]]
    expert: int
    outputs: slice


def stack_of(spec: ModelSpec, name: str, shape: tuple[int, ...]) -> Stack | None:
    """Of the weight or bias `name` of that shape; None where it has a tensor of its own.

    Files that `stagemesh quantize` wrote have one for each.
    """
    if spec.family != "gpt_oss" or (spec.stored is not None and not spec.stored.is_mxfp4):
        return None
    path, is_expert, rest = name.partition(".experts.")
    if not is_expert:
        return None
    assert spec.moe is not None
    number, module, kind = rest.split(".")
    holder, outputs = _HOLDERS[module]
    stacked = f"{path}.experts.{holder}"
    num_experts, num_outputs = spec.moe.num_experts, shape[0] * (outputs.step or 1)
    tensors: dict[str, tuple[int, ...]]
    if kind == "bias":
        tensors = {f"{stacked}_bias": (num_experts, num_outputs)}
    elif spec.stored is None:
        tensors = {stacked: (num_experts, shape[1], num_outputs)}
    else:
        scales = (num_experts, num_outputs, shape[1] // MXFP4_BLOCK)
        tensors = {
            f"{stacked}_blocks": (*scales, MXFP4_BLOCK // 2),
            f"{stacked}_scales": scales,
        }
    return Stack(tensors, int(number), outputs)
