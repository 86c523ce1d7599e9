"""Hidden states as bytes, as they travel between stages: row by row, little endian, no header.

    T tokens, E hidden size

They travel in the type that is computed with, or in a narrower one: bfloat16, or int8 with a scale
for each token (T float32 scales, then T x E numbers; a number is scale times int8). What a token
becomes depends on that token alone. Numbers that are not finite stay so: whoever looks for them is
the last stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage_worker.checkpoint import DTYPE_NAMES, TORCH_DTYPES
from stage_worker.quantise import round_vectors
from stage_worker.staging import host_tensor, to_device, to_host
from stagemesh.errors import ProtocolError
from stagemesh.frames import hidden_bytes

INT8 = "int8"


def bytes_view(hidden: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is on the CPU; they live as long as the view."""
    if not hidden.numel():
        return memoryview(b"")
    contiguous = to_host(hidden.detach()).contiguous()
    return contiguous.view(torch.uint8).numpy().data.cast("B")


def hidden_as_bytes(hidden: Tensor, wire_dtype: str) -> memoryview:
    """hidden: [T, E]"""
    if wire_dtype != INT8:
        return bytes_view(hidden.to(TORCH_DTYPES[wire_dtype]))
    codes, scales = round_vectors(hidden)
    return memoryview(bytes(bytes_view(scales)) + bytes(bytes_view(codes)))


def hidden_from_bytes(
    payload: bytes | bytearray | memoryview,
    wire_dtype: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A tensor of its own, [T, E] in `dtype`, from a payload of T tokens in `wire_dtype`.

    Copied rather than borrowed: a frame's payload may be read-only and lie at any address. Raises
    ProtocolError for a payload of another size.
    """
    num_bytes = len(memoryview(payload).cast("B"))
    expected_bytes = hidden_bytes(wire_dtype, *shape)
    if num_bytes != expected_bytes:
        raise ProtocolError(
            f"hidden states of {shape[0]} tokens take {expected_bytes} bytes, {num_bytes} came"
        )
    if wire_dtype != INT8:
        staged = _tensor_of(payload, shape, TORCH_DTYPES[wire_dtype], device)
        return to_device(staged, device).to(dtype)
    view = memoryview(payload).cast("B")
    scales = _tensor_of(view[: 4 * shape[0]], (shape[0], 1), torch.float32, device)
    numbers = _tensor_of(view[4 * shape[0] :], shape, torch.int8, device)
    return (to_device(numbers, device) * to_device(scales, device)).to(dtype)


def check_wire_dtype(given: str, own: str) -> None:
    """Raises ProtocolError where a neighbour sends another type than this stage expects."""
    if given != own:
        raise ProtocolError(f"hidden states are {given!r}, not {own}")


def resolve_wire_dtype(wire_dtype: str, dtype: torch.dtype) -> str:
    """ "auto" is what is computed with."""
    return DTYPE_NAMES[dtype] if wire_dtype == "auto" else wire_dtype


def _tensor_of(
    content: bytes | bytearray | memoryview,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """On the host, on its way to `device`."""
    tensor = host_tensor(shape, dtype, device)
    if tensor.nbytes:
        tensor.view(torch.uint8).numpy().data.cast("B")[:] = memoryview(content).cast("B")
    return tensor
