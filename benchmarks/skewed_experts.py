"""A router that gives all tokens to two experts of one rank: throughput with and without copies.

Meshes of one stage whose ranks have whole experts, one thread for each rank, decoding. Each mesh
serves the same load twice, and the second time is told: by then the experts that are busy have come
to be on several ranks, where there is room for that. A router that is even is the third.

    python -m benchmarks.skewed_experts --ranks 2 4
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.recovery.random_model import TOKENIZER, TOKENIZER_SIZE

_HEADS, _KV_HEADS, _HEAD_SIZE = 8, 4, 64


def make_model(out: Path, *, skewed: bool, num_layers: int, hidden: int, num_experts: int) -> None:
    """A Qwen3-MoE with random weights, one expert for each token. Skewed: experts 0 and 1 have
    scores of opposite signs, and all others none."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(1.5 / columns**0.5)

    weights = {
        "model.embed_tokens.weight": matrix(TOKENIZER_SIZE, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    queries, keys = _HEADS * _HEAD_SIZE, _KV_HEADS * _HEAD_SIZE
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            weights[f"{attention}{name}_proj.weight"] = matrix(rows, hidden)
        weights[f"{attention}o_proj.weight"] = matrix(hidden, queries)
        for name in ("q_norm", "k_norm"):
            weights[f"{attention}{name}.weight"] = torch.ones(_HEAD_SIZE)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = torch.ones(hidden)
        scores = matrix(num_experts, hidden)
        if skewed:
            scores[1] = -scores[0]
            scores[2:] = 0.0
        weights[f"{prefix}mlp.gate.weight"] = scores
        for expert in range(num_experts):
            module = f"{prefix}mlp.experts.{expert}."
            for name in ("gate_proj", "up_proj"):
                weights[f"{module}{name}.weight"] = matrix(2 * hidden, hidden)
            weights[f"{module}down_proj.weight"] = matrix(hidden, 2 * hidden)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": 2 * hidden,
        "num_experts": num_experts,
        "num_experts_per_tok": 1,
        "num_hidden_layers": num_layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_SIZE,
        "vocab_size": TOKENIZER_SIZE,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, out / name)


def tokens_per_s(model_dir: Path, ranks: int, redundant: int, args: argparse.Namespace) -> float:
    """Of the second of two equal loads."""
    up = f"--tensor-parallel {ranks} --expert-parallel --redundant-experts {redundant}"
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [
                *(sys.executable, "-m", "stagemesh.cli.main", "bench", "--model", str(model_dir)),
                *("--stages", "1", "--threads", "1", "--batch", f"{args.batch},{args.batch}"),
                *("--prompt-tokens", "16", "--output-tokens", str(args.tokens), "--no-plots"),
                *("--up", up, "--out", out),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        report = json.loads(Path(out, "results.json").read_text())["reports"][-1]
    return float(report["decode_tokens_per_s"] or report["output_tokens_per_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400, help="of each request")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8)
    args = parser.parse_args()
    print("| ranks | router | copies a rank | tokens/s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        models = {}
        for name in ("even", "skewed"):
            models[name] = Path(scratch, name)
            make_model(
                models[name],
                skewed=name == "skewed",
                num_layers=args.layers,
                hidden=args.hidden,
                num_experts=args.experts,
            )
        for ranks in args.ranks:
            for name, redundant in (("even", 0), ("skewed", 0), ("skewed", 1)):
                rate = tokens_per_s(models[name], ranks, redundant, args)
                print(f"| {ranks} | {name} | {redundant} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
    main()
