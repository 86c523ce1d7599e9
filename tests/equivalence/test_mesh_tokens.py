"""A mesh of real processes gives the tokens that transformers gives, however it is cut."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.mesh import Mesh, greedy_request, running_mesh
from support.paths import shared
from support.thorough import THOROUGH
from support.waiting import wait_until

from protos import text_generation_pb2 as pb

MODEL = shared("models/stories260K")

# The model has 5 layers. 7-token chunks cut every prompt of the reference; 40 blocks of 8 hold 320
# tokens, less than two of the longest cases together, so that 25 cases at once must preempt.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 stage": (1, ()),
    "2 stages, chunks of 7, little memory": (
        2,
        ("--max-chunk-tokens", "7", "--block-size", "8", "--num-blocks", "40"),
    ),
    "3 stages, batch-invariant": (3, ("--batch-invariant",)),
}
if THOROUGH:
    LAYOUTS |= {
        "2 stages": (2, ()),
        "3 stages, chunks of 7": (3, ("--max-chunk-tokens", "7")),
        "5 stages, little memory": (5, ("--block-size", "8", "--num-blocks", "40")),
    }


@functools.cache
def cases() -> list[dict[str, Any]]:
    reference = json.loads((MODEL / "reference.json").read_text())
    return list(reference["cases"])


@pytest.fixture(scope="module", params=LAYOUTS, ids=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Iterator[tuple[str, Mesh]]:
    stages, options = LAYOUTS[request.param]
    with running_mesh(MODEL, *options, stages=stages) as mesh:
        yield request.param, mesh


def requests(ignore_eos: bool) -> list[Any]:
    return [greedy_request(case["prompt_ids"], 64, ignore_eos=ignore_eos) for case in cases()]


def expected(ignore_eos: bool) -> list[list[int]]:
    key = "output_ids_ignore_eos" if ignore_eos else "output_ids"
    return [case[key] for case in cases()]


def test_all_cases_at_once(layout: tuple[str, Mesh]) -> None:
    """Half of the layouts go on at end tokens: none of the reference's texts meets one."""
    name, mesh = layout
    ignore_eos = list(LAYOUTS).index(name) % 2 == 0
    preempted = mesh.status().queue.num_preempted
    outputs = mesh.generate_all(requests(ignore_eos))
    assert [output.token_ids for output in outputs] == expected(ignore_eos)
    if "little memory" in name:
        assert mesh.wait_idle().queue.num_preempted > preempted
    mesh.wait_idle()


def test_one_case_at_a_time(layout: tuple[str, Mesh]) -> None:
    """Every case in one of the layouts; every other one goes on at end tokens."""
    name, mesh = layout
    for number, case in list(enumerate(cases()))[list(LAYOUTS).index(name) :: len(LAYOUTS)]:
        ignore_eos = number % 2 == 0
        output = mesh.generate(greedy_request(case["prompt_ids"], 64, ignore_eos=ignore_eos))
        assert output.token_ids == case["output_ids_ignore_eos" if ignore_eos else "output_ids"]


def test_a_stop_token_ends_the_output_there(layout: tuple[str, Mesh]) -> None:
    _, mesh = layout
    case = cases()[0]
    stop = case["output_ids"][10]
    request = greedy_request(case["prompt_ids"], 64)
    request.stopping.stop_token_ids.append(stop)
    output = mesh.generate(request)
    assert output.token_ids == case["output_ids"][: case["output_ids"].index(stop) + 1]
    assert output.summary is not None
    assert output.summary.finish_reason == pb.FINISH_REASON_STOP
    assert output.summary.stop_token_id == stop


def test_text_in_gives_the_reference_text(layout: tuple[str, Mesh]) -> None:
    _, mesh = layout
    texts = [case for case in cases() if case["kind"] == "text" and case["prompt_roundtrips"]]
    outputs = mesh.generate_all(
        greedy_request(case["prompt"], 64, ignore_eos=True) for case in texts
    )
    for case, output in zip(texts, outputs, strict=True):
        assert output.token_ids == case["output_ids_ignore_eos"]
        assert output.text == case["text_ignore_eos"]


def test_every_step_costs_one_message_more_than_there_are_stages(
    layout: tuple[str, Mesh],
) -> None:
    """The scheduler sends one, each stage sends one: activations never pass the scheduler."""
    name, mesh = layout
    num_stages = LAYOUTS[name][0]

    def num_sent() -> int:
        return sum(worker.stats.messages_sent for worker in mesh.status().workers)

    def sent_is_settled() -> bool:
        """Heartbeats carry the counts, a little later."""
        status = mesh.status()
        done = status.pipelines[0].steps_done
        return all(worker.stats.steps_executed == done for worker in status.workers)

    before = mesh.wait_idle()
    wait_until(sent_is_settled, 10.0, "every worker's count")
    sent_before = num_sent()
    mesh.generate(greedy_request(cases()[0]["prompt_ids"], 64, ignore_eos=True))
    after = mesh.wait_idle()
    num_steps = after.pipelines[0].steps_done - before.pipelines[0].steps_done
    assert num_steps >= 64
    wait_until(sent_is_settled, 10.0, "every worker's count")
    assert num_sent() == sent_before + num_steps * num_stages
    timings = after.pipelines[0].mean_timings
    assert len(timings) == num_stages
    assert all(timing.received_bytes > 0 for timing in timings[1:])
    assert timings[0].received_bytes == 0
