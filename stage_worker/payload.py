"""Hidden states as bytes, as they travel between stages: row by row, little endian, no header."""

from __future__ import annotations

import torch
from torch import Tensor

from stage_worker.checkpoint import DTYPE_NAMES
from stage_worker.staging import host_tensor, to_device, to_host
from stagemesh.errors import ProtocolError


def bytes_view(hidden: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is on the CPU; they live as long as the view."""
    if not hidden.numel():
        return memoryview(b"")
    contiguous = to_host(hidden.detach()).contiguous()
    return contiguous.view(torch.uint8).numpy().data.cast("B")


def hidden_from_bytes(
    payload: bytes | bytearray | memoryview,
    payload_dtype: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A tensor of its own with the payload's content.

    Copied rather than borrowed: a frame's payload may be read-only and lie at any address.
    """
    hidden = host_tensor(shape, dtype, device)
    if hidden.nbytes and payload_dtype != DTYPE_NAMES[dtype]:
        raise ProtocolError(f"hidden states are {payload_dtype!r}, not {DTYPE_NAMES[dtype]}")
    if len(memoryview(payload).cast("B")) != hidden.nbytes:
        raise ProtocolError(
            f"hidden states of {shape[0]} tokens take {hidden.nbytes} bytes, {len(payload)} came"
        )
    if hidden.nbytes:
        hidden.view(torch.uint8).numpy().data.cast("B")[:] = payload
    return to_device(hidden, device)
