"""MLAS's products by weights of 4 bits, as ONNX Runtime has them: a session for each packed matrix.

    T tokens, I inputs, R outputs, G groups of inputs, S inputs of a group

Activations are rounded to 8 bits, with a scale for each token and group; sums of a group are
integers. The arithmetic is that of "accuracy level 4" of ONNX Runtime's MatMulNBits.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage_worker.weight_source import Codes

_BITS = 4
_MIDDLE = 8
_INT8_ACTIVATIONS = 4
_ERRORS_ONLY = 3
# What a session was seen to hold beside the weights, about.
_SESSION_BYTES = 80 * 1024


@functools.cache
def is_available() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def held_bytes(num_outputs: int, num_groups: int, group_size: int) -> int:
    """Half a byte for each weight; for each group its scale, once as it is and once packed, its
    zero point and the offset that comes of it; a session."""
    of_output = num_groups * (group_size // 2 + 12) + (num_groups + 1) // 2
    return num_outputs * of_output + _SESSION_BYTES


class Int4Product:
    """Not for several threads at once."""

    def __init__(self, codes: Codes, num_inputs: int) -> None:
        """The last group may have more codes than there are inputs left for it."""
        self.num_outputs, num_groups = codes.scales.shape
        group_size = codes.values.shape[1] // num_groups
        self.nbytes = held_bytes(self.num_outputs, num_groups, group_size)
        self._session = _session(_model(codes, num_inputs, group_size))
        self._binding = self._session.io_binding()

    def __call__(self, x: Tensor, product: Tensor) -> None:
        """x: [T, I], product: [T, R], both float32 and contiguous; T is not 0."""
        self._binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.data_ptr())
        self._binding.bind_output("y", "cpu", 0, np.float32, product.shape, product.data_ptr())
        self._session.run_with_iobinding(self._binding)


def _model(codes: Codes, num_inputs: int, group_size: int) -> bytes:
    from onnx import TensorProto, helper

    num_outputs, num_groups = codes.scales.shape
    pairs = codes.values.to(torch.uint8).view(num_outputs, num_groups, -1, 2)
    tensors = {
        "weight": _pack(pairs),  # [R, G, S / 2]
        "scales": codes.scales.to(torch.float32),  # [R, G]
    }
    if not bool((codes.zeros == _MIDDLE).all()):
        zeros = torch.nn.functional.pad(codes.zeros.to(torch.uint8), (0, num_groups % 2))
        tensors["zeros"] = _pack(zeros.view(num_outputs, -1, 2))  # [R, G / 2]
    types = {torch.uint8: TensorProto.UINT8, torch.float32: TensorProto.FLOAT}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=num_inputs,
        N=num_outputs,
        bits=_BITS,
        block_size=group_size,
        accuracy_level=_INT8_ACTIVATIONS,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", num_inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", num_outputs])],
        [
            helper.make_tensor(
                name, types[tensor.dtype], tensor.shape, tensor.numpy().tobytes(), raw=True
            )
            for name, tensor in tensors.items()
        ],
    )
    operators = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=operators, ir_version=9)
    return bytes(model.SerializeToString())


def _pack(pairs: Tensor) -> Tensor:
    """[..., 2] codes -> [...] bytes, the first in the low bits."""
    return pairs[..., 0] | pairs[..., 1] << 4


def _session(model: bytes) -> Any:
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.use_per_session_threads = False
    options.enable_cpu_mem_arena = False
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    # It would keep what it was made of, weights and all, to be made once more by.
    session._model_bytes = None
    return session


@functools.cache
def _runtime() -> Any:
    """ONNX Runtime with as many threads as torch computes with, for all sessions together.

    They spin while they wait. Torch's must not do so beside them, on the same cores: both together
    were seen to take twice as long as one thread. Where torch's spin there are no more threads.
    """
    import onnxruntime

    spins = os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE" or (
        os.environ.get("GOMP_SPINCOUNT", "0") != "0"
    )
    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    onnxruntime.set_global_thread_pool_sizes(1 if spins else torch.get_num_threads(), 1)
    return onnxruntime
