"""Stop strings: found wherever the text is cut, and no character held back without need."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gateway.stop_strings import StopStrings

TEXTS = st.text(alphabet="abc", max_size=24)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Text before the first stop string to be complete; the longest of those at a tie."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(TEXTS, STOPS, st.lists(st.integers(0, 24), max_size=6))
def test_any_cut_gives_the_same(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    matcher = StopStrings(stops, include=False)
    pieces = itertools.pairwise(borders)
    shown = "".join(matcher.push(text[a:b]) for a, b in pieces) + matcher.flush()
    assert (shown, matcher.matched) == reference(text, stops)


@given(TEXTS, STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops, include=False)
    shown = "".join(matcher.push(char) for char in text)
    if matcher.matched is None:
        starts = [stop[:n] for stop in stops for n in range(len(stop))]
        held = max((s for s in starts if text.endswith(s)), key=len, default="")
        assert shown == text[: len(text) - len(held)]


def test_the_stop_string_is_shown_where_asked_for() -> None:
    matcher = StopStrings(["END"], include=True)
    assert [matcher.push(piece) for piece in ("the E", "N", "D of it")] == ["the ", "", "END"]
    assert matcher.matched == "END"
    assert matcher.push("more") == ""


def test_no_stop_before_it_is_allowed() -> None:
    matcher = StopStrings(["ab"], include=False)
    assert matcher.push("ab", may_stop=False) + matcher.push("ca") == "abc"
    assert matcher.push("b") == ""
    assert matcher.matched == "ab"


def test_nothing_is_held_back_without_stop_strings() -> None:
    assert StopStrings([], include=False).push("anything") == "anything"
