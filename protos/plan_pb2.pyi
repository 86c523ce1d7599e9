from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RowError(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROW_ERROR_UNSPECIFIED: _ClassVar[RowError]
    ROW_ERROR_NOT_FINITE: _ClassVar[RowError]

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_INT8: _ClassVar[DType]
ROW_ERROR_UNSPECIFIED: RowError
ROW_ERROR_NOT_FINITE: RowError
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT16: DType
DTYPE_INT8: DType

class Epoch(_message.Message):
    __slots__ = ("term", "n")
    TERM_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    term: int
    n: int
    def __init__(self, term: _Optional[int] = ..., n: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "step", "forget", "rows", "alone")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: Epoch
    step: int
    forget: _containers.RepeatedCompositeFieldContainer[SequenceRun]
    rows: _containers.RepeatedCompositeFieldContainer[Row]
    alone: bool
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[_Union[Epoch, _Mapping]] = ..., step: _Optional[int] = ..., forget: _Optional[_Iterable[_Union[SequenceRun, _Mapping]]] = ..., rows: _Optional[_Iterable[_Union[Row, _Mapping]]] = ..., alone: bool = ...) -> None: ...

class SequenceRun(_message.Message):
    __slots__ = ("sequence_id", "run")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    run: int
    def __init__(self, sequence_id: _Optional[int] = ..., run: _Optional[int] = ...) -> None: ...

class Row(_message.Message):
    __slots__ = ("sequence_id", "run", "start", "num_tokens", "token_ids", "block_updates", "sample_positions", "logprob_positions", "first_stage", "end_stage", "input_from_log_of_stage", "state", "first_writing_stage")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_UPDATES_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    FIRST_STAGE_FIELD_NUMBER: _ClassVar[int]
    END_STAGE_FIELD_NUMBER: _ClassVar[int]
    INPUT_FROM_LOG_OF_STAGE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FIRST_WRITING_STAGE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    run: int
    start: int
    num_tokens: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    block_updates: _containers.RepeatedCompositeFieldContainer[BlockUpdate]
    sample_positions: _containers.RepeatedScalarFieldContainer[int]
    logprob_positions: _containers.RepeatedScalarFieldContainer[int]
    first_stage: int
    end_stage: int
    input_from_log_of_stage: int
    state: SequenceState
    first_writing_stage: int
    def __init__(self, sequence_id: _Optional[int] = ..., run: _Optional[int] = ..., start: _Optional[int] = ..., num_tokens: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., block_updates: _Optional[_Iterable[_Union[BlockUpdate, _Mapping]]] = ..., sample_positions: _Optional[_Iterable[int]] = ..., logprob_positions: _Optional[_Iterable[int]] = ..., first_stage: _Optional[int] = ..., end_stage: _Optional[int] = ..., input_from_log_of_stage: _Optional[int] = ..., state: _Optional[_Union[SequenceState, _Mapping]] = ..., first_writing_stage: _Optional[int] = ...) -> None: ...

class BlockUpdate(_message.Message):
    __slots__ = ("first_index", "block_ids")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, first_index: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SequenceState(_message.Message):
    __slots__ = ("prompt_token_ids", "output_token_ids", "sampling", "total_length", "adapter")
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TOTAL_LENGTH_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingSpec
    total_length: int
    adapter: str
    def __init__(self, prompt_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingSpec, _Mapping]] = ..., total_length: _Optional[int] = ..., adapter: _Optional[str] = ...) -> None: ...

class SamplingSpec(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "min_tokens", "stop_token_ids", "num_logprobs", "num_prompt_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_logprobs: int
    num_prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., num_logprobs: _Optional[int] = ..., num_prompt_logprobs: _Optional[int] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "step", "rows", "timings")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: Epoch
    step: int
    rows: _containers.RepeatedCompositeFieldContainer[RowResult]
    timings: _containers.RepeatedCompositeFieldContainer[HopTiming]
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[_Union[Epoch, _Mapping]] = ..., step: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[RowResult, _Mapping]]] = ..., timings: _Optional[_Iterable[_Union[HopTiming, _Mapping]]] = ...) -> None: ...

