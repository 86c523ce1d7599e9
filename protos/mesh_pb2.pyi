from protos import plan_pb2 as _plan_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    END_REASON_UNSPECIFIED: _ClassVar[EndReason]
    END_REASON_STOP_TOKEN: _ClassVar[EndReason]
    END_REASON_LENGTH: _ClassVar[EndReason]
    END_REASON_ABORTED: _ClassVar[EndReason]
    END_REASON_ERROR: _ClassVar[EndReason]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_IDLE: _ClassVar[WorkerState]
    WORKER_STATE_LOADING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_SERVING: _ClassVar[WorkerState]
END_REASON_UNSPECIFIED: EndReason
END_REASON_STOP_TOKEN: EndReason
END_REASON_LENGTH: EndReason
END_REASON_ABORTED: EndReason
END_REASON_ERROR: EndReason
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_IDLE: WorkerState
WORKER_STATE_LOADING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_SERVING: WorkerState

class WorkerMessage(_message.Message):
    __slots__ = ("register", "heartbeat", "load_progress", "span_loaded", "epoch_joined", "epoch_broken", "failed", "goodbye", "draining")
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    LOAD_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SPAN_LOADED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_JOINED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_BROKEN_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    register: RegisterWorker
    heartbeat: WorkerHeartbeat
    load_progress: LoadProgress
    span_loaded: SpanLoaded
    epoch_joined: EpochJoined
    epoch_broken: EpochBroken
    failed: _plan_pb2.Error
    goodbye: WorkerGoodbye
    draining: WorkerDraining
    def __init__(self, register: _Optional[_Union[RegisterWorker, _Mapping]] = ..., heartbeat: _Optional[_Union[WorkerHeartbeat, _Mapping]] = ..., load_progress: _Optional[_Union[LoadProgress, _Mapping]] = ..., span_loaded: _Optional[_Union[SpanLoaded, _Mapping]] = ..., epoch_joined: _Optional[_Union[EpochJoined, _Mapping]] = ..., epoch_broken: _Optional[_Union[EpochBroken, _Mapping]] = ..., failed: _Optional[_Union[_plan_pb2.Error, _Mapping]] = ..., goodbye: _Optional[_Union[WorkerGoodbye, _Mapping]] = ..., draining: _Optional[_Union[WorkerDraining, _Mapping]] = ...) -> None: ...

class WorkerCommand(_message.Message):
    __slots__ = ("welcome", "load_span", "join_epoch", "leave_epoch", "refused", "shutdown")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    LOAD_SPAN_FIELD_NUMBER: _ClassVar[int]
    JOIN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEAVE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    SHUTDOWN_FIELD_NUMBER: _ClassVar[int]
    welcome: WelcomeWorker
    load_span: LoadSpan
    join_epoch: JoinEpoch
    leave_epoch: LeaveEpoch
    refused: _plan_pb2.Error
    shutdown: ShutdownWorker
    def __init__(self, welcome: _Optional[_Union[WelcomeWorker, _Mapping]] = ..., load_span: _Optional[_Union[LoadSpan, _Mapping]] = ..., join_epoch: _Optional[_Union[JoinEpoch, _Mapping]] = ..., leave_epoch: _Optional[_Union[LeaveEpoch, _Mapping]] = ..., refused: _Optional[_Union[_plan_pb2.Error, _Mapping]] = ..., shutdown: _Optional[_Union[ShutdownWorker, _Mapping]] = ...) -> None: ...

