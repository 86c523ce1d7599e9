"""CUDA graphs of decode steps: a whole pass through a stage's layers is launched at once.

    N rows that a graph is for, one token each; E hidden size

There is one for each of a few sizes, captured when the stage is loaded; a step is padded to the
next size. Graphs share their memory, since only one runs at a time. What a graph computes is what
the same pass computes without one, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stage_worker.cuda_layout import DeviceBatch, Layout

# Rows of a step, at most so many; above, kernels take so long that launching them costs nothing.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Entries of a step's block tables. With more, the step is executed without a graph.
MAX_TABLE_ENTRIES = 2**20

_WARM_UPS = 2


class DecodeGraphs:
    """`forward` maps hidden states [N, E] to those after the layers; it may change its input."""

    def __init__(
        self,
        forward: Callable[[Tensor, DeviceBatch], Tensor],
        layouts: Sequence[Layout],
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._layouts = {layout.num_tokens: layout for layout in layouts}
        largest = max(self._layouts)
        longest = max(layout.tables_at for layout in layouts) + MAX_TABLE_ENTRIES
        self._hidden = torch.zeros(largest, hidden_size, dtype=dtype, device=device)
        self._metadata = torch.full((longest,), -1, dtype=torch.int32, device=device)
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def capture(self) -> None:
        """All of them, the largest first, so that the others find its memory. Nothing is written
        to any page."""
        pool = None
        for size in sorted(self._layouts, reverse=True):
            self._warm_up(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                output = self._pass(size)
            pool = pool or graph.pool()
            self._captured[size] = graph, output

    def run(self, hidden: Tensor, metadata: Tensor, size: int) -> Tensor:
        """hidden: [n, E] with n <= size; metadata: on the host, as the size's layout says.

        [n, E], which the next step overwrites.
        """
        self._hidden[: len(hidden)].copy_(hidden)
        self._hidden[len(hidden) : size].zero_()
        self._metadata[: len(metadata)].copy_(metadata, non_blocking=True)
        if size not in self._captured:
            return self._pass(size)[: len(hidden)]
        graph, output = self._captured[size]
        graph.replay()
        return output[: len(hidden)]

    def _pass(self, size: int) -> Tensor:
        return self._forward(self._hidden[:size], self._layouts[size].views(self._metadata))

    def _warm_up(self, size: int) -> None:
        """Compiles kernels and has libraries choose theirs, which must not happen in a capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._pass(size)
        torch.cuda.current_stream().wait_stream(stream)
