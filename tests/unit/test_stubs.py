"""The committed stubs are what the .proto files give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.paths import REPO

PROTOS = sorted(path.name for path in (REPO / "protos").glob("*.proto"))
WITH_SERVICES = [
    name for name in PROTOS if "\nservice " in (REPO / "protos" / name).read_text("utf-8")
]


def generate(to: Path, names: list[str], *outputs: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{REPO}"),
            *(f"--{output}={to}" for output in outputs),
            *(f"protos/{name}" for name in names),
        ],
        cwd=REPO,
        check=True,
    )


def test_the_committed_stubs_are_what_the_proto_files_give(tmp_path: Path) -> None:
    generate(tmp_path, PROTOS, "python_out", "pyi_out")
    generate(tmp_path, WITH_SERVICES, "grpc_python_out")
    fresh = {path.name: path.read_text("utf-8") for path in (tmp_path / "protos").iterdir()}
    committed = {path.name: path.read_text("utf-8") for path in (REPO / "protos").glob("*_pb2*")}
    assert sorted(fresh) == sorted(committed)
    changed = [name for name in fresh if fresh[name] != committed[name]]
    assert not changed, "run `make protos`"