class RegisterWorker(_message.Message):
    __slots__ = ("protocol_version", "worker_id", "incarnation", "address", "model", "fixed_span", "loaded", "device", "dtype", "batch_invariant", "pid", "stagemesh_version", "max_kv_memory_bytes", "available_memory_bytes", "followed_term", "wire_dtype", "kv_dtype", "quantization", "tensor_parallel", "adapters")
    class AdaptersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FIXED_SPAN_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STAGEMESH_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_KV_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    FOLLOWED_TERM_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    worker_id: str
    incarnation: int
    address: str
    model: ModelSummary
    fixed_span: LayerSpan
    loaded: SpanLoaded
    device: str
    dtype: _plan_pb2.DType
    batch_invariant: bool
    pid: int
    stagemesh_version: str
    max_kv_memory_bytes: int
    available_memory_bytes: int
    followed_term: int
    wire_dtype: _plan_pb2.DType
    kv_dtype: _plan_pb2.DType
    quantization: str
    tensor_parallel: int
    adapters: _containers.ScalarMap[str, str]
    def __init__(self, protocol_version: _Optional[int] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., model: _Optional[_Union[ModelSummary, _Mapping]] = ..., fixed_span: _Optional[_Union[LayerSpan, _Mapping]] = ..., loaded: _Optional[_Union[SpanLoaded, _Mapping]] = ..., device: _Optional[str] = ..., dtype: _Optional[_Union[_plan_pb2.DType, str]] = ..., batch_invariant: bool = ..., pid: _Optional[int] = ..., stagemesh_version: _Optional[str] = ..., max_kv_memory_bytes: _Optional[int] = ..., available_memory_bytes: _Optional[int] = ..., followed_term: _Optional[int] = ..., wire_dtype: _Optional[_Union[_plan_pb2.DType, str]] = ..., kv_dtype: _Optional[_Union[_plan_pb2.DType, str]] = ..., quantization: _Optional[str] = ..., tensor_parallel: _Optional[int] = ..., adapters: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ModelSummary(_message.Message):
    __slots__ = ("name", "architecture", "num_layers", "hidden_size", "vocab_size", "max_position", "layer_bytes", "embedding_bytes", "head_bytes", "structure_hash", "part_hashes", "dynamic_rope_length")
    class PartHashesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITION_FIELD_NUMBER: _ClassVar[int]
    LAYER_BYTES_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    STRUCTURE_HASH_FIELD_NUMBER: _ClassVar[int]
    PART_HASHES_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_ROPE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position: int
    layer_bytes: int
    embedding_bytes: int
    head_bytes: int
    structure_hash: str
    part_hashes: _containers.ScalarMap[str, str]
    dynamic_rope_length: int
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_position: _Optional[int] = ..., layer_bytes: _Optional[int] = ..., embedding_bytes: _Optional[int] = ..., head_bytes: _Optional[int] = ..., structure_hash: _Optional[str] = ..., part_hashes: _Optional[_Mapping[str, str]] = ..., dynamic_rope_length: _Optional[int] = ...) -> None: ...

class LayerSpan(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class WorkerHeartbeat(_message.Message):
    __slots__ = ("stats",)
    STATS_FIELD_NUMBER: _ClassVar[int]
    stats: WorkerStats
    def __init__(self, stats: _Optional[_Union[WorkerStats, _Mapping]] = ...) -> None: ...

class WorkerStats(_message.Message):
    __slots__ = ("rss_anon_bytes", "steps_executed", "rows_executed", "tokens_executed", "compute_ns", "idle_ns", "steps_queued", "bytes_sent", "messages_sent", "sequences_held", "available_memory_bytes", "blocks_received", "busy_ns", "output_wait_ns", "serialise_ns", "input_wait_ns", "routing")
    RSS_ANON_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEPS_EXECUTED_FIELD_NUMBER: _ClassVar[int]
    ROWS_EXECUTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_EXECUTED_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    IDLE_NS_FIELD_NUMBER: _ClassVar[int]
    STEPS_QUEUED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_SENT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_HELD_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BUSY_NS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_WAIT_NS_FIELD_NUMBER: _ClassVar[int]
    SERIALISE_NS_FIELD_NUMBER: _ClassVar[int]
    INPUT_WAIT_NS_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    rss_anon_bytes: int
    steps_executed: int
    rows_executed: int
    tokens_executed: int
    compute_ns: int
    idle_ns: int
    steps_queued: int
    bytes_sent: int
    messages_sent: int
    sequences_held: int
    available_memory_bytes: int
    blocks_received: int
    busy_ns: int
    output_wait_ns: int
    serialise_ns: int
    input_wait_ns: int
    routing: _containers.RepeatedCompositeFieldContainer[LayerRouting]
    def __init__(self, rss_anon_bytes: _Optional[int] = ..., steps_executed: _Optional[int] = ..., rows_executed: _Optional[int] = ..., tokens_executed: _Optional[int] = ..., compute_ns: _Optional[int] = ..., idle_ns: _Optional[int] = ..., steps_queued: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., messages_sent: _Optional[int] = ..., sequences_held: _Optional[int] = ..., available_memory_bytes: _Optional[int] = ..., blocks_received: _Optional[int] = ..., busy_ns: _Optional[int] = ..., output_wait_ns: _Optional[int] = ..., serialise_ns: _Optional[int] = ..., input_wait_ns: _Optional[int] = ..., routing: _Optional[_Iterable[_Union[LayerRouting, _Mapping]]] = ...) -> None: ...

class LayerRouting(_message.Message):
    __slots__ = ("layer", "tokens")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class LoadProgress(_message.Message):
    __slots__ = ("span", "loaded_bytes", "total_bytes")
    SPAN_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    span: LayerSpan
    loaded_bytes: int
    total_bytes: int
    def __init__(self, span: _Optional[_Union[LayerSpan, _Mapping]] = ..., loaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class SpanLoaded(_message.Message):
    __slots__ = ("span", "num_blocks", "block_size_tokens", "weight_bytes", "kv_block_bytes", "load_ns", "num_log_blocks")
    SPAN_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOG_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    span: LayerSpan
    num_blocks: int
    block_size_tokens: int
    weight_bytes: int
    kv_block_bytes: int
    load_ns: int
    num_log_blocks: int
    def __init__(self, span: _Optional[_Union[LayerSpan, _Mapping]] = ..., num_blocks: _Optional[int] = ..., block_size_tokens: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., kv_block_bytes: _Optional[int] = ..., load_ns: _Optional[int] = ..., num_log_blocks: _Optional[int] = ...) -> None: ...

class EpochJoined(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "has_pages")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HAS_PAGES_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: _plan_pb2.Epoch
    has_pages: bool
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[_Union[_plan_pb2.Epoch, _Mapping]] = ..., has_pages: bool = ...) -> None: ...

class EpochBroken(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "error", "peer_address")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PEER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: _plan_pb2.Epoch
    error: _plan_pb2.Error
    peer_address: str
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[_Union[_plan_pb2.Epoch, _Mapping]] = ..., error: _Optional[_Union[_plan_pb2.Error, _Mapping]] = ..., peer_address: _Optional[str] = ...) -> None: ...

