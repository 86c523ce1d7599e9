"""What membership hears and says: facts of workers, commands to them, effects on the rest.

Frozen values; the adapters turn them into protobuf messages, calls of the core and streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scheduler.core import PipelineFacts
from stagemesh.errors import StageMeshError
from stagemesh.plan import Epoch, ModelSummary, Span


@dataclass(frozen=True, slots=True)
class LoadedSpan:
    """What a worker holds, and how much KV its memory takes beside it."""

    span: Span
    num_blocks: int
    block_size_tokens: int
    weight_bytes: int = 0
    kv_block_bytes: int = 0
    load_ns: int = 0
    num_log_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Registration:
    """How a worker introduces itself.

    `incarnation` is new in every process. `loaded` is what it still holds from before its stream
    broke. `scheduler_address` is the scheduler's own, as this worker reaches it.
    """

    worker_id: str
    incarnation: int
    address: str
    model: ModelSummary
    fixed_span: Span | None = None
    loaded: LoadedSpan | None = None
    device: str = "cpu"
    dtype: str = "float32"
    batch_invariant: bool = False
    quantization: str = "auto"
    pid: int = 0
    scheduler_address: str = ""
    # Beside what it holds; 0 where it does not say.
    available_memory_bytes: int = 0
    # Of the latest scheduler that it followed; 0 for none.
    followed_term: int = 0
    # In which type hidden states travel; "": in `dtype`.
    wire_dtype: str = ""
    # In which type KV is held; "": in `dtype`.
    kv_dtype: str = ""
    # Ranks inside the worker.
    tensor_parallel: int = 1
    # Identities of the adapters that it holds, by name.
    adapters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadSpan:
    span: Span


@dataclass(frozen=True, slots=True)
class JoinEpoch:
    """See JoinEpoch in mesh.proto."""

    pipeline_id: str
    epoch: Epoch
    stage: int
    num_stages: int
    next_address: str
    num_blocks: int
    keep_kv: bool
    # Where pages are to be fetched, and which: those in use, as the driver fills in.
    pages_from: str = ""
    page_block_ids: tuple[int, ...] = ()
    from_end: bool = False
    num_log_blocks: int = 0


@dataclass(frozen=True, slots=True)
class LeaveEpoch:
    pipeline_id: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class ShutdownWorker:
    """The worker's process is to end."""

    reason: str


Command = LoadSpan | JoinEpoch | LeaveEpoch | ShutdownWorker


@dataclass(frozen=True, slots=True)
class ToWorker:
    session: int
    command: Command


@dataclass(frozen=True, slots=True)
class EndSession:
    """The worker's stream ends; with an error it is refused and does not come back."""

    session: int
    error: StageMeshError | None = None


@dataclass(frozen=True, slots=True)
class OpenStream:
    """Steps of the epoch are to be pushed to the first stage at `address`."""

    pipeline_id: str
    epoch: Epoch
    address: str


@dataclass(frozen=True, slots=True)
class CloseStream:
    pipeline_id: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class AddPipeline:
    """All members have joined, with empty KV."""

    facts: PipelineFacts


@dataclass(frozen=True, slots=True)
class SuspendPipeline:
    """The epoch ended: no step is sent until the pipeline is resumed or removed."""

    pipeline_id: str


@dataclass(frozen=True, slots=True)
class ResumePipeline:
    """All members have joined a new epoch. The KV of `lost_stages` is gone, others keep theirs."""

    facts: PipelineFacts
    lost_stages: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class FailOldestStep:
    """One epoch after another ended with the same step undone: its requests end with `error`."""

    pipeline_id: str
    error: StageMeshError


@dataclass(frozen=True, slots=True)
class RemovePipeline:
    """The KV of the pipeline is gone, or a part of it."""

    pipeline_id: str


@dataclass(frozen=True, slots=True)
class DrainDone:
    """Nothing depends on the worker any more; with an error it stays as it is."""

    drain_id: int
    successor_id: str = ""
    num_blocks_moved: int = 0
    error: StageMeshError | None = None


@dataclass(frozen=True, slots=True)
class Resign:
    """Another scheduler has taken over: what this one knows is worth nothing, and it ends."""

    error: StageMeshError


Effect = (
    ToWorker
    | EndSession
    | OpenStream
    | CloseStream
    | AddPipeline
    | SuspendPipeline
    | ResumePipeline
    | FailOldestStep
    | RemovePipeline
    | DrainDone
    | Resign
)
