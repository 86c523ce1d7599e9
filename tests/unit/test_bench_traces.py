"""Traces of real traffic are read as what they say, and what is wrong with them is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import shared

from stagemesh.bench.traces import MOONCAKE_BLOCK_TOKENS, TraceEntry, read_trace
from stagemesh.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_azures_csv(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:04.0319600,3180,8\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
    )
    first, second = read_trace(written(tmp_path, text))
    assert (first.prompt_tokens, first.output_tokens) == (4808, 10)
    assert second.arrival_s - first.arrival_s == pytest.approx(0.052, abs=1e-5)


def test_mooncakes_lines_are_in_milliseconds_and_have_blocks(tmp_path: Path) -> None:
    text = '{"timestamp": 1500, "input_length": 700, "output_length": 5, "hash_ids": [0, 3]}\n'
    (entry,) = read_trace(written(tmp_path, text))
    assert entry == TraceEntry(1.5, 700, 5, (0, 3), MOONCAKE_BLOCK_TOKENS)


def test_lines_without_hashes_are_in_seconds(tmp_path: Path) -> None:
    line = '{"timestamp": 4.5, "input_length": 25, "output_length": 27}\n'
    assert read_trace(written(tmp_path, 3 * line), max_entries=2) == 2 * [TraceEntry(4.5, 25, 27)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,5\n", "line 2: 'GeneratedTokens' is miss"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,5,5\n", "line 2: "),
        ('{"timestamp": 1, "input_length": 5}\n', "line 1: 'output_length' is missing"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}\n{"timestamp"', "line 2: "),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}\n', "one token at least"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "num_entries", "has_blocks"),
    [
        ("AzureLLMInferenceTrace_conv.csv", 19366, False),
        ("mooncake_conversation_trace.jsonl", 12031, True),
        ("derived_azure_conv_512ctx.jsonl", 400, False),
    ],
)
def test_the_published_traces(name: str, num_entries: int, has_blocks: bool) -> None:
    entries = read_trace(shared(f"traces/{name}"))
    assert len(entries) == num_entries
    assert all(bool(entry.blocks) == has_blocks for entry in entries)
    # Of an hour, in order.
    times_s = [entry.arrival_s for entry in entries]
    assert times_s == sorted(times_s)
    assert 60 < times_s[-1] - times_s[0] < 3700