class WorkerGoodbye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class WorkerDraining(_message.Message):
    __slots__ = ("reason", "remaining_ns")
    REASON_FIELD_NUMBER: _ClassVar[int]
    REMAINING_NS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    remaining_ns: int
    def __init__(self, reason: _Optional[str] = ..., remaining_ns: _Optional[int] = ...) -> None: ...

class WelcomeWorker(_message.Message):
    __slots__ = ("term", "heartbeat_interval_ms", "lease_ms")
    TERM_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    term: int
    heartbeat_interval_ms: int
    lease_ms: int
    def __init__(self, term: _Optional[int] = ..., heartbeat_interval_ms: _Optional[int] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class LoadSpan(_message.Message):
    __slots__ = ("span",)
    SPAN_FIELD_NUMBER: _ClassVar[int]
    span: LayerSpan
    def __init__(self, span: _Optional[_Union[LayerSpan, _Mapping]] = ...) -> None: ...

class JoinEpoch(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "stage", "num_stages", "next_address", "num_blocks", "keep_kv", "pages", "from_end", "num_log_blocks")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    NEXT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KEEP_KV_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FROM_END_FIELD_NUMBER: _ClassVar[int]
    NUM_LOG_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: _plan_pb2.Epoch
    stage: int
    num_stages: int
    next_address: str
    num_blocks: int
    keep_kv: bool
    pages: PageSource
    from_end: bool
    num_log_blocks: int
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[_Union[_plan_pb2.Epoch, _Mapping]] = ..., stage: _Optional[int] = ..., num_stages: _Optional[int] = ..., next_address: _Optional[str] = ..., num_blocks: _Optional[int] = ..., keep_kv: bool = ..., pages: _Optional[_Union[PageSource, _Mapping]] = ..., from_end: bool = ..., num_log_blocks: _Optional[int] = ...) -> None: ...

class PageSource(_message.Message):
    __slots__ = ("address", "block_ids")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    address: str
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, address: _Optional[str] = ..., block_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class LeaveEpoch(_message.Message):
    __slots__ = ("pipeline_id", "epoch")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: _plan_pb2.Epoch
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[_Union[_plan_pb2.Epoch, _Mapping]] = ...) -> None: ...

