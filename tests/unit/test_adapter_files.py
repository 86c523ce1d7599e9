"""Adapters that are damaged, do not fit, or want what is not supported are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import TinyAdapter, tiny_adapter
from support.checkpoints import TinyModel, tiny_model

from stage_worker.adapter_files import adapter_identity, checked_identity
from stage_worker.adapter_loading import AdapterLoader
from stage_worker.options import WorkerOptions
from stage_worker.sharding import Shards
from stagemesh.adapters import parse_adapters
from stagemesh.errors import CheckpointError, ConfigError, UnsupportedModel
from stagemesh.model_spec import ModelSpec
from stagemesh.plan import Span

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Any]:
    directory = tmp_path_factory.mktemp("base")
    model = tiny_model(TinyModel("base", "LlamaConfig"), directory)
    return ModelSpec.from_directory(directory / "base"), model


@pytest.fixture
def adapter(base: tuple[ModelSpec, Any], tmp_path: Path) -> Path:
    return tiny_adapter(TinyAdapter("a"), base[1], tmp_path)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (3, 4)])
def test_what_will_be_loaded_is_known_before(
    base: tuple[ModelSpec, Any], adapter: Path, rank: int, size: int
) -> None:
    spec, shards = base[0], Shards(base[0], rank, size)
    loader = AdapterLoader({"a": adapter}, spec, torch.float32, torch.device("cpu"), shards)
    span, loaded = Span(1, 4), list[int]()
    expected = loader.span_bytes(span)
    loader.load(span, loaded.append, one_by_one=False)
    assert sum(loaded) == expected > 0
    assert len(loaded) == span.num_layers, "progress with every layer"


def change_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_the_identity_is_that_of_the_numbers(base: tuple[ModelSpec, Any], adapter: Path) -> None:
    first = checked_identity(adapter, base[0])
    change_config(adapter, base_model_name_or_path="elsewhere", lora_dropout=0.2)
    assert checked_identity(adapter, base[0]) == first
    change_config(adapter, lora_alpha=9)
    second = checked_identity(adapter, base[0])
    change_tensors(adapter, lambda tensors: tensors.update({Q0: tensors[Q0] + 1e-3}))
    assert len({first, second, checked_identity(adapter, base[0])}) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"layers_pattern": "h"}, "layers_pattern 'h'"),
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
        ({"invented_tomorrow": 3}, "invented_tomorrow"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(
    base: tuple[ModelSpec, Any], adapter: Path, changes: dict[str, object], named: str
) -> None:
    change_config(adapter, **changes)
    with pytest.raises(UnsupportedModel, match=named):
        checked_identity(adapter, base[0])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: t.pop(Q0), CheckpointError, f"lacks {Q0}"),
        (
            lambda t: t.update({Q0: t[Q0][:3].clone()}),
            CheckpointError,
            r"shape \[3, 64\].*\[4, 64\]",
        ),
        (lambda t: t.update({Q0: t[Q0][:, 1:].clone()}), CheckpointError, r"shape \[4, 63\]"),
        (lambda t: t.update({Q0: t[Q0].double()}), UnsupportedModel, "stored as F64"),
        (lambda t: t.update({"x.lm_head.lora_A.weight": t[Q0] + 1}), UnsupportedModel, "lm_head"),
        (
            lambda t: t.update({Q0.replace("layers.0", "layers.5"): t[Q0] + 1}),
            UnsupportedModel,
            r"layers\.5.*5 layers",
        ),
        (
            lambda t: t.update({Q0.replace("lora_A.weight", "lora_magnitude_vector"): t[Q0] + 1}),
            UnsupportedModel,
            "lora_magnitude_vector",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    base: tuple[ModelSpec, Any],
    adapter: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    error: type[Exception],
    said: str,
) -> None:
    change_tensors(adapter, change)
    with pytest.raises(error, match=said):
        checked_identity(adapter, base[0])


def test_a_tensor_that_the_config_does_not_tell_of_is_refused(
    base: tuple[ModelSpec, Any], adapter: Path
) -> None:
    change_config(adapter, target_modules=["k_proj"])
    with pytest.raises(CheckpointError, match="does not tell of"):
        checked_identity(adapter, base[0])
    change_config(adapter, target_modules=["c_attn"])
    with pytest.raises(CheckpointError, match="target_modules are in no layer"):
        checked_identity(adapter, base[0])


def test_damaged_and_missing_files_are_refused(base: tuple[ModelSpec, Any], adapter: Path) -> None:
    tensors = adapter / "adapter_model.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged or cut off"):
        checked_identity(adapter, base[0])
    tensors.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        checked_identity(adapter, base[0])
    with pytest.raises(CheckpointError, match="cannot be read"):
        adapter_identity(adapter)
    config = adapter / "adapter_config.json"
    for text in ('{"r": ', "[]", "{}", '{"r": 0, "lora_alpha": 1, "target_modules": ["q_proj"]}'):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
            checked_identity(adapter, base[0])


def test_options_name_adapters(adapter: Path, tmp_path: Path) -> None:
    assert parse_adapters([f"a={adapter}", f" b = {adapter}"], "base") == {
        "a": adapter.resolve(),
        "b": adapter.resolve(),
    }
    for text, said in (
        ("a", "NAME=DIR"),
        (f"={adapter}", "NAME=DIR"),
        (f"base={adapter}", "the model itself has this name"),
        (f"x={tmp_path}", "no adapter there"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_adapters([text], "base")
    with pytest.raises(ConfigError, match="given twice"):
        parse_adapters([f"a={adapter}"] * 2, "base")
    with pytest.raises(ConfigError, match="--adapter needs --device cpu"):
        WorkerOptions(model=tmp_path, adapters=(f"a={adapter}",), device="cuda")
