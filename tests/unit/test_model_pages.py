"""Pages that leave a stage and come into another: layout, log, and what does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support.checkpoints import TinyModel, prompts, tiny_model
from support.stages import Chain, Wish

from protos import plan_pb2
from stagemesh.errors import ProtocolError
from stagemesh.frames import SENT_FRAME_BYTES, decode_frame
from stagemesh.page_frames import (
    BatchAssembler,
    PageBatch,
    PagesRequest,
    encode_batch,
    encode_request,
    request_from_header,
)
from stagemesh.plan import Epoch, Span

HIDDEN_SIZE, BLOCK_SIZE = 64, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model(TinyModel("tiny", "LlamaConfig", {"num_hidden_layers": 2}), directory)
    return directory / "tiny"


def chain(
    model: Path, *, dtype: str = "float32", num_logged: int | None = None, kv_dtype: str = "auto"
) -> Chain:
    num_bytes = None if num_logged is None else num_logged * HIDDEN_SIZE * BLOCK_SIZE * 4
    return Chain(
        model,
        2,
        dtype=dtype,
        num_blocks=16,
        max_log_memory_bytes=num_bytes,
        kv_dtype=kv_dtype,
    )


def served(model: Path, *, num_logged: int | None = None, kv_dtype: str = "auto") -> Chain:
    stages = chain(model, num_logged=num_logged, kv_dtype=kv_dtype)
    stages.run([Wish(prompt, 4) for prompt in prompts(3, (20, 7, 30), 320, 1)])
    return stages


def passed_on(batch: PageBatch) -> PageBatch:
    """Through frames and back."""
    assembler = BatchAssembler()
    batches = [assembler.feed(*decode_frame(frame)) for frame in encode_batch(batch)]
    assert batches[:-1] == [None] * (len(batches) - 1)
    assert batches[-1] is not None
    return batches[-1]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit: what is in unused slots may be NaN."""
    pair = [tensor.contiguous().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*pair)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("here", "there"), [(None, None), (9, 5), (0, 0)])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_pages_are_the_same_on_the_other_side(
    model: Path, stage: int, here: int | None, there: int | None, kv_dtype: str
) -> None:
    source_chain = served(model, num_logged=here, kv_dtype=kv_dtype)
    target_chain = chain(model, num_logged=there, kv_dtype=kv_dtype)
    source, target = source_chain.stages[stage], target_chain.stages[stage]
    blocks = source_chain.blocks(stage)
    ids = blocks.order((11, 3, 3, 0, 7, 8))
    assert ids == (0, 3, 7, 8, 11)
    target.pages.write(passed_on(source.pages.read(ids, blocks)), target_chain.blocks(stage))
    for pages in zip(source.cache.memory, target.cache.memory, strict=True):
        assert same(*(each[list(ids)] for each in pages))
    logged = [i for i in ids if i < target.log.num_blocks]
    assert same(source.log.pages[logged], target.log.pages[logged])


def test_the_layout_on_the_wire(model: Path) -> None:
    """block, layer, K/V, head, offset, dim; then what was logged, as offset, hidden."""
    stage = served(model, num_logged=5).stages[0]
    batch = stage.pages.read((4, 5), stage.facts.blocks_for(16))
    assert batch.num_logged == 1
    numbers = torch.frombuffer(bytearray(batch.payload), dtype=torch.float32)
    kv_size = 1 * 2 * 2 * BLOCK_SIZE * 16
    keys, values = stage.cache.memory
    first = numbers[:kv_size].view(1, 2, 2, BLOCK_SIZE, 16)
    assert same(first[0, 0, 1], keys[4, :, 1])
    assert same(first[0, 1, 0], values[4, :, 0])
    log_size = BLOCK_SIZE * HIDDEN_SIZE
    log = numbers[kv_size : kv_size + log_size].view(BLOCK_SIZE, HIDDEN_SIZE)
    assert same(log, stage.log.pages[4])
    second = numbers[kv_size + log_size :].view(1, 2, 2, BLOCK_SIZE, 16)
    assert same(second[0, 0, 0], keys[5, :, 0])


