"""`stagemesh bench`: which loads and meshes its options mean, and which make no sense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from stagemesh.bench.options import LoadOptions, OutputOptions, TargetOptions
from stagemesh.bench.workload import Load, LoadKind
from stagemesh.errors import ConfigError
from stagemesh.options import parse_groups

Options = tuple[TargetOptions, LoadOptions, OutputOptions]


def parsed(*argv: str) -> Options:
    groups: Sequence[type] = (TargetOptions, LoadOptions, OutputOptions)
    target, load, output = parse_groups(groups, argv, prog="stagemesh bench", environ={})
    return target, load, output


def test_loads_are_taken_in_order_and_have_a_default() -> None:
    _, load, _ = parsed("--batch", "1,8", "--rate", "0.5", "--concurrency", "4")
    assert load.loads() == [
        Load(LoadKind.BATCH, 1),
        Load(LoadKind.BATCH, 8),
        Load(LoadKind.CONCURRENCY, 4),
        Load(LoadKind.RATE, 0.5),
    ]
    assert [str(each) for each in parsed()[1].loads()] == [
        "concurrency 1",
        "concurrency 8",
        "concurrency 32",
    ]


def test_a_trace_is_an_open_loop_unless_a_concurrency_is_given(tmp_path: Path) -> None:
    _, load, _ = parsed("--trace", str(tmp_path / "t"), "--rate-scale", "1,2.5")
    assert [str(each) for each in load.loads()] == ["trace 1x", "trace 2.5x"]
    _, load, _ = parsed("--trace", str(tmp_path / "t"), "--concurrency", "64")
    assert load.loads() == [Load(LoadKind.CONCURRENCY, 64)]


def test_numbers_of_requests_follow_the_load() -> None:
    _, load, _ = parsed()
    assert load.num_for(Load(LoadKind.BATCH, 5)) == 5
    assert load.num_for(Load(LoadKind.CONCURRENCY, 1)) == 8
    assert load.num_for(Load(LoadKind.CONCURRENCY, 32)) == 128
    assert load.num_for(Load(LoadKind.RATE, 3.0)) == 100
    assert load.num_warm_up(Load(LoadKind.BATCH, 200)) == 32
    _, load, _ = parsed("--num-requests", "7", "--warm-up", "0")
    assert load.num_for(Load(LoadKind.CONCURRENCY, 32)) == 7
    assert load.num_warm_up(Load(LoadKind.BATCH, 200)) == 0


def test_own_meshes_are_stages_by_threads_with_options_of_up() -> None:
    target, _, _ = parsed("--stages", "1,2", "--threads", "1,3", "--up", "--dtype bfloat16")
    meshes = target.meshes()
    assert [(m.stages, m.threads_per_stage) for m in meshes] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert {mesh.dtype for mesh in meshes} == {"bfloat16"}
    assert {mesh.grpc_port for mesh in meshes} == {0}


def test_the_environment_of_bench_is_not_taken_for_that_of_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STAGEMESH_STAGES", "1,2,4")
    monkeypatch.setenv("STAGEMESH_DTYPE", "float16")
    meshes = parsed("--stages", "3")[0].meshes()
    assert [(mesh.stages, mesh.dtype) for mesh in meshes] == [(3, "float16")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gateway", "a:1", "--url", "http://b/v1"], "take one"),
        (["--gateway", "nowhere"], "no address"),
        (["--url", "localhost:8000"], "--url must begin with"),
        (["--gateway", "a:1", "--model", "m"], "not of a running one"),
        (["--gateway", "a:1", "--threads", "2"], "not of a running one"),
        (["--scheduler", "a:1"], "--scheduler is of a running mesh"),
        (["--stages", "two"], "--stages must be whole numbers"),
        (["--batch", "0"], "--batch must be whole numbers"),
        (["--rate", "-1"], "--rate must be positive numbers"),
        (["--prompt-tokens", "9-3"], "--prompt-tokens must be lengths"),
        (["--max-requests", "3"], "need a --trace"),
        (["--trace", "t", "--rate", "1"], "no --batch or --rate"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--endpoint", "embeddings"], "--endpoint must be one of"),
    ],
)
def test_what_makes_no_sense_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*argv)


def test_options_of_up_are_checked() -> None:
    with pytest.raises(ConfigError, match="unknown option --no-such"):
        parsed("--up", "--no-such 3")[0].meshes()