class ShutdownWorker(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "to_worker_id", "stay")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TO_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    STAY_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    to_worker_id: str
    stay: bool
    def __init__(self, worker_id: _Optional[str] = ..., to_worker_id: _Optional[str] = ..., stay: bool = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("successor_id", "num_blocks_moved")
    SUCCESSOR_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_MOVED_FIELD_NUMBER: _ClassVar[int]
    successor_id: str
    num_blocks_moved: int
    def __init__(self, successor_id: _Optional[str] = ..., num_blocks_moved: _Optional[int] = ...) -> None: ...

class GatewayMessage(_message.Message):
    __slots__ = ("register", "submit", "abort", "heartbeat")
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    register: RegisterGateway
    submit: SubmitRequest
    abort: AbortRequest
    heartbeat: GatewayHeartbeat
    def __init__(self, register: _Optional[_Union[RegisterGateway, _Mapping]] = ..., submit: _Optional[_Union[SubmitRequest, _Mapping]] = ..., abort: _Optional[_Union[AbortRequest, _Mapping]] = ..., heartbeat: _Optional[_Union[GatewayHeartbeat, _Mapping]] = ...) -> None: ...

class GatewayEvent(_message.Message):
    __slots__ = ("welcome", "tokens", "finished", "mesh", "refused", "heartbeat", "news")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    NEWS_FIELD_NUMBER: _ClassVar[int]
    welcome: WelcomeGateway
    tokens: RequestTokens
    finished: RequestFinished
    mesh: MeshState
    refused: _plan_pb2.Error
    heartbeat: SchedulerHeartbeat
    news: RequestNews
    def __init__(self, welcome: _Optional[_Union[WelcomeGateway, _Mapping]] = ..., tokens: _Optional[_Union[RequestTokens, _Mapping]] = ..., finished: _Optional[_Union[RequestFinished, _Mapping]] = ..., mesh: _Optional[_Union[MeshState, _Mapping]] = ..., refused: _Optional[_Union[_plan_pb2.Error, _Mapping]] = ..., heartbeat: _Optional[_Union[SchedulerHeartbeat, _Mapping]] = ..., news: _Optional[_Union[RequestNews, _Mapping]] = ...) -> None: ...

class SchedulerHeartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RequestNews(_message.Message):
    __slots__ = ("tokens", "finished")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[RequestTokens]
    finished: _containers.RepeatedCompositeFieldContainer[RequestFinished]
    def __init__(self, tokens: _Optional[_Iterable[_Union[RequestTokens, _Mapping]]] = ..., finished: _Optional[_Iterable[_Union[RequestFinished, _Mapping]]] = ...) -> None: ...

class RegisterGateway(_message.Message):
    __slots__ = ("protocol_version", "gateway_id", "incarnation")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    gateway_id: str
    incarnation: int
    def __init__(self, protocol_version: _Optional[int] = ..., gateway_id: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class GatewayHeartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("request", "attempt", "label", "model", "prompt_token_ids", "output_token_ids", "sampling", "max_tokens", "priority", "remaining_ns", "cache_salt", "adapter")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REMAINING_NS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    label: str
    model: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _plan_pb2.SamplingSpec
    max_tokens: int
    priority: int
    remaining_ns: int
    cache_salt: str
    adapter: str
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., label: _Optional[str] = ..., model: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_plan_pb2.SamplingSpec, _Mapping]] = ..., max_tokens: _Optional[int] = ..., priority: _Optional[int] = ..., remaining_ns: _Optional[int] = ..., cache_salt: _Optional[str] = ..., adapter: _Optional[str] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request", "attempt")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class WelcomeGateway(_message.Message):
    __slots__ = ("term", "heartbeat_interval_ms", "lease_ms")
    TERM_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    term: int
    heartbeat_interval_ms: int
    lease_ms: int
    def __init__(self, term: _Optional[int] = ..., heartbeat_interval_ms: _Optional[int] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class RequestTokens(_message.Message):
    __slots__ = ("request", "attempt", "index", "tokens", "prompt_logprobs", "cached_prompt_tokens", "queue_ns")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    index: int
    tokens: _containers.RepeatedCompositeFieldContainer[_plan_pb2.SampledToken]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_plan_pb2.SampledToken]
    cached_prompt_tokens: int
    queue_ns: int
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_plan_pb2.SampledToken, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_plan_pb2.SampledToken, _Mapping]]] = ..., cached_prompt_tokens: _Optional[int] = ..., queue_ns: _Optional[int] = ...) -> None: ...

