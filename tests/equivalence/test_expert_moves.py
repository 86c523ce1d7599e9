"""Experts that come to other ranks while requests run: tokens stay right, and no step waits."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from structlog.testing import capture_logs
from support.checkpoints import add_tokenizer, tiny_model
from support.mesh import greedy_request, running_mesh
from support.mixtures import (
    MIXTURE,
    greedy_after,
    greedy_tokens,
    sampled,
    skewed_model,
    wishes,
)
from support.stages import Chain
from support.thread_ranks import ranked_chain
from support.unanswered import Unanswered
from support.waiting import wait_until

from stage_worker import fbgemm
from stage_worker.collectives import Group
from stage_worker.expert_fetch import THREAD_NAME, ExpertFetch
from stage_worker.expert_files import ExpertFiles
from stage_worker.expert_placement import PlacementBalance, place
from stage_worker.identity import file_stamps
from stage_worker.linear_schemes import FLOAT32, Numerics
from stage_worker.rank_processes import RankProcesses
from stage_worker.ranked_stage import RankedStage
from stage_worker.weights import WeightLoader
from stagemesh.errors import CheckpointError
from stagemesh.model_spec import ModelSpec
from stagemesh.quantization import parse_quantization

PLACED = "experts are placed anew"
GIVEN_UP = "experts could not be fetched and stay where they are"


def test_experts_that_move_while_requests_run(tmp_path: Path) -> None:
    """Another placement now and then, read while steps go on: on other ranks, on several, and
    back."""
    reference, path = tiny_model(MIXTURE, tmp_path), tmp_path / MIXTURE.name
    counts = ([9, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 9], [0, 5, 0, 0, 7, 0], [1] * 6)
    placements = itertools.cycle(place(tokens, 4, 1) for tokens in counts)
    with ranked_chain(path, (4,), expert_parallel=True, redundant_experts=1) as chain:
        (stage,) = chain.stages
        execute, num_steps, told = stage.execute, itertools.count(), list[bool]()
        placement = next(placements)

        def execute_and_move(*step: Any) -> Any:
            nonlocal placement
            turn = next(num_steps) % 4
            if turn == 1:
                placement = next(placements)
                told.clear()
                for rank in stage.ranks:
                    rank.experts.fetch(2, placement, told.append)
            if turn == 3:
                wait_until(lambda: len(told) == 4, 10.0, "experts")
                assert all(told)
                for rank in stage.ranks:
                    rank.experts.place(2, placement)
            return execute(*step)

        stage.execute = execute_and_move
        for live in chain.run(wishes(3), chunk=7, max_rows=4):
            assert sampled(live) == greedy_tokens(reference, live)
        assert next(num_steps) > 16, "each of the placements had its steps"


@pytest.mark.skipif(not fbgemm.is_available(), reason="needs AVX2")
@pytest.mark.parametrize("scheme", ["none", "int8", "int4-g32"])
@torch.inference_mode()
def test_an_expert_that_is_read_beside_is_the_one_that_was_loaded(
    scheme: str, skewed: tuple[Any, Path]
) -> None:
    spec = ModelSpec.from_directory(skewed[1])
    numerics = Numerics(torch.float32, torch.device("cpu"), parse_quantization(scheme), False)
    loader = WeightLoader(skewed[1], spec, numerics)
    files = ExpertFiles(skewed[1], spec, numerics, file_stamps(skewed[1]))
    over = threading.Event()
    fetch = ExpertFetch(partial(files.read, 2, (1, 4)), lambda _: over.set())
    loaded = {expert: loader.expert(2, expert) for expert in (1, 4)}  # both pack at once
    assert over.wait(60.0)
    assert fetch.error is None
    x = torch.randn(3, spec.hidden_size, generator=torch.Generator().manual_seed(0))
    for expert, mlp in fetch.experts.items():
        assert torch.equal(mlp.gate_up(x), loaded[expert].gate_up(x))
        y = x[:, :1].expand(-1, 64).contiguous()
        assert torch.equal(mlp.down(y), loaded[expert].down(y))


def test_files_that_have_changed_since_are_not_read(tmp_path: Path) -> None:
    _, path = skewed_model(tmp_path)
    spec = ModelSpec.from_directory(path)
    files = ExpertFiles(path, spec, FLOAT32, file_stamps(path))
    os.utime(path / "model.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="have changed since layers were loaded"):
        list(files.read(2, (1,)))


class Ranks(NamedTuple):
    """Two processes, of which this one is the first: they load one stage after another."""

    processes: RankProcesses
    group: Group


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = RankProcesses(2)
    yield Ranks(processes, processes.own.open_group())
    processes.kill()


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return skewed_model(tmp_path_factory.mktemp("skewed"))


class Moving:
    """A stage of two ranks that looks every few steps whether it should move experts, and what it
    was seen to log."""

    def __init__(self, reference: Any, chain: Chain, logged: list[Any]) -> None:
        self._reference = reference
        self._chain = chain
        self._logged = logged
        self.stage: Any = chain.stages[0]

    def run(self) -> None:
        """Two requests, of right tokens: 12 steps."""
        for live in self._chain.run(wishes(2)):
            assert sampled(live) == greedy_tokens(self._reference, live)

    def run_until(self, condition: Callable[[], Any]) -> None:
        for _ in range(100):
            self.run()
            if condition():
                return
        raise AssertionError("100 times requests ran, and nothing came of it")

    def logs(self, event: str) -> list[Any]:
        return [entry for entry in self._logged if entry["event"] == event]


@pytest.fixture
def moving(
    ranks: Ranks, skewed: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Moving]:
    reference, path = skewed
    monkeypatch.setattr(
        "stage_worker.ranked_stage.PlacementBalance", partial(PlacementBalance, steps_between=2)
    )
    with capture_logs() as logged:
        yield Moving(reference, load(path, ranks), logged)


def load(path: Path, ranks: Ranks) -> Chain:
    def load(config: Any) -> Any:
        return RankedStage.load(config, lambda *_: None, ranks.processes, ranks.group)

    return Chain(path, load=load, num_blocks=64, expert_parallel=True, redundant_experts=1)


def num_reading() -> int:
    return sum(thread.name == THREAD_NAME for thread in threading.enumerate())


class Fault:
    """Rank 0's reads wait until `goes_on`, and fail then if there is an `error`."""

    def __init__(self, files: Any, error: Exception | None = None) -> None:
        self._files = files
        self._error = error
        self.goes_on = threading.Event()

    def read(self, *what: Any) -> Iterator[Any]:
        assert self.goes_on.wait(60.0)
        if self._error is not None:
            raise self._error
        yield from self._files.read(*what)


