"""The two images: what is in them, who they run as, and how they start and stop."""

from __future__ import annotations

import pytest
from support.containers import TEST_TIMEOUT_S, docker, inspect

pytestmark = [
    pytest.mark.compose,
    pytest.mark.usefixtures("images"),
    pytest.mark.timeout(TEST_TIMEOUT_S),
]

TARGETS = ("control", "worker")


def in_image(target: str, *command: str) -> str:
    first, *rest = command
    return docker("run", "--rm", "--entrypoint", first, f"stagemesh-{target}", *rest).strip()


FIND_TORCH = "import importlib.util as u; print(u.find_spec('torch') is not None)"


@pytest.mark.parametrize(("target", "has_torch"), [("control", "False"), ("worker", "True")])
def test_torch_is_in_the_worker_image_only(target: str, has_torch: str) -> None:
    assert in_image(target, "python", "-c", FIND_TORCH) == has_torch


@pytest.mark.parametrize("target", TARGETS)
def test_runs_as_a_user_without_rights(target: str) -> None:
    owned = "import os; print(os.getuid(), os.access('/app', os.W_OK), os.access('/opt', os.W_OK))"
    uid, *writable = in_image(target, "python", "-c", owned).split()
    assert int(uid) >= 1000
    assert writable == ["False", "False"]


@pytest.mark.parametrize("target", TARGETS)
def test_signals_reach_the_process_and_health_is_checked(target: str) -> None:
    config = inspect(f"stagemesh-{target}")["Config"]
    assert config["Entrypoint"] == ["stagemesh"]
    assert config["StopSignal"] == "SIGTERM"
    assert "stagemesh health" in " ".join(config["Healthcheck"]["Test"])


@pytest.mark.parametrize("target", TARGETS)
def test_no_compiler_and_no_sources_of_tests(target: str) -> None:
    script = "command -v cc gcc g++ make; ls -d /src /app/tests 2>/dev/null; true"
    assert in_image(target, "sh", "-c", script) == ""


@pytest.mark.parametrize("target", TARGETS)
def test_a_wrong_option_is_one_clear_line(target: str) -> None:
    service = {"control": "scheduler", "worker": "worker"}[target]
    script = f"stagemesh {service} --no-such-option 2>&1; echo $?"
    *lines, code = in_image(target, "sh", "-c", script).splitlines()
    assert code == "2"
    assert len(lines) == 1
    assert "--no-such-option" in lines[0]


def test_the_control_image_says_that_it_has_no_worker() -> None:
    script = "stagemesh worker 2>&1; echo $?"
    assert "stagemesh[worker]" in in_image("control", "sh", "-c", script)
