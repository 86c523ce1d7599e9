"""Logging: JSON lines with request labels, the standard library's lines included."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from stagemesh.logs import configure_logging, request_context


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:], logging.raiseExceptions = handlers, raising
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_lines_carry_role_level_and_facts(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("worker")
    structlog.get_logger().info("loaded", num_blocks=7)
    (line,) = lines(capsys)
    assert line["role"] == "worker"
    assert line["level"] == "info"
    assert (line["message"], line["num_blocks"]) == ("loaded", 7)
    assert line["time"].endswith("Z")


def test_request_labels_are_on_lines_within(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("gateway")
    with request_context("r-1"):
        structlog.get_logger().info("inside")
        logging.getLogger("uvicorn").warning("from %s", "uvicorn")
    structlog.get_logger().info("outside")
    inside, foreign, outside = lines(capsys)
    assert inside["request_id"] == "r-1"
    assert (foreign["request_id"], foreign["message"]) == ("r-1", "from uvicorn")
    assert "request_id" not in outside


def test_the_level_holds_for_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("gateway", level="warning")
    structlog.get_logger().info("quiet")
    logging.getLogger("grpc").info("quiet")
    structlog.get_logger().warning("loud")
    assert [line["message"] for line in lines(capsys)] == ["loud"]


def test_an_exception_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("gateway")
    try:
        raise ValueError("unlucky")
    except ValueError:
        structlog.get_logger().exception("failed")
    (line,) = lines(capsys)
    assert "ValueError: unlucky" in line["exception"]


def test_people_get_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("gateway", json=False)
    structlog.get_logger().info("loaded", num_blocks=7)
    text = capsys.readouterr().err
    assert "loaded" in text
    assert "num_blocks=7" in text
    assert not text.startswith("{")
    assert "\x1b" not in text or sys.stderr.isatty()