def test_the_layout_of_int8_on_the_wire(model: Path) -> None:
    """block, layer, offset: codes as K/V, head, dim, then scales as K/V, head."""
    stage = served(model, num_logged=0, kv_dtype="int8").stages[0]
    slot = 5 * BLOCK_SIZE + 3
    with torch.inference_mode():
        stage.cache.write(0, torch.tensor([slot]), torch.randn(1, 2, 16), torch.randn(1, 2, 16))
    batch = stage.pages.read((4, 5), stage.facts.blocks_for(16))
    assert (batch.dtype, batch.kv_dtype) == ("float32", "int8")
    assert batch.kv_block_bytes == stage.facts.kv_block_bytes == BLOCK_SIZE * 2 * 2 * (16 + 4)
    records = torch.frombuffer(bytearray(batch.payload), dtype=torch.int8)
    record = records.view(2, BLOCK_SIZE, -1)[1, 3]
    codes, scales = record[: 2 * 2 * 16].view(2, 2, 16), record[2 * 2 * 16 :].view(torch.float32)
    numbers = codes * scales.view(2, 2, 1)
    keys, values = stage.cache.read(0, torch.tensor([[slot]]))
    assert torch.equal(numbers[0], keys[0, 0])
    assert torch.equal(numbers[1], values[0, 0])


def refused(chain: Chain, batch: PageBatch, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        chain.stages[0].pages.write(batch, chain.blocks(0))


def test_pages_that_do_not_fit_are_refused(model: Path) -> None:
    source = served(model, num_logged=4)
    batch = source.stages[0].pages.read((1, 2, 6), source.blocks(0))
    refused(chain(model, dtype="bfloat16"), batch, "pages are float32, not bfloat16")
    refused(chain(model, kv_dtype="int8"), batch, "pages are float32, not int8")
    other = chain(model, dtype="bfloat16", kv_dtype="float32")
    refused(other, batch, "pages are computed in float32, not bfloat16")
    refused(chain(model), batch, "log there is shorter")
    fitting = chain(model, num_logged=4)
    for changes, why in (
        ({"block_ids": (2, 1, 6)}, "without order"),
        ({"block_ids": (1, 2, 16)}, "16 blocks here"),
        ({"kv_block_bytes": 8}, "a block has 8 and"),
        ({"log_block_bytes": 8}, "and 8 bytes"),
    ):
        refused(fitting, dataclasses.replace(batch, **changes), why)  # type: ignore[arg-type]
    fitting.stages[0].pages.write(batch, fitting.blocks(0))
    with pytest.raises(ProtocolError, match="16 blocks here"):
        fitting.blocks(0).order((3, 16))


def test_a_batch_larger_than_a_frame_is_put_together() -> None:
    size = SENT_FRAME_BYTES * 2 // 3
    payload = bytes(range(256)) * (4 * size // 256) + bytes(4 * size % 256 + 10)
    batch = PageBatch((1, 2, 5, 9), "float16", "int8", size, 5, 2, payload)
    frames = list(encode_batch(batch))
    assert len(frames) == 3
    assert passed_on(batch) == dataclasses.replace(batch, payload=bytearray(payload))
    headers = [decode_frame(frame) for frame in frames]
    for *taken, wrong in ([1], [0, 0], [0, 2], [0, 1, 1]):
        assembler = BatchAssembler()
        for index in taken:
            assembler.feed(*headers[index])
        with pytest.raises(ProtocolError):
            assembler.feed(*headers[wrong])
    pages = plan_pb2.Pages(block_ids=[1], dtype=plan_pb2.DTYPE_FLOAT16, kv_block_bytes=2**31)
    for header, rest in (
        (plan_pb2.FrameHeader(pages=pages), b""),
        (plan_pb2.FrameHeader(pages=plan_pb2.Pages(num_logged=1)), b""),
        (plan_pb2.FrameHeader(pages=plan_pb2.Pages()), b"more"),
        (plan_pb2.FrameHeader(result=plan_pb2.StepResult()), b""),
    ):
        with pytest.raises(ProtocolError):
            BatchAssembler().feed(header, memoryview(rest))


def test_requests_are_read_as_they_were_written() -> None:
    request = PagesRequest("p", Epoch(3, 4), Span(2, 5), (7, 1))
    header, rest = decode_frame(encode_request(request))
    assert not rest
    assert request_from_header(header) == request
    header.pages_request.protocol_version += 1
    with pytest.raises(ProtocolError, match="speaks protocol"):
        request_from_header(header)
    with pytest.raises(ProtocolError, match="begins with a request"):
        request_from_header(plan_pb2.FrameHeader(ping=plan_pb2.Ping()))
