"""The built wheel works by itself: installed elsewhere, with the source tree out of reach."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from support.paths import REPO

PACKAGES = ("protos", "stagemesh", "gateway", "scheduler", "stage_worker")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=REPO, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment with the wheel in it.

    What the wheel depends on comes from this environment's site-packages, by a path that stands
    after the new environment's own, so that no network is needed. Lines of .pth files there (the
    editable install of the source tree among them) are not read.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    site = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], cwd=home, check=True)
    return home / "bin"


def run(installed: Path, *command: str) -> str:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "STAGEMESH"))}
    done = subprocess.run(
        [str(installed / command[0]), *command[1:]],
        cwd=installed,
        env=environ,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_the_wheel_holds_the_packages_and_the_demo_model(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package}/__init__.py" for package in PACKAGES} <= names
    assert {f"stagemesh/demo_model/{name}" for name in ("config.json", "tokenizer.json")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    strangers = {name.split("/")[0] for name in names} - set(PACKAGES)
    assert all(name.endswith(".dist-info") for name in strangers)


def test_the_command_runs(installed: Path) -> None:
    assert run(installed, "stagemesh", "--version").startswith("stagemesh ")
    assert "generate" in run(installed, "stagemesh", "--help")
    assert "--concurrency" in run(installed, "stagemesh", "bench", "--help")


def test_modules_come_from_the_wheel(installed: Path) -> None:
    code = f"""
import importlib, pkgutil
for name in {PACKAGES!r}:
    package = importlib.import_module(name)
    assert package.__file__.startswith({str(installed.parent)!r}), package.__file__
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name == "triton", error  # comes with a torch for CUDA alone
        print(module.name)
"""
    modules = run(installed, "python", "-c", code).split()
    assert {"stagemesh.cli.up", "scheduler.core", "protos.mesh_pb2"} <= set(modules)


def test_the_demo_model_is_found(installed: Path) -> None:
    code = "from stagemesh.demo import demo_model_dir; print(demo_model_dir())"
    found = Path(run(installed, "python", "-c", code).strip())
    assert found.is_relative_to(installed.parent)
    assert (found / "model.safetensors").is_file()
