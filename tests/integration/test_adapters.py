"""A mesh of processes with two adapters: chosen by name, side by side, through a lost worker."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from support.adapters import TinyAdapter, merged, tiny_adapter
from support.mesh import Mesh, collect, greedy_request, running_mesh
from support.paths import DEMO_MODEL
from support.waiting import wait_until

from protos import text_generation_pb2 as pb

ADAPTERS = (
    TinyAdapter("poet", seed=1, targets=("q_proj", "v_proj", "down_proj")),
    TinyAdapter("clerk", seed=2),
)
PROMPT = list(range(40, 80))  # more than two blocks, so that they could be shared
NUM_TOKENS = 60


@pytest.fixture(scope="module")
def base() -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def truth(base: Any) -> dict[str, list[int]]:
    """Greedy continuations of the prompt, by name; "" is the model alone."""
    models = {"": base, **{adapter.name: merged(adapter, base) for adapter in ADAPTERS}}
    found = {}
    for name, model in models.items():
        prompt = torch.tensor([PROMPT])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        found[name] = output[0, len(PROMPT) :].tolist()
    return found


@pytest.fixture(scope="module")
def mesh(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    directory = tmp_path_factory.mktemp("adapters")
    poet, clerk = (tiny_adapter(adapter, base, directory) for adapter in ADAPTERS)
    options = ("--adapter", f"poet={poet}", "--adapter", f"clerk={clerk}", "--spares", "1")
    with running_mesh(DEMO_MODEL, *options, "--restart", stages=2) as running:
        yield running


def asked(name: str, num_tokens: int = NUM_TOKENS) -> pb.GenerateRequest:
    return greedy_request(PROMPT, num_tokens, ignore_eos=True, model=name)


def test_rows_of_both_adapters_and_of_none_side_by_side(
    mesh: Mesh, truth: dict[str, list[int]]
) -> None:
    assert len({tuple(tokens) for tokens in truth.values()}) == 3
    names = [*truth] * 4
    outputs = mesh.generate_all(asked(name) for name in names)
    for name, output in zip(names, outputs, strict=True):
        assert output.token_ids == truth[name]
    mesh.wait_idle()


def test_the_same_prompt_shares_blocks_with_its_own_adapter_only(mesh: Mesh) -> None:
    prompt = [*PROMPT, 7]  # another last token; unknown from here on
    prompt[0] = 90

    def cached(name: str) -> int:
        request = greedy_request(prompt, 2, ignore_eos=True, model=name)
        summary = mesh.generate(request).summary
        assert summary is not None
        return summary.usage.cached_prompt_tokens

    assert [cached(name) for name in ("poet", "clerk", "")] == [0, 0, 0]
    assert all(cached(name) > 0 for name in ("poet", "clerk", ""))


def test_names_over_http_and_grpc(mesh: Mesh, truth: dict[str, list[int]]) -> None:
    base = DEMO_MODEL.name
    with httpx.Client(base_url=mesh.http_url, timeout=60.0) as http:
        listed = http.get("/v1/models").json()["data"]
        assert [model["id"] for model in listed] == [base, "clerk", "poet"]
        assert [model.get("parent") for model in listed] == [None, base, base]
        assert http.get("/v1/models/poet").json()["id"] == "poet"
        body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        for name in ("poet", "clerk", base):
            answer = http.post(
                "/v1/completions", json=body | {"model": name, "return_token_ids": True}
            ).json()
            assert answer["model"] == name
            assert answer["choices"][0]["token_ids"] == truth[name if name != base else ""][:20]
        refused = http.post("/v1/completions", json=body | {"model": "nobody"})
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "model_not_found"
        assert "'clerk' and 'poet' are served" in refused.json()["error"]["message"]
    with pytest.raises(grpc.RpcError) as error:
        mesh.generate(asked("nobody"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    model = mesh.stub.GetModel(pb.GetModelRequest(model="poet"), timeout=10.0)
    assert (model.model, list(model.adapters)) == ("poet", ["clerk", "poet"])
    assert sorted(mesh.status().mesh.adapters) == ["clerk", "poet"]


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_streams_go_on_with_their_adapters_when_a_part_is_killed(
    mesh: Mesh, truth: dict[str, list[int]], role: str
) -> None:
    wait_until(lambda: len(mesh.status().workers) == 3, 60.0, "all workers to be back")
    calls = {name: mesh.start(asked(name)) for name in truth}
    heads = {name: [next(call), next(call)] for name, call in calls.items()}
    _process_of(mesh, role)
    for name, call in calls.items():
        assert collect([*heads[name], *call]).token_ids == truth[name]
    wait_until(lambda: _serves_again(mesh), 60.0, "all parts to be back")


def _process_of(mesh: Mesh, role: str) -> None:
    """Kills it: of the workers the one that holds the second stage."""
    status = mesh.status()
    second = status.pipelines[0].worker_ids[1]
    pids = {worker.worker_id: worker.pid for worker in status.workers}
    os.kill(pids[second] if role == "worker" else mesh.pids(role)[0], signal.SIGKILL)


def _serves_again(mesh: Mesh) -> bool:
    with contextlib.suppress(grpc.RpcError):
        status = mesh.status()
        return status.mesh.serving and len(status.workers) == 3
    return False


def test_a_mesh_does_not_start_with_an_adapter_that_is_damaged(base: Any, tmp_path: Path) -> None:
    path = tiny_adapter(ADAPTERS[0], base, tmp_path)
    tensors = path / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    with (
        pytest.raises(AssertionError, match=r"adapter_model\.safetensors is damaged or cut off"),
        running_mesh(DEMO_MODEL, "--adapter", f"poet={path}", stages=1),
    ):
        pass
