"""What a worker is told when an epoch begins, as it travels."""

from __future__ import annotations

from scheduler.convert import command_to_proto
from scheduler.messages import JoinEpoch
from stagemesh.plan import Epoch


def join(**changes: object) -> JoinEpoch:
    fields: dict[str, object] = {
        "pipeline_id": "p1",
        "epoch": Epoch(3, 2),
        "stage": 0,
        "num_stages": 2,
        "next_address": "b:1",
        "num_blocks": 50,
        "keep_kv": True,
    }
    return JoinEpoch(**(fields | changes))  # type: ignore[arg-type]


def test_where_the_pipeline_s_blocks_lie_is_said() -> None:
    told = command_to_proto(join(from_end=True, num_log_blocks=20)).join_epoch
    assert (told.num_blocks, told.num_log_blocks, told.from_end) == (50, 20, True)


def test_no_log_is_not_the_whole_log() -> None:
    """Unset would mean as many blocks as there are."""
    told = command_to_proto(join(num_log_blocks=0)).join_epoch
    assert told.HasField("num_log_blocks")
    assert not told.from_end
