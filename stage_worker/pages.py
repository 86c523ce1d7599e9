"""Pages of a stage as they leave the worker and come in: KV, and the log of what was sent.

    n blocks of a batch, O offset in a block, E hidden size

Block by block: the KV as plan.proto says, whatever the layout in memory, and, for a block that is
logged, (offset, hidden). A batch names blocks by their ids in the pipeline, and
whoever reads or writes it says where those lie here. Runs on the device thread. What is in unused
slots goes along; nobody reads it here or there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from stage_worker.block_ranges import PipelineBlocks
from stage_worker.boundary_log import BoundaryLog
from stage_worker.checkpoint import DTYPE_NAMES
from stagemesh.errors import ProtocolError
from stagemesh.page_frames import PageBatch


class KvBlocks(Protocol):
    """As much of a KvCache as is needed here."""

    dtype: torch.dtype
    kv_dtype: str

    @property
    def block_bytes(self) -> int: ...

    def read_blocks(self, places: Sequence[int]) -> Tensor: ...

    def write_blocks(self, places: Sequence[int], pages: Tensor) -> None: ...


class PageStore:
    """The pages of one stage."""

    def __init__(self, cache: KvBlocks, log: BoundaryLog) -> None:
        self._cache = cache
        self._log = log
        self._dtype = cache.dtype
        self.kv_block_bytes = cache.block_bytes
        self.log_block_bytes = log.block_bytes

    @torch.inference_mode()
    def read(self, block_ids: tuple[int, ...], blocks: PipelineBlocks) -> PageBatch:
        """Blocks in the order of `blocks.order`."""
        num_logged = blocks.num_logged(block_ids)
        kv = self._cache.read_blocks(blocks.kv.places(block_ids))
        logged = torch.empty(0, dtype=torch.uint8)
        if num_logged:
            log = _as_bytes(self._log.pages[blocks.log.places(block_ids[:num_logged])])
            logged = torch.cat((kv[:num_logged], log), dim=1).flatten()
        payload = torch.cat((logged, kv[num_logged:].flatten()))
        return PageBatch(
            block_ids=block_ids,
            dtype=DTYPE_NAMES[self._dtype],
            kv_dtype=self._cache.kv_dtype,
            kv_block_bytes=self.kv_block_bytes,
            log_block_bytes=self.log_block_bytes,
            num_logged=num_logged,
            payload=payload.numpy().data.cast("B"),
        )

    @torch.inference_mode()
    def write(self, batch: PageBatch, blocks: PipelineBlocks) -> None:
        """Raises ProtocolError for pages of another kind, and for a log that lacks blocks which are
        logged here: what is rebuilt from this log later would be rubbish."""
        self._check(batch, blocks)
        if not batch.block_ids:
            return
        split = batch.num_logged * (self.kv_block_bytes + batch.log_block_bytes)
        payload = torch.frombuffer(bytearray(batch.payload), dtype=torch.uint8)
        logged = payload[:split].view(batch.num_logged, -1) if split else payload[:0].view(0, 0)
        kv = torch.cat(
            (
                logged[:, : self.kv_block_bytes].reshape(-1, self.kv_block_bytes),
                payload[split:].view(-1, self.kv_block_bytes),
            )
        )
        self._cache.write_blocks(blocks.kv.places(batch.block_ids), kv)
        # What is logged there beyond this log is left out.
        num_logged = blocks.num_logged(batch.block_ids)
        log = logged[:num_logged, self.kv_block_bytes :]
        self._write_log(blocks.log.places(batch.block_ids[:num_logged]), log)

    def _write_log(self, places: list[int], log: Tensor) -> None:
        if places:
            pages = log.contiguous().view(self._dtype)
            shape = (len(places), *self._log.pages.shape[1:])
            self._log.pages.index_copy_(0, torch.tensor(places), pages.view(shape))

    def _check(self, batch: PageBatch, blocks: PipelineBlocks) -> None:
        if batch.block_ids != blocks.order(batch.block_ids):
            raise ProtocolError("pages come without order")
        for what, theirs, ours in (
            ("pages are", batch.kv_dtype, self._cache.kv_dtype),
            ("pages are computed in", batch.dtype, DTYPE_NAMES[self._dtype]),
        ):
            if theirs != ours:
                raise ProtocolError(f"{what} {theirs}, not {ours}")
        num_needed = blocks.num_logged(batch.block_ids)
        log_fits = not num_needed or batch.log_block_bytes == self.log_block_bytes
        if batch.kv_block_bytes != self.kv_block_bytes or not log_fits:
            raise ProtocolError(
                f"a block has {batch.kv_block_bytes} and {batch.log_block_bytes} bytes, not "
                f"{self.kv_block_bytes} and {self.log_block_bytes}"
            )
        if batch.num_logged < num_needed:
            raise ProtocolError("the log there is shorter than the one here")


def _as_bytes(pages: Tensor) -> Tensor:
    """[n, ...] -> [n, bytes of each]."""
    return pages.contiguous().view(len(pages), -1).view(torch.uint8)
