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
    """`forward` maps hidden states [N, E], or the batch's token ids where there are none, to hidden
    states after the layers; it may change its input."""

    def __init__(
        self,
        forward: Callable[[Tensor | None, DeviceBatch], Tensor],
        layouts: Sequence[Layout],
        hidden_size: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._layouts = {layout.num_tokens: layout for layout in layouts}
        largest = max(self._layouts)
        longest = max(layout.tables_at for layout in layouts) + MAX_TABLE_ENTRIES
        self._hidden: Tensor | None = None
        if hidden_size is not None:
            self._hidden = torch.zeros(largest, hidden_size, dtype=dtype, device=device)
        self._metadata = torch.zeros(longest, dtype=torch.int32, device=device)
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def capture(self) -> None:
        """All of them, the largest first, so that the others find its memory. No page is read or
        written."""
        pool = None
        for size in sorted(self._layouts, reverse=True):
            self._empty(size)
            self._warm_up(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                output = self._pass(size)
            pool = pool or graph.pool()
            self._captured[size] = graph, output

    def run(self, hidden: Tensor | None, metadata: Tensor, size: int) -> Tensor:
        """hidden: [n, E] with n <= size; metadata: on the host, as the size's layout says.

        [size, E], of which the first n count, and which the next step overwrites.
        """
        if self._hidden is not None and hidden is not None:
            self._hidden[: len(hidden)].copy_(hidden)
            self._hidden[len(hidden) : size].zero_()
        self._metadata[: len(metadata)].copy_(metadata, non_blocking=True)
        if size not in self._captured:
            return self._pass(size)
        graph, output = self._captured[size]
        graph.replay()
        return output

    def _pass(self, size: int) -> Tensor:
        hidden = None if self._hidden is None else self._hidden[:size]
        return self._forward(hidden, self._layouts[size].views(self._metadata))

    def _empty(self, size: int) -> None:
        """A step of no rows, only of what they are filled up with."""
        batch = self._layouts[size].views(self._metadata)
        for section in (batch.slots, *batch.items.values()):
            section.fill_(-1)
        for section in (batch.token_ids, batch.positions):
            section.zero_()

    def _warm_up(self, size: int) -> None:
        """Compiles kernels and has libraries choose theirs, which must not happen in a capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._pass(size)
        torch.cuda.current_stream().wait_stream(stream)
