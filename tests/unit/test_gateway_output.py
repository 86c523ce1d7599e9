"""From tokens to deltas: order, stop rules, what a broken link may not change."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import DEMO_MODEL

from gateway.held_request import Admission, HeldRequest, MeshFinish, Submission
from gateway.output import OutputAssembler
from gateway.prepare import Prepared
from gateway.requests import (
    Delta,
    GenerationRequest,
    OutputOptions,
    StoppingOptions,
    TokenPrompt,
)
from gateway.tokenizer import Tokenizer
from stagemesh.errors import ProtocolError, QueueFull
from stagemesh.plan import SampledToken
from stagemesh.sampling import SamplingSpec

TOKENIZER = Tokenizer.from_directory(DEMO_MODEL)
IDS = st.lists(st.integers(2, 400), max_size=30)


def sampled(token_ids: Sequence[int], position: int = 1) -> list[SampledToken]:
    return [SampledToken(position + n, token_id) for n, token_id in enumerate(token_ids)]


def assembler(
    *, stop_token_ids: tuple[int, ...] = (), echo: bool = False, **stopping: object
) -> OutputAssembler:
    request = GenerationRequest(
        TokenPrompt((5,)),
        stopping=StoppingOptions(**stopping),  # type: ignore[arg-type]
        output=OutputOptions(echo_prompt=echo),
    )
    sampling = SamplingSpec(stop_token_ids=stop_token_ids)
    return OutputAssembler(Prepared(request, (5,), None, sampling, 100), TOKENIZER)


@given(IDS, st.data(), st.lists(st.text("aeiou t", min_size=1, max_size=3), max_size=3))
@settings(max_examples=80, deadline=None)
def test_deltas_do_not_depend_on_how_tokens_come(
    token_ids: list[int], data: st.DataObject, stops: list[str]
) -> None:
    def run(pieces: Sequence[Sequence[int]]) -> tuple[str, int, str | None]:
        output = assembler(stop=tuple(stops))
        deltas = [output.push(sampled(piece)) for piece in pieces]
        if output.stop_text is None:
            deltas.append(output.finish())
        shown = [delta for delta in deltas if isinstance(delta, Delta)]
        return "".join(delta.text for delta in shown), output.num_tokens, output.stop_text

    cut = data.draw(st.integers(0, len(token_ids)))
    whole = run([token_ids])
    assert run([token_ids[:cut], token_ids[cut:]]) == whole
    assert run([[token_id] for token_id in token_ids]) == whole
    if whole[2] is None:
        assert whole[0] == TOKENIZER.decode(token_ids)
        assert not any(stop in whole[0] for stop in stops)


def test_a_stop_string_waits_for_min_tokens() -> None:
    token_ids = TOKENIZER.encode("a dog and a dog", add_special_tokens=False)
    first = assembler(stop=("dog",)).push(sampled(token_ids))
    assert first is not None
    assert first.text == "a "
    later = assembler(stop=("dog",), min_tokens=len(token_ids) - 1).push(sampled(token_ids))
    assert later is not None
    assert later.text == "a dog and a "


def test_a_stop_token_that_is_a_word_is_not_shown() -> None:
    (dog,) = TOKENIZER.encode(" dog", add_special_tokens=False)
    hidden = assembler(stop_token_ids=(dog,)).push(sampled([dog]))
    shown = assembler(stop_token_ids=(dog,), include_stop_in_output=True).push(sampled([dog]))
    assert hidden is not None
    assert shown is not None
    assert (hidden.text, shown.text) == ("", " dog")
    assert hidden.tokens == shown.tokens


def test_the_echo_comes_once_and_even_without_tokens() -> None:
    output = assembler(echo=True)
    first = output.push([])
    assert first is not None
    assert first.prompt is not None
    assert first.prompt.text == TOKENIZER.decode([5])
    assert output.push([]) is None


class NoOwner:
    def release(self, held: HeldRequest) -> None:
        raise AssertionError


def held_request(max_tokens: int = 8, stop_token_ids: tuple[int, ...] = (1,)) -> HeldRequest:
    sampling = SamplingSpec(stop_token_ids=stop_token_ids, num_prompt_logprobs=1)
    submission = Submission("label", "", (5, 6), sampling, max_tokens)
    return HeldRequest(1, submission, NoOwner())


async def test_known_tokens_are_dropped_and_gaps_refused() -> None:
    held = held_request()
    held.take(0, sampled([10, 11]), [])
    held.take(0, sampled([10, 11]), [])
    held.take(1, sampled([11, 12]), [])
    assert [token.token_id for token in (await held.read()).tokens] == [10, 11, 12]
    with pytest.raises(ProtocolError, match="missing"):
        held.take(4, sampled([14]), [])


async def test_tokens_are_read_before_the_error_and_the_first_end_counts() -> None:
    held = held_request()
    held.take(0, sampled([10]), [])
    held.fail(QueueFull("full"))
    held.finish(stopped=True)
    held.take(1, sampled([11]), [])
    assert [token.token_id for token in (await held.read()).tokens] == [10]
    for _ in range(2):
        with pytest.raises(QueueFull):
            await held.read()


async def test_reading_waits_for_news() -> None:
    held = held_request()
    reading = asyncio.ensure_future(held.read())
    await asyncio.sleep(0)
    assert not reading.done()
    held.finish(stopped=False)
    assert (await reading).finish == MeshFinish(stopped=False)


@pytest.mark.parametrize(
    ("output", "stopped"), [([], None), ([10], None), ([10, 1], True), ([10] * 8, False)]
)
async def test_an_end_that_was_not_told_is_seen_in_the_tokens(
    output: list[int], stopped: bool | None
) -> None:
    held = held_request()
    held.take(0, sampled(output), [])
    held.admitted(Admission(cached_prompt_tokens=3, queue_ns=5))
    held.admitted(Admission())
    held.finish_by_tokens()
    assert held.ended == (stopped is not None)
    if stopped is not None:
        assert (await held.read()).finish == MeshFinish(stopped, Admission(3, 5))
    assert (held.sampling_to_resume().num_prompt_logprobs is None) == bool(output)
