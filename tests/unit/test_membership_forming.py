"""Who forms a pipeline, and who is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.members import LIMITS, MS, TERM, FakeMesh, S, model, two_stages

from scheduler.mesh_view import view_of
from scheduler.messages import LoadedSpan, LoadSpan
from stagemesh.errors import ModelMismatch, SpanError
from stagemesh.plan import Epoch, Span


def test_two_workers_make_the_two_stages_that_were_asked_for() -> None:
    mesh = two_stages()
    assert mesh.stages() == ["a", "b"]
    assert mesh.spans() == [(0, 3), (3, 6)]
    facts = mesh.core["p0"]
    assert (facts.epoch, facts.num_stages, facts.num_blocks) == (Epoch(TERM, 1), 2, 100)
    first, last = mesh.workers["a"].last_join, mesh.workers["b"].last_join
    assert (first.stage, first.next_address) == (0, "b:1")
    assert (last.stage, last.next_address) == (1, "scheduler:1")
    assert not first.keep_kv


def test_the_smallest_stage_bounds_the_blocks() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    mesh.register("b", worker={"num_blocks": 7})
    mesh.run()
    assert mesh.core["p0"].num_blocks == 7
    assert mesh.workers["a"].last_join.num_blocks == 7
    assert view_of(mesh.members).max_model_len == 7 * 16


def test_the_first_worker_loads_while_the_second_is_awaited() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    mesh.run()
    assert mesh.workers["a"].commands == [LoadSpan(Span(0, 3))]
    assert view_of(mesh.members).detail == "1 of 2 stages: waiting for layers 3:6"
    mesh.register("b")
    mesh.run()
    assert view_of(mesh.members) == replace(
        view_of(mesh.members), serving=True, num_pipelines=1, detail="", max_model_len=128
    )


def test_without_a_number_of_stages_all_that_come_within_the_settle_time_make_one() -> None:
    mesh = FakeMesh()
    mesh.register("a")
    mesh.wait(4 * S)
    mesh.register("b")
    mesh.wait(4 * S)
    mesh.register("c")
    mesh.wait(4 * S)
    assert not mesh.serving
    mesh.wait(S + MS)
    assert mesh.serving == ["p0"]
    assert mesh.spans() == [(0, 2), (2, 4), (4, 6)]


def test_later_workers_make_a_replica_when_there_are_enough_else_they_are_spares() -> None:
    mesh = FakeMesh()
    mesh.register("a")
    mesh.register("b")
    mesh.wait(6 * S)
    mesh.register("c")
    mesh.wait(60 * S)
    assert mesh.serving == ["p0"]
    mesh.register("d")
    mesh.run()
    assert mesh.serving == ["p0", "p1"]
    assert mesh.stages(1) == ["c", "d"]


def test_the_number_of_replicas_bounds_the_pipelines() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=1, num_replicas=2))
    for worker_id in "abc":
        mesh.register(worker_id)
    mesh.run()
    assert mesh.serving == ["p0", "p1"]
    assert mesh.workers["c"].commands == [LoadSpan(Span(0, 6))], "a spare, ready to take over"


def test_a_worker_that_comes_while_the_first_pipeline_still_loads_is_counted_in() -> None:
    mesh = FakeMesh()
    slow = mesh.register("a", worker={"loads": False})
    mesh.wait(6 * S)
    assert slow.commands == [LoadSpan(Span(0, 6))]
    mesh.register("b")
    mesh.wait(6 * S)
    assert mesh.spans() == [(0, 3), (3, 6)]
    assert slow.commands == [LoadSpan(Span(0, 6))], "it is told when it has done the first"
    slow.loads = True
    mesh.finish_load(slow, Span(0, 6))
    mesh.run()
    assert slow.commands[1] == LoadSpan(Span(3, 6))
    assert mesh.serving


def test_fixed_spans_that_cover_the_model_serve_at_once() -> None:
    mesh = FakeMesh()
    mesh.register("a", span=(4, 6))
    mesh.register("b", span=(0, 4))
    mesh.run()
    assert mesh.stages() == ["b", "a"]
    assert mesh.serving == ["p0"]


def test_a_worker_without_a_fixed_span_fills_the_gap() -> None:
    mesh = FakeMesh()
    mesh.register("a", span=(0, 2))
    mesh.register("b", span=(5, 6))
    mesh.wait(20 * S)
    assert not mesh.serving
    mesh.register("c")
    mesh.wait(6 * S)
    assert mesh.spans() == [(0, 2), (2, 5), (5, 6)]
    assert mesh.stages() == ["a", "c", "b"]


def test_a_fixed_span_that_fits_no_place_has_the_layers_cut_anew() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    mesh.run()
    mesh.register("b", span=(2, 6))
    mesh.run()
    assert mesh.spans() == [(0, 2), (2, 6)]
    assert mesh.stages() == ["a", "b"]
    assert mesh.serving


def test_workers_with_layers_from_before_take_them_up_again() -> None:
    """A scheduler that starts anew finds the workers as the one before left them."""
    mesh = FakeMesh()
    mesh.register("a", loaded=LoadedSpan(Span(4, 6), 50, 16))
    mesh.wait(8 * S)
    assert not mesh.serving
    mesh.register("b", loaded=LoadedSpan(Span(0, 4), 50, 16))
    mesh.run()
    assert mesh.serving == ["p0"]
    assert mesh.stages() == ["b", "a"]
    assert not any(isinstance(command, LoadSpan) for command in mesh.workers["a"].commands)


def test_the_holder_of_a_later_stage_that_comes_first_does_not_load_the_first() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("b", loaded=LoadedSpan(Span(3, 6), 100, 16))
    mesh.run()
    mesh.register("a", loaded=LoadedSpan(Span(0, 3), 100, 16))
    mesh.run()
    assert mesh.stages() == ["a", "b"]
    told = mesh.workers["a"].commands + mesh.workers["b"].commands
    assert not any(isinstance(command, LoadSpan) for command in told)


# ---- refusals ----------------------------------------------------------------------------------


def test_a_worker_with_another_model_is_refused_by_what_differs() -> None:
    mesh = two_stages()
    other = model(structure_hash="other", num_layers=4, name="large")
    with pytest.raises(ModelMismatch, match=r"large.*num_layers is 4, not 6"):
        mesh.register("c", model=other)
    config = model(structure_hash="other")
    with pytest.raises(ModelMismatch, match="config or its tensors"):
        mesh.register("c", model=config)
    mesh.run()
    assert mesh.serving


def test_a_worker_with_other_weights_is_refused_by_their_names() -> None:
    mesh = two_stages()
    hashes = {**model().part_hashes, "layer.3": "x", "head": "y"}
    with pytest.raises(ModelMismatch, match=r"layer\.3, head"):
        mesh.register("c", model=model(part_hashes=hashes))


def test_a_worker_that_has_only_its_own_parts_is_taken() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    first = {"embedding": "e", "layer.0": "0", "layer.1": "1", "layer.2": "2"}
    last = {"layer.3": "3", "layer.4": "4", "layer.5": "5", "norm": "n", "head": "h"}
    mesh.register("a", span=(0, 3), model=model(part_hashes=first))
    mesh.register("b", span=(3, 6), model=model(part_hashes=last))
    mesh.run()
    assert mesh.serving
    whole = FakeMesh(replace(LIMITS, num_stages=1))
    whole.register("c", model=model(part_hashes={**first, **last}))
    whole.run()
    assert view_of(whole.members).identity == view_of(mesh.members).identity != ""


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("dtype", "bfloat16", "--dtype bfloat16"),
        ("wire_dtype", "int8", "--wire-dtype int8"),
        ("kv_dtype", "int8", "--kv-dtype int8"),
        ("batch_invariant", True, "--batch-invariant"),
        ("quantization", "int8", "--quantization int8"),
    ],
)
def test_other_numerics_are_refused(field: str, value: object, option: str) -> None:
    mesh = two_stages()
    with pytest.raises(ModelMismatch, match=option):
        mesh.register("c", **{field: value})  # type: ignore[arg-type]


def test_a_span_outside_the_model_is_refused() -> None:
    mesh = FakeMesh()
    with pytest.raises(SpanError, match=r"4:9.*0:6"):
        mesh.register("a", span=(4, 9))
    with pytest.raises(SpanError, match=r"7 stages.*6 layers"):
        FakeMesh(replace(LIMITS, num_stages=7)).register("a")


def test_blocks_of_another_size_are_refused() -> None:
    mesh = FakeMesh(replace(LIMITS, num_stages=2))
    mesh.register("a")
    odd = mesh.register("b", worker={"block_size_tokens": 32})
    mesh.run()
    assert "32 tokens" in str(mesh.ended[odd.session])
    assert not mesh.serving
    mesh.register("b", incarnation=2)
    mesh.run()
    assert mesh.serving


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ({"a": "1"}, "lacks the adapter b, which the mesh has"),
        ({"a": "1", "b": "2", "c": "3"}, "has the adapter c, which the mesh has not"),
        ({"a": "1", "b": "9"}, "has other numbers in the adapter b"),
    ],
)
def test_other_adapters_are_refused_by_name(adapters: dict[str, str], said: str) -> None:
    mesh = FakeMesh()
    mesh.register("a", adapters={"a": "1", "b": "2"})
    with pytest.raises(ModelMismatch, match=said):
        mesh.register("b", adapters=adapters)
    assert view_of(mesh.members).adapters == {"a": "1", "b": "2"}


def test_a_mesh_that_never_served_may_begin_again_with_another_model() -> None:
    mesh = FakeMesh()
    worker = mesh.register("a")
    mesh.members.goodbye(worker.session, "wrong model", mesh.now_ns)
    mesh.register("a", incarnation=2, model=model(structure_hash="other"))


def test_a_mesh_that_served_keeps_its_model() -> None:
    mesh = two_stages()
    for worker in mesh.workers.values():
        mesh.members.goodbye(worker.session, "done", mesh.now_ns)
    with pytest.raises(ModelMismatch):
        mesh.register("a", incarnation=2, model=model(structure_hash="other"))
