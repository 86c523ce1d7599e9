"""Host memory on its way to a device or from it: pinned where the device is a GPU.

Copies of pinned memory run beside the host and the device's own work. torch gives such memory out
again only after what was copied from it has arrived.
"""

from __future__ import annotations

import torch
from torch import Tensor


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the host, for content that goes to `device` or comes from it; not filled."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(staged: Tensor, device: torch.device) -> Tensor:
    """A copy that later work on the device waits for; the host does not."""
    return staged.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Waits for the tensor to be computed. On the CPU it is the tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    staged = host_tensor(tuple(tensor.shape), tensor.dtype, tensor.device)
    staged.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return staged
