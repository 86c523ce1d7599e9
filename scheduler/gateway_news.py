"""What gateways are told of requests, as protobuf: tokens and endings, many in a message.

With many streams a message for each token costs both sides more than the token itself.
"""

from __future__ import annotations

from protos import mesh_pb2
from scheduler.core import EndReason, Finished, Tokens
from stagemesh import wire
from stagemesh.wire_steps import write_token

_END_REASONS = {
    EndReason.STOP_TOKEN: mesh_pb2.END_REASON_STOP_TOKEN,
    EndReason.LENGTH: mesh_pb2.END_REASON_LENGTH,
    EndReason.ABORTED: mesh_pb2.END_REASON_ABORTED,
    EndReason.ERROR: mesh_pb2.END_REASON_ERROR,
}


def add_event(news: mesh_pb2.RequestNews, event: Tokens | Finished) -> None:
    """Tokens are read before endings, so nothing comes after its request's ending."""
    if isinstance(event, Tokens):
        _write_tokens(news.tokens.add(), event)
    else:
        news.finished.append(_finished(event))


def _write_tokens(message: mesh_pb2.RequestTokens, event: Tokens) -> None:
    message.request = event.key.request
    message.attempt = event.attempt
    message.index = event.index
    for token in event.tokens:
        write_token(message.tokens.add(), token)
    for token in event.prompt_logprobs:
        write_token(message.prompt_logprobs.add(), token)
    if event.admission is not None:
        message.cached_prompt_tokens = event.admission.cached_prompt_tokens
        message.queue_ns = event.admission.queue_ns


def _finished(event: Finished) -> mesh_pb2.RequestFinished:
    message = mesh_pb2.RequestFinished(
        request=event.key.request,
        attempt=event.attempt,
        reason=_END_REASONS[event.reason],
        completion_tokens=event.completion_tokens,
        cached_prompt_tokens=event.cached_prompt_tokens,
        queue_ns=event.queue_ns,
    )
    if event.error is not None:
        message.error.CopyFrom(wire.error_to_proto(event.error))
        if event.error.retry_after_s is not None:
            message.retry_after_ns = round(event.error.retry_after_s * 1e9)
    return message
