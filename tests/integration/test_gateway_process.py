"""`python -m gateway` as a process: readiness, ports in use, SIGTERM, no torch."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest
from support.paths import DEMO_MODEL, REPO
from support.scripted_scheduler import ScriptedScheduler, served, until

from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc


def command(*options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "gateway", "--model", str(DEMO_MODEL), "--host", "127.0.0.1"),
        *("--log-format", "json", *options),
    ]


async def run(*options: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command(*options), cwd=REPO, stderr=asyncio.subprocess.PIPE
    )


async def test_sigterm_lets_running_streams_end(tmp_path: Path) -> None:
    scheduler = ScriptedScheduler(gate=1)
    ready = tmp_path / "ready.json"
    async with served(scheduler) as (_, address):
        process = await run(
            *("--grpc-port", "0", "--http-port", "0", "--scheduler", address),
            *("--ready-file", str(ready)),
        )
        try:
            await until(lambda: ready.exists() or process.returncode is not None, "readiness")
            facts = json.loads(ready.read_text())
            async with grpc.aio.insecure_channel(facts["grpc"]) as channel:
                request = pb.GenerateRequest(
                    text="Once", stopping=pb.StoppingCriteria(max_tokens=3, ignore_eos=True)
                )
                call = aiter(pb_grpc.TextGenerationStub(channel).Generate(request))
                await anext(call)
                process.send_signal(signal.SIGTERM)
                await until(lambda: refuses(facts["http"]), "the listener to close")
                await scheduler.open_gate(None)
                *_, last = [response async for response in call]
            assert last.summary.usage.completion_tokens == 3
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


def refuses(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


@pytest.mark.parametrize("flag", ["--grpc-port", "--http-port"])
async def test_a_port_in_use_is_named(flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        other = "--http-port" if flag == "--grpc-port" else "--grpc-port"
        process = await run(flag, port, other, "0", "--scheduler", "127.0.0.1:1")
        _, stderr = await process.communicate()
    assert process.returncode == 1
    assert f"127.0.0.1:{port} is in use" in stderr.decode()


async def test_a_model_without_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DEMO_MODEL / "config.json").read_text())
    process = await run("--model", str(tmp_path), "--grpc-port", "0", "--http-port", "0")
    _, stderr = await process.communicate()
    assert process.returncode == 1
    assert "tokenizer.json" in stderr.decode()


def test_a_gateway_needs_no_torch() -> None:
    code = (
        "import sys; import gateway.server; "
        "assert not {'torch', 'safetensors', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, env=dict(os.environ))
