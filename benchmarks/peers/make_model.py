"""Makes the checkpoint that all peers are made from: a Llama with random weights.

    python -m benchmarks.peers.make_model /tmp/llama-1.1b --size 1.1b

Its size is TinyLlama's, in 16 bits as such models are published or in 32, or smaller ones for
trying things out. The tokenizer is the demo model's, filled up to the size of the vocabulary with
tokens that no text contains: speed does not ask what is said, and every id has a text of its own.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.recovery.random_model import TOKENIZER, TOKENIZER_SIZE, ModelShape, make

_TINY_LLAMA = ModelShape(
    num_layers=22,
    hidden_size=2048,
    intermediate_size=5632,
    num_heads=32,
    num_kv_heads=4,
    max_tokens=2048,
    vocab_size=32000,
    tied=False,
)
SIZES = {
    "1.1b": replace(_TINY_LLAMA, stored="float16"),
    "1.1b-float32": _TINY_LLAMA,
    "130m": ModelShape(
        num_layers=8,
        hidden_size=1024,
        intermediate_size=2816,
        num_heads=16,
        num_kv_heads=4,
        max_tokens=2048,
        vocab_size=16000,
        tied=False,
    ),
    "tiny": ModelShape(
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        max_tokens=2048,
        vocab_size=4096,
        tied=False,
    ),
}


def make_model(out: Path, shape: ModelShape, seed: int = 0) -> None:
    make(out, shape, seed)
    (out / "tokenizer.json").write_text(json.dumps(_filled_tokenizer(shape.vocab_size)))
    # The demo model's has a chat template and a context of its own.
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": shape.max_tokens,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n")


def _filled_tokenizer(vocab_size: int) -> dict[str, object]:
    """Entries that no merge leads to are never encoded, but decoded like any other."""
    tokenizer: dict[str, dict[str, dict[str, int]]] = json.loads(
        (TOKENIZER / "tokenizer.json").read_text(encoding="utf-8")
    )
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"Ġfill{number}": number for number in range(TOKENIZER_SIZE, vocab_size)}
    return dict(tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = SIZES[args.size]
    make_model(args.out, shape, args.seed)
    print(f"{args.out}: {shape.num_parameters() / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