class RequestFinished(_message.Message):
    __slots__ = ("request", "attempt", "reason", "error", "completion_tokens", "cached_prompt_tokens", "queue_ns", "retry_after_ns")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_NS_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    reason: EndReason
    error: _plan_pb2.Error
    completion_tokens: int
    cached_prompt_tokens: int
    queue_ns: int
    retry_after_ns: int
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., reason: _Optional[_Union[EndReason, str]] = ..., error: _Optional[_Union[_plan_pb2.Error, _Mapping]] = ..., completion_tokens: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., queue_ns: _Optional[int] = ..., retry_after_ns: _Optional[int] = ...) -> None: ...

class MeshState(_message.Message):
    __slots__ = ("serving", "model", "identity", "max_model_len", "num_pipelines", "detail", "adapters")
    class AdaptersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SERVING_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    NUM_PIPELINES_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    serving: bool
    model: str
    identity: str
    max_model_len: int
    num_pipelines: int
    detail: str
    adapters: _containers.ScalarMap[str, str]
    def __init__(self, serving: bool = ..., model: _Optional[str] = ..., identity: _Optional[str] = ..., max_model_len: _Optional[int] = ..., num_pipelines: _Optional[int] = ..., detail: _Optional[str] = ..., adapters: _Optional[_Mapping[str, str]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("term", "mesh", "workers", "pipelines", "queue", "num_gateways", "uptime_ns")
    TERM_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    PIPELINES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    NUM_GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_NS_FIELD_NUMBER: _ClassVar[int]
    term: int
    mesh: MeshState
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    pipelines: _containers.RepeatedCompositeFieldContainer[PipelineStatus]
    queue: QueueStatus
    num_gateways: int
    uptime_ns: int
    def __init__(self, term: _Optional[int] = ..., mesh: _Optional[_Union[MeshState, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., pipelines: _Optional[_Iterable[_Union[PipelineStatus, _Mapping]]] = ..., queue: _Optional[_Union[QueueStatus, _Mapping]] = ..., num_gateways: _Optional[int] = ..., uptime_ns: _Optional[int] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "incarnation", "address", "state", "span", "device", "dtype", "pid", "num_blocks", "weight_bytes", "stats", "load_fraction", "draining", "error", "tensor_parallel")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FRACTION_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    address: str
    state: WorkerState
    span: LayerSpan
    device: str
    dtype: _plan_pb2.DType
    pid: int
    num_blocks: int
    weight_bytes: int
    stats: WorkerStats
    load_fraction: float
    draining: bool
    error: str
    tensor_parallel: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., state: _Optional[_Union[WorkerState, str]] = ..., span: _Optional[_Union[LayerSpan, _Mapping]] = ..., device: _Optional[str] = ..., dtype: _Optional[_Union[_plan_pb2.DType, str]] = ..., pid: _Optional[int] = ..., num_blocks: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., stats: _Optional[_Union[WorkerStats, _Mapping]] = ..., load_fraction: _Optional[float] = ..., draining: bool = ..., error: _Optional[str] = ..., tensor_parallel: _Optional[int] = ...) -> None: ...

class PipelineStatus(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "worker_ids", "serving", "num_blocks", "num_free_blocks", "num_cached_blocks", "num_running", "steps_in_flight", "steps_done", "mean_timings", "num_lacking_tokens", "mending", "unscheduled_ns", "max_steps_in_flight")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    STEPS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    STEPS_DONE_FIELD_NUMBER: _ClassVar[int]
    MEAN_TIMINGS_FIELD_NUMBER: _ClassVar[int]
    NUM_LACKING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MENDING_FIELD_NUMBER: _ClassVar[int]
    UNSCHEDULED_NS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: _plan_pb2.Epoch
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    serving: bool
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_running: int
    steps_in_flight: int
    steps_done: int
    mean_timings: _containers.RepeatedCompositeFieldContainer[_plan_pb2.HopTiming]
    num_lacking_tokens: int
    mending: MendingStatus
    unscheduled_ns: int
    max_steps_in_flight: int
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[_Union[_plan_pb2.Epoch, _Mapping]] = ..., worker_ids: _Optional[_Iterable[str]] = ..., serving: bool = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_cached_blocks: _Optional[int] = ..., num_running: _Optional[int] = ..., steps_in_flight: _Optional[int] = ..., steps_done: _Optional[int] = ..., mean_timings: _Optional[_Iterable[_Union[_plan_pb2.HopTiming, _Mapping]]] = ..., num_lacking_tokens: _Optional[int] = ..., mending: _Optional[_Union[MendingStatus, _Mapping]] = ..., unscheduled_ns: _Optional[int] = ..., max_steps_in_flight: _Optional[int] = ...) -> None: ...

class MendingStatus(_message.Message):
    __slots__ = ("reason", "fill_ns", "join_ns", "rebuild_ns", "num_tokens_rebuilt", "num_blocks_moved")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FILL_NS_FIELD_NUMBER: _ClassVar[int]
    JOIN_NS_FIELD_NUMBER: _ClassVar[int]
    REBUILD_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_REBUILT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_MOVED_FIELD_NUMBER: _ClassVar[int]
    reason: str
    fill_ns: int
    join_ns: int
    rebuild_ns: int
    num_tokens_rebuilt: int
    num_blocks_moved: int
    def __init__(self, reason: _Optional[str] = ..., fill_ns: _Optional[int] = ..., join_ns: _Optional[int] = ..., rebuild_ns: _Optional[int] = ..., num_tokens_rebuilt: _Optional[int] = ..., num_blocks_moved: _Optional[int] = ...) -> None: ...

class QueueStatus(_message.Message):
    __slots__ = ("num_waiting", "num_running", "num_accepted", "num_finished", "num_refused", "num_aborted", "num_failed", "num_preempted", "generated_tokens", "prompt_tokens", "cached_prompt_tokens", "generated_tokens_per_s", "prompt_tokens_per_s")
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    NUM_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    NUM_ABORTED_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTED_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    num_waiting: int
    num_running: int
    num_accepted: int
    num_finished: int
    num_refused: int
    num_aborted: int
    num_failed: int
    num_preempted: int
    generated_tokens: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens_per_s: float
    prompt_tokens_per_s: float
    def __init__(self, num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., num_accepted: _Optional[int] = ..., num_finished: _Optional[int] = ..., num_refused: _Optional[int] = ..., num_aborted: _Optional[int] = ..., num_failed: _Optional[int] = ..., num_preempted: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., generated_tokens_per_s: _Optional[float] = ..., prompt_tokens_per_s: _Optional[float] = ...) -> None: ...

class TraceStepsRequest(_message.Message):
    __slots__ = ("duration_ns",)
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    duration_ns: int
    def __init__(self, duration_ns: _Optional[int] = ...) -> None: ...

class TraceStepsResponse(_message.Message):
    __slots__ = ("step", "round", "num_dropped")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NUM_DROPPED_FIELD_NUMBER: _ClassVar[int]
    step: TracedStep
    round: TracedRound
    num_dropped: int
    def __init__(self, step: _Optional[_Union[TracedStep, _Mapping]] = ..., round: _Optional[_Union[TracedRound, _Mapping]] = ..., num_dropped: _Optional[int] = ...) -> None: ...

class TracedStep(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "step", "sent_ns", "done_ns", "num_rows", "num_tokens", "timings")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SENT_NS_FIELD_NUMBER: _ClassVar[int]
    DONE_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: _plan_pb2.Epoch
    step: int
    sent_ns: int
    done_ns: int
    num_rows: int
    num_tokens: int
    timings: _containers.RepeatedCompositeFieldContainer[_plan_pb2.HopTiming]
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[_Union[_plan_pb2.Epoch, _Mapping]] = ..., step: _Optional[int] = ..., sent_ns: _Optional[int] = ..., done_ns: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_tokens: _Optional[int] = ..., timings: _Optional[_Iterable[_Union[_plan_pb2.HopTiming, _Mapping]]] = ...) -> None: ...

class TracedRound(_message.Message):
    __slots__ = ("start_ns", "duration_ns", "num_steps", "num_waiting", "num_running")
    START_NS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    start_ns: int
    duration_ns: int
    num_steps: int
    num_waiting: int
    num_running: int
    def __init__(self, start_ns: _Optional[int] = ..., duration_ns: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ...) -> None: ...