def test_steps_go_on_while_files_do_not_answer_and_after_they_are_gone(
    moving: Moving, skewed: tuple[Any, Path]
) -> None:
    """On both ranks."""
    pipe = Unanswered(skewed[1])
    moving.run_until(num_reading)
    moving.run()
    assert num_reading() == 1, "nothing else is begun meanwhile"
    assert moving.logs(PLACED) == moving.logs(GIVEN_UP) == []

    def is_given_up() -> bool:
        pipe.end()
        return bool(moving.logs(GIVEN_UP))

    moving.run_until(is_given_up)
    assert {entry["rank"] for entry in moving.logs(GIVEN_UP)} == {0, 1}
    assert "index.json cannot be read" in moving.logs(GIVEN_UP)[0]["reason"]
    assert not moving.logs(PLACED)

    def has_moved() -> bool:
        pipe.end()
        return bool(moving.logs(PLACED))

    pipe.restore()
    moving.run_until(has_moved)


def test_one_rank_that_cannot_read_keeps_all_where_they_are(
    moving: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = moving.stage.experts
    fault = Fault(experts._files, OSError("the disk is broken"))
    fault.goes_on.set()
    with monkeypatch.context() as patch:
        patch.setattr(experts, "_files", fault)
        moving.run_until(lambda: bool(moving.logs(GIVEN_UP)))
        assert {(entry["rank"], entry["reason"]) for entry in moving.logs(GIVEN_UP)} == {
            (0, "OSError: the disk is broken")
        }
        assert not moving.logs(PLACED)
    moving.run_until(lambda: bool(moving.logs(PLACED)))


def test_layers_that_are_loaded_while_experts_are_read(
    moving: Moving, skewed: tuple[Any, Path], ranks: Ranks
) -> None:
    """What was read for the old ones is none of theirs, whenever it comes."""
    old = moving.stage.experts
    old._files = fault = Fault(old._files)
    moving.run_until(num_reading)
    moving._chain = load(skewed[1], ranks)
    moving.stage = old = None
    moving.run()
    fault.goes_on.set()
    moving.run_until(lambda: bool(moving.logs(PLACED)))
    assert not moving.logs(GIVEN_UP)
    assert num_reading() <= 1


def test_busy_experts_come_to_be_on_several_ranks(tmp_path: Path) -> None:
    """The mesh moves them by itself, nobody notices, and it ends well while others are read."""
    reference, path = skewed_model(tmp_path)
    add_tokenizer(path)
    options = ("--tensor-parallel", "2", "--expert-parallel", "--redundant-experts", "1")
    prompts = [wish.prompt for wish in wishes(4)]
    requests = [greedy_request(prompt, 80, ignore_eos=True) for prompt in prompts]
    with running_mesh(path, *options, stages=1) as mesh:

        def run_until(condition: Callable[[], Any]) -> Any:
            for _ in range(20):  # the first time mostly does
                for prompt, output in zip(prompts, mesh.generate_all(requests), strict=True):
                    assert output.token_ids == greedy_after(reference, prompt, output.token_ids)
                if found := condition():
                    return found
            raise AssertionError("nothing came of it")

        run_until(lambda: PLACED in mesh.log.read_text())
        writer = run_until(Unanswered(path).writer)
    os.close(writer)
