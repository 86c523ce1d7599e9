"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from gateway.http.chat import chat_prompt
from gateway.http.common import HttpContext
from gateway.http.reading import read_body
from gateway.http.schemas import DetokenizeBody, TokenizeBody
from gateway.requests import Prompt, TextPrompt
from stagemesh.errors import InvalidRequest


async def tokenize(context: HttpContext, request: Request) -> dict[str, Any]:
    body = await read_body(request, TokenizeBody, context)
    service = context.service
    service.names.adapter(body.model or "")
    token_ids, _ = await service.preparer.prompt_token_ids(_prompt(body))
    text_of = service.model.tokenizer.token_text.text_of
    strings = [text_of(token_id) for token_id in token_ids] if body.return_token_strs else None
    return {
        "tokens": list(token_ids),
        "count": len(token_ids),
        "max_model_len": service.max_model_len,
        "token_strs": strings,
    }


def _prompt(body: TokenizeBody) -> Prompt:
    if body.messages is not None and body.prompt is None:
        return chat_prompt(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            add_special_tokens=body.add_special_tokens,
        )
    if body.prompt is None or body.messages is not None:
        raise InvalidRequest("either prompt or messages is wanted", param="prompt")
    return TextPrompt(body.prompt, body.add_special_tokens is not False)


async def detokenize(context: HttpContext, request: Request) -> dict[str, Any]:
    body = await read_body(request, DetokenizeBody, context)
    context.service.names.adapter(body.model or "")
    return {"prompt": await context.service.preparer.decode(body.tokens, skip_special=False)}
