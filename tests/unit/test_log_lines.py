"""A service's log lines as its supervisor shows them."""

from __future__ import annotations

import json

from stagemesh.cli.log_lines import LogLine, shower

LINE = json.dumps(
    {
        "time": "2026-01-02T03:04:05.678Z",
        "level": "warning",
        "role": "worker",
        "message": "slow disk",
        "wait_s": 2,
    }
)


def test_a_line_for_people() -> None:
    text = LogLine.parse(LINE).for_people("worker-0").plain
    assert text.split() == ["03:04:05", "worker-0", "slow", "disk", "wait_s=2"]


def test_a_line_for_programs_keeps_everything_and_says_whose_it_is() -> None:
    content = json.loads(LogLine.parse(LINE).for_programs("worker-0"))
    assert content == {**json.loads(LINE), "process": "worker-0"}


def test_the_level_decides_what_is_shown() -> None:
    shown: list[object] = []
    on_line = shower("error", True, shown.append)
    on_line("worker-0", LINE)
    assert not shown
    shower("warning", True, shown.append)("worker-0", LINE)
    assert len(shown) == 1


def test_what_is_not_of_our_logging_is_always_shown() -> None:
    shown: list[object] = []
    on_line = shower("error", False, shown.append)
    for line in ("Segmentation fault", "[1, 2]", '{"a": 1}'):
        on_line("worker-0", line)
    assert [str(each).split(maxsplit=1)[1] for each in shown] == [
        "Segmentation fault",
        "[1, 2]",
        '{"a": 1}',
    ]


def test_the_level_of_a_line_from_a_c_library_is_known() -> None:
    line = LogLine.parse("I1121 03:38:09.385223   12634 transport.cc:1403] Got goaway")
    assert not line.at_least("info")
    assert LogLine.parse("E1121 03:38:09.385223   12634 x.cc:1] broken").at_least("error")
