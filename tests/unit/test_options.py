"""Options: where they come from, who wins, and what is said when one is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from stagemesh.errors import ConfigError
from stagemesh.option_values import Kind
from stagemesh.options import check_options, option, parse_groups, parse_options
from stagemesh.plan import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    model: Path = option(help="directory of the model")
    stages: int = option(2, help="how many", minimum=1, maximum=64)
    rate: float = option(1.0, help="a rate")
    max_kv_memory_bytes: int | None = option(None, help="memory", kind=Kind.SIZE)
    lease_s: float = option(5.0, help="a duration", kind=Kind.DURATION)
    block_size_tokens: int = option(16, help="of a block", flag="block-size")
    span: Span | None = option(None, help="layers")
    batch_invariant: bool = option(False, help="exactly")
    dtype: str = option("auto", help="a type", choices=("auto", "float32"))
    stop: tuple[str, ...] = option((), help="texts")

    def __post_init__(self) -> None:
        check_options(self)
        if self.block_size_tokens > 16 and self.stages > 8:
            raise ConfigError("--block-size and --stages are too much together")


def parse(*argv: str, environ: Mapping[str, str] | None = None) -> Example:
    return parse_options(Example, argv, prog="stagemesh worker", environ=environ or {})


def write(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


def test_a_list_goes_on_where_its_flag_is_repeated() -> None:
    assert parse("--model", "m", "--stop", "a,b", "--stop", "c").stop == ("a", "b", "c")


def test_every_type_from_flags() -> None:
    assert parse(
        *("--model", "m", "--stages", "3", "--rate", "0.5", "--max-kv-memory", "2GiB"),
        *("--lease", "500ms", "--block-size=8", "--span", "0:12", "--batch-invariant"),
        *("--dtype", "float32", "--stop", "a, b"),
    ) == Example(
        model=Path("m"),
        stages=3,
        rate=0.5,
        max_kv_memory_bytes=2 * 2**30,
        lease_s=0.5,
        block_size_tokens=8,
        span=Span(0, 12),
        batch_invariant=True,
        dtype="float32",
        stop=("a", "b"),
    )


def test_every_type_from_a_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "mesh.toml",
        """
        model = "m"
        [worker]
        stages = 3
        rate = 2
        max_kv_memory = "1GB"
        lease = 2.5
        block_size = 8
        span = "3:4"
        batch_invariant = true
        stop = ["a", "b"]
        [gateway]
        what_a_gateway_has = 1
        """,
    )
    assert parse("--config", file) == Example(
        model=Path("m"),
        stages=3,
        rate=2.0,
        max_kv_memory_bytes=10**9,
        lease_s=2.5,
        block_size_tokens=8,
        span=Span(3, 4),
        batch_invariant=True,
        stop=("a", "b"),
    )


def test_flags_win_over_variables_over_the_roles_table_over_shared_keys(tmp_path: Path) -> None:
    file = write(tmp_path / "mesh.toml", 'model = "shared"\n[worker]\nstages = 3\nrate = 3.0\n')
    environ = {"STAGEMESH_CONFIG": file, "STAGEMESH_STAGES": "4", "STAGEMESH_RATE": "4"}
    example = parse("--stages", "5", environ=environ)
    assert (example.stages, example.rate, example.model) == (5, 4.0, Path("shared"))
    own = write(tmp_path / "own.toml", 'model = "shared"\n[worker]\nmodel = "own"\n')
    assert parse("--config", own).model == Path("own")
    assert parse("--config", own, environ={"STAGEMESH_MODEL": "variable"}).model == Path("variable")


def test_a_flag_can_say_no_to_a_variable() -> None:
    environ = {"STAGEMESH_BATCH_INVARIANT": "yes"}
    assert parse("--model", "m", environ=environ).batch_invariant
    assert not parse("--model", "m", "--no-batch-invariant", environ=environ).batch_invariant


def test_an_empty_variable_is_none() -> None:
    assert parse("--model", "m", environ={"STAGEMESH_STAGES": ""}).stages == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1KiB", 1024), ("1.5 MB", 1_500_000), ("2gib", 2**31), ("3TiB", 3 * 2**40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse("--model", "m", "--max-kv-memory", text).max_kv_memory_bytes == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("3", 3.0), ("250ms", 0.25), ("1.5m", 90.0), ("2h", 7200.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse("--model", "m", "--lease", text).lease_s == seconds


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stages", "two"], "--stages must be a whole number, not 'two'"),
        (["--stages", "0"], "--stages must be at least 1, not 0"),
        (["--stages", "65"], "--stages must be at most 64, not 65"),
        (["--rate", "nan"], "--rate must be a finite number, not 'nan'"),
        (["--max-kv-memory", "2 bushels"], "--max-kv-memory has the unknown unit 'bushels'"),
        (["--max-kv-memory", "-1"], "--max-kv-memory"),
        (["--lease", "soon"], "--lease must be a duration such as 500ms or 2s, not 'soon'"),
        (["--span", "5:5"], "--span must be layers FIRST:END such as 0:12, END not included"),
        (["--dtype", "int3"], "--dtype must be one of auto, float32, not 'int3'"),
        (["--stagse", "3"], "unknown option --stagse; did you mean --stages?"),
        (["--block-size", "32", "--stages", "9"], "--block-size and --stages are too much"),
        (["--config", "/nowhere.toml"], "--config /nowhere.toml: No such file or directory"),
    ],
)
def test_a_wrong_flag_is_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("--model", "m", *argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_must_be_given_is_named() -> None:
    with pytest.raises(ConfigError, match="--model must be given"):
        parse()


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="STAGEMESH_STAGES must be a whole number, not 'x'"):
        parse("--model", "m", environ={"STAGEMESH_STAGES": "x"})


def test_a_check_of_several_options_says_where_they_are_from() -> None:
    with pytest.raises(ConfigError, match="--stages is from STAGEMESH_STAGES") as caught:
        parse("--model", "m", "--block-size", "32", environ={"STAGEMESH_STAGES": "9"})
    assert "--block-size is from" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[worker]\nstagse = 3", "unknown key 'stagse' in [worker] of {file}; did you mean"),
        ("[wroker]\nstages = 3", "unknown table [wroker] in {file}; did you mean 'worker'?"),
        ("stages = 3", "unknown key 'stages' at the top of {file}"),
        ("[worker]\nstages = 'x'", "stages in [worker] of {file} must be a whole number, not 'x'"),
        ("[worker]\nstages = true", "stages in [worker] of {file} must be a whole number"),
        ("[worker]\nstages = 1.5", "stages in [worker] of {file} must be a whole number"),
        ("[worker]\nbatch_invariant = 1", "batch_invariant in [worker] of {file} must be true or"),
        ("[worker\n", "--config {file}: "),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "mesh.toml", text)
    with pytest.raises(ConfigError) as caught:
        parse("--model", "m", "--config", file)
    assert message.format(file=file) in str(caught.value)


def test_a_class_made_without_parsing_is_checked_as_well() -> None:
    with pytest.raises(ConfigError, match="--stages must be at least 1, not 0"):
        Example(model=Path("m"), stages=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    text: str = option(help="a text", positional=True)


def test_groups_share_one_command_line() -> None:
    argv = ["--stages", "3", "a text", "--model", "m"]
    words, example = parse_groups((Words, Example), argv, prog="stagemesh x", environ={})
    assert (words.text, example.stages) == ("a text", 3)
    with pytest.raises(ConfigError, match="text must be given"):
        parse_groups((Words,), [], prog="stagemesh x", environ={})


def test_help_names_each_option_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--model", "--max-kv-memory SIZE", "--block-size N", "--config FILE", "[2]"):
        assert flag in text
