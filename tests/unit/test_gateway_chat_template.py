"""Chat templates: real ones render exactly, bad ones end in an error of the request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.paths import SHARED

from gateway.chat_template import ChatTemplate, find_chat_template
from stagemesh.errors import CheckpointError, InvalidRequest

_PATH = SHARED / "chat_templates" / "rendering_cases.json"
CASES: list[dict[str, Any]] = json.loads(_PATH.read_text("utf-8")) if _PATH.exists() else []
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{c['name']}" for i, c in enumerate(CASES)])
def test_real_templates_render_exactly(case: dict[str, Any]) -> None:
    template = ChatTemplate(
        case["template"], {"bos_token": case["bos_token"], "eos_token": case["eos_token"]}
    )
    rendered = template.render(
        case["messages"], add_generation_prompt=case["add_generation_prompt"]
    )
    assert rendered == case["expected"]


def render(source: str, messages: list[dict[str, Any]] = HELLO, **options: bool) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **options)


def test_what_transformers_offers_is_there() -> None:
    source = (
        "{{ bos_token }}{{ {'a': 'ü<'} | tojson }}{% for i in range(9) %}{% if i == 2 %}{% break %}"
        "{% endif %}{{ i }}{% endfor %}{% generation %}said{% endgeneration %}"
    )
    assert render(source) == '<s>{"a": "ü<"}01said'
    assert len(render("{{ strftime_now('%Y') }}")) == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only user and assistant roles') }}", "only user and assistant roles"),
        ("{{ messages[7].content }}", "no element"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 1 / 0 }}", "zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "safe"),
        ("{{ 'a' * 1000000000 }}", "too long"),
        ("{{ 10 ** 100000000 }}", "too large"),
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}ab{% endfor %}{% endfor %}",
            "long",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_fails_is_the_request_s_error(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        render(source)
    assert caught.value.param == "messages"


def test_a_template_cannot_change_the_messages() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(InvalidRequest):
        render("{{ messages[0].update({'content': 'x'}) }}", messages)
    assert messages == HELLO


def test_a_final_message_can_be_continued() -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</end>{% endfor %}"
    messages = [*HELLO, {"role": "assistant", "content": "I think "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(source, messages, **options).endswith("[assistant]I think ")
    trimming = source.replace("m.content", "m.content | trim")
    assert render(trimming, messages, **options).endswith("[assistant]I think")
    with pytest.raises(InvalidRequest, match="does not show"):
        render("nothing", messages, **options)
    with pytest.raises(InvalidRequest, match="exclude"):
        render(source, messages, continue_final_message=True)


def test_no_messages() -> None:
    with pytest.raises(InvalidRequest, match="no messages"):
        render("x", [])


def test_a_template_that_is_no_jinja() -> None:
    with pytest.raises(CheckpointError, match="line 1"):
        ChatTemplate("{% for %}", {})


def test_where_the_template_is_found(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert find_chat_template(tmp_path) is None
    config.write_text(json.dumps({"chat_template": "one"}))
    assert find_chat_template(tmp_path) == "one"
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert find_chat_template(tmp_path) == "a"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert find_chat_template(tmp_path) == "file"
