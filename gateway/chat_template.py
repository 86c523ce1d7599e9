"""Renders a conversation with the model's own Jinja template, sandboxed and bounded.

The environment offers what transformers offers to templates: trimmed blocks, loop controls, tojson
without escapes, raise_exception, strftime_now, the generation tag. A template comes with the model
and is not trusted beyond that: it can change nothing, and its output and time are limited.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.tokenizer import read_json
from stagemesh.errors import CheckpointError, InvalidRequest

MAX_RENDERED_CHARS = 4_000_000
MAX_RENDER_S = 5.0

_SENTINEL = "\ue000here the message goes on\ue001"


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks what an assistant said; here it just passes."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox in which no product or power can grow beyond what a prompt may hold."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        for a, b in ((left, right), (right, left)):
            if isinstance(b, int) and isinstance(a, str | list | tuple) and len(a) * b > 10**6:
                raise jinja2.TemplateRuntimeError("a product in the template is too long")
        if operator == "**" and not (abs(left) <= 10**6 and abs(right) <= 64):
            raise jinja2.TemplateRuntimeError("a power in the template is too large")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:  # noqa: A002 - its name in templates
    return datetime.now().strftime(format)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template. `variables` (bos_token and the like) are visible in it.

    Raises CheckpointError where the template is no Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is not valid, line {error.lineno}: {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt. Takes long for a bad template: keep it off the event loop.

        Raises InvalidRequest, with the template's own message where the template objects.
        """
        if not messages:
            raise InvalidRequest("the conversation has no messages", param="messages")
        if not continue_final_message:
            return self._render(messages, add_generation_prompt)
        if add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )
        return self._render_open(messages)

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        try:
            pieces = self._template.generate(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
            return _join_bounded(pieces)
        except InvalidRequest:
            raise
        except Exception as error:  # whatever a template does wrong, the request cannot be served
            raise InvalidRequest(
                f"the chat template refused the conversation: {error or type(error).__name__}",
                param="messages",
            ) from error

    def _render_open(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Without whatever the template writes after the text of the last message."""
        last = dict(messages[-1])
        # The space behind the sentinel tells whether the template trims what it is given.
        last["content"] = f"{last.get('content') or ''}{_SENTINEL} "
        head, found, tail = self._render([*messages[:-1], last], False).rpartition(_SENTINEL)
        if not found:
            raise InvalidRequest(
                "the chat template does not show the last message, which was to be continued",
                param="continue_final_message",
            )
        return head if tail.startswith(" ") else head.rstrip()


def _join_bounded(pieces: Any) -> str:
    give_up = time.monotonic() + MAX_RENDER_S
    parts: list[str] = []
    num_chars = 0
    for piece in pieces:
        parts.append(piece)
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS or time.monotonic() > give_up:
            raise InvalidRequest(
                "the chat template's output is too long or takes too long", param="messages"
            )
    return "".join(parts)


def find_chat_template(directory: Path) -> str | None:
    """The source of the model's template: chat_template.jinja, else tokenizer_config.json's.

    Of several named ones it is the one called "default", else the first.
    """
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default") or next(iter(named.values()), None)
    return found if isinstance(found, str) else None
