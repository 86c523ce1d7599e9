from protos import mesh_pb2 as _mesh_pb2
from protos import plan_pb2 as _plan_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankCommand(_message.Message):
    __slots__ = ("load", "make_pages", "join", "forget", "step", "say_outcome", "read_blocks", "write_blocks", "place_experts", "fetch_experts", "drop_experts")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    MAKE_PAGES_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SAY_OUTCOME_FIELD_NUMBER: _ClassVar[int]
    READ_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WRITE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PLACE_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    FETCH_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    DROP_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    load: LoadShard
    make_pages: MakePages
    join: JoinPipeline
    forget: ForgetPipelines
    step: RankStep
    say_outcome: SayOutcome
    read_blocks: ReadBlocks
    write_blocks: WriteBlocks
    place_experts: PlaceExperts
    fetch_experts: FetchExperts
    drop_experts: DropExperts
    def __init__(self, load: _Optional[_Union[LoadShard, _Mapping]] = ..., make_pages: _Optional[_Union[MakePages, _Mapping]] = ..., join: _Optional[_Union[JoinPipeline, _Mapping]] = ..., forget: _Optional[_Union[ForgetPipelines, _Mapping]] = ..., step: _Optional[_Union[RankStep, _Mapping]] = ..., say_outcome: _Optional[_Union[SayOutcome, _Mapping]] = ..., read_blocks: _Optional[_Union[ReadBlocks, _Mapping]] = ..., write_blocks: _Optional[_Union[WriteBlocks, _Mapping]] = ..., place_experts: _Optional[_Union[PlaceExperts, _Mapping]] = ..., fetch_experts: _Optional[_Union[FetchExperts, _Mapping]] = ..., drop_experts: _Optional[_Union[DropExperts, _Mapping]] = ...) -> None: ...

class LoadShard(_message.Message):
    __slots__ = ("model_dir", "span", "device", "dtype", "batch_invariant", "block_size_tokens", "wire_dtype", "kv_dtype", "quantization", "lone_threads", "adapters", "expert_parallel", "redundant_experts")
    class AdaptersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_DIR_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    LONE_THREADS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    REDUNDANT_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    model_dir: str
    span: _mesh_pb2.LayerSpan
    device: str
    dtype: str
    batch_invariant: bool
    block_size_tokens: int
    wire_dtype: str
    kv_dtype: str
    quantization: str
    lone_threads: int
    adapters: _containers.ScalarMap[str, str]
    expert_parallel: bool
    redundant_experts: int
    def __init__(self, model_dir: _Optional[str] = ..., span: _Optional[_Union[_mesh_pb2.LayerSpan, _Mapping]] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., batch_invariant: bool = ..., block_size_tokens: _Optional[int] = ..., wire_dtype: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., lone_threads: _Optional[int] = ..., adapters: _Optional[_Mapping[str, str]] = ..., expert_parallel: bool = ..., redundant_experts: _Optional[int] = ...) -> None: ...

class PlaceExperts(_message.Message):
    __slots__ = ("layer", "ranks")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankExperts]
    def __init__(self, layer: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankExperts, _Mapping]]] = ...) -> None: ...

class RankExperts(_message.Message):
    __slots__ = ("experts",)
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, experts: _Optional[_Iterable[int]] = ...) -> None: ...

class FetchExperts(_message.Message):
    __slots__ = ("number", "placement")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    number: int
    placement: PlaceExperts
    def __init__(self, number: _Optional[int] = ..., placement: _Optional[_Union[PlaceExperts, _Mapping]] = ...) -> None: ...

class DropExperts(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MakePages(_message.Message):
    __slots__ = ("num_blocks",)
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    def __init__(self, num_blocks: _Optional[int] = ...) -> None: ...

class BlockRange(_message.Message):
    __slots__ = ("capacity", "num_blocks", "from_end")
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FROM_END_FIELD_NUMBER: _ClassVar[int]
    capacity: int
    num_blocks: int
    from_end: bool
    def __init__(self, capacity: _Optional[int] = ..., num_blocks: _Optional[int] = ..., from_end: bool = ...) -> None: ...

class JoinPipeline(_message.Message):
    __slots__ = ("pipeline_id", "stage", "num_stages", "kv", "log", "keep_kv")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    KEEP_KV_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    stage: int
    num_stages: int
    kv: BlockRange
    log: BlockRange
    keep_kv: bool
    def __init__(self, pipeline_id: _Optional[str] = ..., stage: _Optional[int] = ..., num_stages: _Optional[int] = ..., kv: _Optional[_Union[BlockRange, _Mapping]] = ..., log: _Optional[_Union[BlockRange, _Mapping]] = ..., keep_kv: bool = ...) -> None: ...

class ForgetPipelines(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankStep(_message.Message):
    __slots__ = ("step", "payload_dtype")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_DTYPE_FIELD_NUMBER: _ClassVar[int]
    step: _plan_pb2.Step
    payload_dtype: str
    def __init__(self, step: _Optional[_Union[_plan_pb2.Step, _Mapping]] = ..., payload_dtype: _Optional[str] = ...) -> None: ...

class SayOutcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReadBlocks(_message.Message):
    __slots__ = ("places",)
    PLACES_FIELD_NUMBER: _ClassVar[int]
    places: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, places: _Optional[_Iterable[int]] = ...) -> None: ...

class WriteBlocks(_message.Message):
    __slots__ = ("places",)
    PLACES_FIELD_NUMBER: _ClassVar[int]
    places: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, places: _Optional[_Iterable[int]] = ...) -> None: ...

class RankReply(_message.Message):
    __slots__ = ("error", "weight_bytes", "fetch_error")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCH_ERROR_FIELD_NUMBER: _ClassVar[int]
    error: _plan_pb2.Error
    weight_bytes: int
    fetch_error: _plan_pb2.Error
    def __init__(self, error: _Optional[_Union[_plan_pb2.Error, _Mapping]] = ..., weight_bytes: _Optional[int] = ..., fetch_error: _Optional[_Union[_plan_pb2.Error, _Mapping]] = ...) -> None: ...
