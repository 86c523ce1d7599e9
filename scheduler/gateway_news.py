"""What gateways are told of requests, as protobuf: tokens and endings, many in a message.

With many streams a message for each token costs both sides more than the token itself.
"""

from __future__ import annotations

from protos import mesh_pb2
from scheduler.core import EndReason, Finished, Tokens
from stagemesh import wire

_END_REASONS = {
    EndReason.STOP_TOKEN: mesh_pb2.END_REASON_STOP_TOKEN,
    EndReason.LENGTH: mesh_pb2.END_REASON_LENGTH,
    EndReason.ABORTED: mesh_pb2.END_REASON_ABORTED,
    EndReason.ERROR: mesh_pb2.END_REASON_ERROR,
}


def add_event(news: mesh_pb2.RequestNews, event: Tokens | Finished) -> None:
    """Tokens are read before endings, so nothing comes after its request's ending."""
    if isinstance(event, Tokens):
        news.tokens.append(_tokens(event))
    else:
        news.finished.append(_finished(event))


def _tokens(event: Tokens) -> mesh_pb2.RequestTokens:
    message = mesh_pb2.RequestTokens(
        request=event.key.request,
        attempt=event.attempt,
        index=event.index,
        tokens=[wire.sampled_token_to_proto(token) for token in event.tokens],
        prompt_logprobs=[wire.sampled_token_to_proto(token) for token in event.prompt_logprobs],
    )
    if event.admission is not None:
        message.cached_prompt_tokens = event.admission.cached_prompt_tokens
        message.queue_ns = event.admission.queue_ns
    return message


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
