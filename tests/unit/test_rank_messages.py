"""What ranks are told arrives whole: no field of it is forgotten on the way, or made up."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from stage_worker.block_ranges import BlockRange, PipelineBlocks
from stage_worker.executor_config import ExecutorConfig
from stage_worker.rank_messages import (
    NOT_TOLD,
    fetch_from_proto,
    fetch_to_proto,
    joining_from_proto,
    joining_to_proto,
    load_from_proto,
    load_to_proto,
    placement_from_proto,
    placement_to_proto,
)
from stage_worker.tenancy import Joining
from stagemesh.plan import Span
from stagemesh.quantization import parse_quantization

CONFIG = ExecutorConfig(
    model_dir=Path("some/model"),
    span=Span(3, 7),
    device="cpu",
    dtype="bfloat16",
    batch_invariant=True,
    block_size_tokens=24,
    max_kv_memory_bytes=1,
    num_blocks=2,
    max_log_memory_bytes=3,
    wire_dtype="int8",
    quantization=parse_quantization("int4-g64,head=none,0:2=int8"),
    lone_threads=4,
    kv_dtype="float16",
    expert_parallel=True,
    redundant_experts=5,
    adapters={"cafe": Path("one"), "beef": Path("two")},
)
JOINING = Joining(
    pipeline_id="p",
    stage=1,
    num_stages=3,
    blocks=PipelineBlocks(BlockRange(9, 8, True), BlockRange(7, 6, True)),
    keep_kv=True,
)


def default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


@pytest.mark.parametrize("value", [CONFIG, JOINING, JOINING.blocks.kv, JOINING.blocks.log])
def test_these_values_would_show_a_field_that_is_forgotten(value: Any) -> None:
    """A new field is to be given a value above that is neither its default nor a message's."""
    for field in fields(value):
        found = getattr(value, field.name)
        assert found != default(field), field.name
        assert found, field.name


def test_what_is_to_be_loaded_arrives_but_for_what_is_not_told() -> None:
    defaults = {field.name: default(field) for field in fields(ExecutorConfig)}
    told = replace(CONFIG, **{name: defaults[name] for name in NOT_TOLD})
    assert load_from_proto(load_to_proto(CONFIG)) == told


def test_every_field_of_a_message_is_told() -> None:
    """One that nobody fills any more would be read as zero."""
    fetch = fetch_to_proto(1, 2, ((3,),))
    for message in (load_to_proto(CONFIG), joining_to_proto(JOINING), fetch, fetch.placement):
        filled = {field.name for field, _ in message.ListFields()}
        assert filled == {field.name for field in message.DESCRIPTOR.fields}


def test_a_place_in_a_pipeline_arrives() -> None:
    assert joining_from_proto(joining_to_proto(JOINING)) == JOINING
    other = replace(JOINING, keep_kv=False, stage=0)
    assert joining_from_proto(joining_to_proto(other)) == other


def test_a_placement_of_experts_arrives() -> None:
    placement = ((0, 2, 3), (), (1, 2))
    assert placement_from_proto(placement_to_proto(6, placement)) == (6, placement)
    assert fetch_from_proto(fetch_to_proto(2**40, 6, placement)) == (2**40, 6, placement)
