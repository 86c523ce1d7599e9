"""GPT-OSS: sinks matter, and experts that files hold stacked are read in parts, as floats or MXFP4.

The family's tokens, of several seeds, are in test_families_against_transformers.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.checkpoints import SIZES, TinyModel, prompts, rope, tiny_model
from support.greedy import check_greedy
from support.stages import Chain, Wish
from support.thread_ranks import ranked_chain
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from stage_worker import fbgemm
from stage_worker.cuda_support import check_supported
from stage_worker.identity import summarise
from stage_worker.quantise_checkpoint import quantise_checkpoint
from stage_worker.sharding import ALL, Part
from stage_worker.stacked_weights import Mxfp4Source
from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.model_spec import ModelSpec
from stagemesh.quantization import parse_quantization

MODEL = TinyModel(
    "gpt-oss",
    "GptOssConfig",
    {
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 9,
        "swiglu_limit": 0.7,
        "pad_token_id": 0,
        **rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False),
    },
    5,
)
NUM_TOKENS = 16
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def wishes() -> list[Wish]:
    return [Wish(p, NUM_TOKENS) for p in prompts(3, (5, 19, 40), SIZES["vocab_size"], 2)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("plain")
    return tiny_model(MODEL, directory), directory / MODEL.name


@pytest.fixture(scope="module")
def mxfp4(plain: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """As published: experts of 4 bits, all else bfloat16. And what transformers makes of it."""
    path = tmp_path_factory.mktemp("mxfp4") / MODEL.name
    shutil.copytree(plain[1], path)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            num_experts, num_inputs, num_outputs = tensor.shape
            shape = (num_experts, num_outputs, num_inputs // 32)
            blocks = torch.randint(256, (*shape, 16), generator=generator)
            tensors[f"{name}_blocks"] = blocks.to(torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(122, 125, shape, generator=generator).byte()
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"quantization_config": MXFP4, "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )
    return reference.eval(), path


def test_without_its_sinks_a_model_says_something_else(
    plain: tuple[Any, Path], tmp_path: Path
) -> None:
    _, path = plain
    reference = tiny_model(MODEL, tmp_path)
    with torch.no_grad():
        for layer in reference.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    reference.save_pretrained(tmp_path / MODEL.name)
    lives = [Chain(one, 1).run(wishes()) for one in (path, tmp_path / MODEL.name)]
    for with_sinks, without in zip(*lives, strict=True):
        check_greedy(plain[0], with_sinks)
        check_greedy(reference, without)
        assert with_sinks.tokens != without.tokens


def test_blocks_are_those_of_transformers() -> None:
    """Every byte and every scale but that of infinity; whole and in parts of rows and inputs."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (1, 255, 6, 16), generator=generator).byte()
    scales = torch.arange(255)[None, :, None].expand(1, 255, 6).byte()
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].t()
    whole = Mxfp4Source(blocks[0], scales[0], range(192))
    assert whole.shape == (255, 192)
    assert torch.equal(whole.dense(0, 255), wanted)
    for part in (Part(slice(40, 200), ALL), Part(ALL, slice(48, 96)), Part(ALL, slice(96, 192))):
        mine, theirs = whole.part(part), wanted[part.rows, part.columns]
        assert mine.shape == tuple(theirs.shape)
        assert torch.equal(mine.dense(3, 50), theirs[3:50])


@pytest.mark.parametrize("ranks", [(1,), (2, 1), (4,)], ids=str)
def test_mxfp4_gives_the_tokens_of_transformers(
    mxfp4: tuple[Any, Path], ranks: tuple[int, ...]
) -> None:
    """Whole, cut within a block, and experts spread over ranks."""
    reference, path = mxfp4
    with ranked_chain(path, ranks, quantization="none", expert_parallel=ranks == (4,)) as chain:
        for live in chain.run(wishes(), chunk=7):
            check_greedy(reference, live)
        routing = chain.stages[0].ranks[0].experts.routing()
    num_tokens = sum(len(wish.prompt) + NUM_TOKENS - 1 for wish in wishes())
    assert all(sum(counts) == 2 * num_tokens for counts in routing.values())


@pytest.mark.skipif(not fbgemm.is_available(), reason="needs AVX2")
def test_mxfp4_is_held_as_its_floats_would_be(mxfp4: tuple[Any, Path], tmp_path: Path) -> None:
    """By itself in the 16 bits that lose nothing of it, or in as many as are asked for."""
    reference, path = mxfp4
    dense = tmp_path / "dense"
    shutil.copytree(path, dense)
    weights = {name: tensor.bfloat16() for name, tensor in reference.state_dict().items()}
    save_file(weights, dense / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    shares = {}
    for scheme in ("auto", "int8", "int4-g32", "none"):
        held = [Chain(one, 1, quantization=scheme) for one in (path, dense)]
        mine, theirs = (chain.run(wishes()[2:]) for chain in held)
        assert (mine[0].tokens, mine[0].sampled) == (theirs[0].tokens, theirs[0].sampled)
        shares[scheme] = held[0].stages[0].facts.weight_bytes
        assert shares[scheme] == held[1].stages[0].facts.weight_bytes
        if scheme in ("auto", "none"):
            check_greedy(reference, mine[0])
    assert shares["int8"] < shares["auto"] < 0.6 * shares["none"]


@pytest.mark.skipif(not fbgemm.is_available(), reason="needs AVX2")
@pytest.mark.parametrize(
    ("origin", "scheme"), [("plain", "int8"), ("mxfp4", "int8,head=none,0:2=none")]
)
def test_stored_quantised(
    origin: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """`stagemesh quantize` writes a tensor for each expert, and they are read again."""
    _, path = request.getfixturevalue(origin)
    quantise_checkpoint(path, tmp_path / "out", parse_quantization(scheme))
    texts = wishes()[1:]
    at_load = Chain(path, 2, quantization=scheme).run(texts)
    stored = Chain(tmp_path / "out", 1, quantization="auto").run(texts)
    assert [live.tokens for live in stored] == [live.tokens for live in at_load]


def test_parts_are_told_by_the_tensors_of_the_files(
    plain: tuple[Any, Path], mxfp4: tuple[Any, Path]
) -> None:
    stored, floats = summarise(mxfp4[1]), summarise(plain[1])
    assert set(stored.part_hashes) == set(floats.part_hashes)
    assert stored.structure_hash != floats.structure_hash


def test_what_cuda_lacks_is_named(plain: tuple[Any, Path]) -> None:
    with pytest.raises(UnsupportedModel, match=r"attention sinks.*mixtures of experts"):
        check_supported(ModelSpec.from_directory(plain[1]))


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"intermediate_size": 90}, CheckpointError, "intermediate_size 90"),
        ({"swiglu_limit": 0}, CheckpointError, "swiglu_limit"),
        ({"sliding_window": None}, UnsupportedModel, "sliding_window None"),
        ({"architectures": ["MixtralForCausalLM"]}, UnsupportedModel, "swiglu_alpha"),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, Any],
    error: type[Exception],
    told: str,
    mxfp4: tuple[Any, Path],
    tmp_path: Path,
) -> None:
    config = json.loads((mxfp4[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(error, match=told):
        ModelSpec.from_directory(tmp_path)