class RowResult(_message.Message):
    __slots__ = ("sequence_id", "run", "sampled", "prompt_logprobs", "error")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    run: int
    sampled: _containers.RepeatedCompositeFieldContainer[SampledToken]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[SampledToken]
    error: RowError
    def __init__(self, sequence_id: _Optional[int] = ..., run: _Optional[int] = ..., sampled: _Optional[_Iterable[_Union[SampledToken, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[SampledToken, _Mapping]]] = ..., error: _Optional[_Union[RowError, str]] = ...) -> None: ...

class SampledToken(_message.Message):
    __slots__ = ("position", "token_id", "logprob", "alternative_ids", "alternative_logprobs")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVE_IDS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    position: int
    token_id: int
    logprob: float
    alternative_ids: _containers.RepeatedScalarFieldContainer[int]
    alternative_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, position: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., alternative_ids: _Optional[_Iterable[int]] = ..., alternative_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class HopTiming(_message.Message):
    __slots__ = ("stage", "receive_ns", "queue_ns", "compute_ns", "serialise_ns", "idle_ns", "received_bytes", "started_ns")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    SERIALISE_NS_FIELD_NUMBER: _ClassVar[int]
    IDLE_NS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    stage: int
    receive_ns: int
    queue_ns: int
    compute_ns: int
    serialise_ns: int
    idle_ns: int
    received_bytes: int
    started_ns: int
    def __init__(self, stage: _Optional[int] = ..., receive_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., compute_ns: _Optional[int] = ..., serialise_ns: _Optional[int] = ..., idle_ns: _Optional[int] = ..., received_bytes: _Optional[int] = ..., started_ns: _Optional[int] = ...) -> None: ...

class FrameHeader(_message.Message):
    __slots__ = ("hello", "step", "continuation", "result", "ping", "pong", "refusal", "pages_request", "pages")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CONTINUATION_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_REQUEST_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    hello: StreamHello
    step: StepHeader
    continuation: Continuation
    result: StepResult
    ping: Ping
    pong: Ping
    refusal: Refusal
    pages_request: PagesRequest
    pages: Pages
    def __init__(self, hello: _Optional[_Union[StreamHello, _Mapping]] = ..., step: _Optional[_Union[StepHeader, _Mapping]] = ..., continuation: _Optional[_Union[Continuation, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., pong: _Optional[_Union[Ping, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., pages_request: _Optional[_Union[PagesRequest, _Mapping]] = ..., pages: _Optional[_Union[Pages, _Mapping]] = ...) -> None: ...

class StreamHello(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "to_stage", "sender_id", "protocol_version")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TO_STAGE_FIELD_NUMBER: _ClassVar[int]
    SENDER_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: Epoch
    to_stage: int
    sender_id: str
    protocol_version: int
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[_Union[Epoch, _Mapping]] = ..., to_stage: _Optional[int] = ..., sender_id: _Optional[str] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class StepHeader(_message.Message):
    __slots__ = ("step", "dtype", "num_tokens", "hidden_size", "payload_bytes", "timings")
    STEP_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    step: Step
    dtype: DType
    num_tokens: int
    hidden_size: int
    payload_bytes: int
    timings: _containers.RepeatedCompositeFieldContainer[HopTiming]
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ..., dtype: _Optional[_Union[DType, str]] = ..., num_tokens: _Optional[int] = ..., hidden_size: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., timings: _Optional[_Iterable[_Union[HopTiming, _Mapping]]] = ...) -> None: ...

class Continuation(_message.Message):
    __slots__ = ("step", "offset_bytes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    offset_bytes: int
    def __init__(self, step: _Optional[int] = ..., offset_bytes: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: Error
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class PagesRequest(_message.Message):
    __slots__ = ("pipeline_id", "epoch", "start_layer", "end_layer", "block_ids", "protocol_version")
    PIPELINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    START_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    pipeline_id: str
    epoch: Epoch
    start_layer: int
    end_layer: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    protocol_version: int
    def __init__(self, pipeline_id: _Optional[str] = ..., epoch: _Optional[_Union[Epoch, _Mapping]] = ..., start_layer: _Optional[int] = ..., end_layer: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class Pages(_message.Message):
    __slots__ = ("block_ids", "dtype", "kv_block_bytes", "log_block_bytes", "num_logged", "kv_dtype")
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOG_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGGED_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    dtype: DType
    kv_block_bytes: int
    log_block_bytes: int
    num_logged: int
    kv_dtype: DType
    def __init__(self, block_ids: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[DType, str]] = ..., kv_block_bytes: _Optional[int] = ..., log_block_bytes: _Optional[int] = ..., num_logged: _Optional[int] = ..., kv_dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
