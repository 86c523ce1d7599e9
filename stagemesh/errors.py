"""The exception tree, and the one table from an exception to what a caller sees.

Whatever a user or a peer can cause is one of these; `assert` is for our own bugs.

    StageMeshError
      InvalidRequest              the caller must change the request
        ContextLengthExceeded
        RequestTooLarge
      ModelNotFound
      QueueFull                   come again later: `retry_after_s`
      MeshUnavailable             no pipeline serves: `retry_after_s`
      RequestDeadlineExceeded
      RequestCancelled
      NotFiniteError              the request's numbers became NaN or infinite
      InternalError               a bug of ours reached a caller
      ConfigError                 an option is wrong; the message names it
      CheckpointError             files of a model are missing, damaged or not understood
        UnsupportedModel
      SpanError                   layers outside the model, or that fit no pipeline
      ModelMismatch               a worker has another model than the mesh
      AddressInUse
      OutOfMemory                 the budget does not hold the weights or one sequence
      ProtocolError               a peer broke the contract
        StaleEpoch
        StepOutOfOrder
      PeerLost                    a stream to a peer broke
      StepTimeout                 a step computed for far longer than it should
      LoadStalled                 layers are loaded no further
"""

from __future__ import annotations

from dataclasses import dataclass


class StageMeshError(Exception):
    """Base of all errors that reach a user or a peer. `str(error)` is a sentence for people."""

    code = "internal"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidRequest(StageMeshError):
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    code = "request_too_large"


class ModelNotFound(StageMeshError):
    code = "model_not_found"


class QueueFull(StageMeshError):
    code = "queue_full"


class MeshUnavailable(StageMeshError):
    code = "mesh_unavailable"


class RequestDeadlineExceeded(StageMeshError):
    code = "deadline_exceeded"


class RequestCancelled(StageMeshError):
    code = "cancelled"


class NotFiniteError(StageMeshError):
    code = "not_finite"


class InternalError(StageMeshError):
    code = "internal"


class ConfigError(StageMeshError):
    code = "config"


class CheckpointError(StageMeshError):
    code = "checkpoint"


class UnsupportedModel(CheckpointError):
    code = "unsupported_model"


class SpanError(StageMeshError):
    code = "span"


class ModelMismatch(StageMeshError):
    code = "model_mismatch"


class AddressInUse(StageMeshError):
    code = "address_in_use"


class OutOfMemory(StageMeshError):
    code = "out_of_memory"


class ProtocolError(StageMeshError):
    code = "protocol"


class StaleEpoch(ProtocolError):
    code = "stale_epoch"


class StepOutOfOrder(ProtocolError):
    code = "step_out_of_order"


class PeerLost(StageMeshError):
    code = "peer_lost"


class StepTimeout(StageMeshError):
    code = "step_timeout"


class LoadStalled(StageMeshError):
    code = "load_stalled"


@dataclass(frozen=True, slots=True)
class Outward:
    """How an error looks from outside. `grpc` is the name of a grpc.StatusCode."""

    grpc: str
    http: int
    openai_type: str


_INVALID = Outward("INVALID_ARGUMENT", 400, "invalid_request_error")
_INTERNAL = Outward("INTERNAL", 500, "server_error")
_PRECONDITION = Outward("FAILED_PRECONDITION", 500, "server_error")
_UNAVAILABLE = Outward("UNAVAILABLE", 503, "service_unavailable")

OUTWARD: dict[type[StageMeshError], Outward] = {
    InvalidRequest: _INVALID,
    ContextLengthExceeded: _INVALID,
    RequestTooLarge: Outward("INVALID_ARGUMENT", 413, "invalid_request_error"),
    ModelNotFound: Outward("NOT_FOUND", 404, "invalid_request_error"),
    QueueFull: Outward("RESOURCE_EXHAUSTED", 429, "rate_limit_error"),
    MeshUnavailable: _UNAVAILABLE,
    RequestDeadlineExceeded: Outward("DEADLINE_EXCEEDED", 504, "timeout_error"),
    RequestCancelled: Outward("CANCELLED", 499, "request_cancelled"),
    NotFiniteError: _INTERNAL,
    InternalError: _INTERNAL,
    ConfigError: _PRECONDITION,
    CheckpointError: _PRECONDITION,
    UnsupportedModel: _PRECONDITION,
    SpanError: _PRECONDITION,
    ModelMismatch: _PRECONDITION,
    AddressInUse: _PRECONDITION,
    OutOfMemory: _PRECONDITION,
    ProtocolError: _PRECONDITION,
    StaleEpoch: _PRECONDITION,
    StepOutOfOrder: _PRECONDITION,
    PeerLost: _UNAVAILABLE,
    StepTimeout: _INTERNAL,
    LoadStalled: _INTERNAL,
}

_BY_CODE = {error.code: error for error in OUTWARD if error is not InternalError}


def outward(error: StageMeshError) -> Outward:
    """What a caller sees of `error`; the nearest ancestor in the table decides."""
    for cls in type(error).__mro__:
        if cls in OUTWARD:
            return OUTWARD[cls]
    return _INTERNAL


def from_code(code: str, message: str, *, retry_after_s: float | None = None) -> StageMeshError:
    """The error that a peer named by `code`; an unknown code is an InternalError."""
    error = _BY_CODE.get(code, InternalError)(message)
    error.retry_after_s = retry_after_s
    return error
