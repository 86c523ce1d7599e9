"""What adapters cost a stage's decode steps, by the number of sequences and of their adapters.

One stage with a whole model of random weights and adapters of random matrices in all its linear
layers. Kinds of steps take turns, so that whatever else the machine does hits all; medians.

    python -m benchmarks.adapters --rank 16 --adapters 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.lone_stage import LLAMA_1B, Decode, LoneStage
from benchmarks.recovery.random_model import make
from stage_worker.layout import layer_tensors
from stagemesh.model_spec import ModelSpec

_WARM_UP_STEPS = 3
_CONTEXT = 64


def make_adapter(out: Path, spec: ModelSpec, rank: int, seed: int) -> None:
    """In PEFT's layout, of all linear layers of the model of `spec`."""
    generator = torch.Generator().manual_seed(seed)
    out.mkdir()
    tensors = {}
    for layer in range(spec.num_layers):
        for name, shape in layer_tensors(spec, layer).items():
            if len(shape) == 2:
                prefix = f"base_model.model.{name.removesuffix('.weight')}.lora"
                a = torch.randn(rank, shape[1], generator=generator)
                tensors[f"{prefix}_A.weight"] = a / shape[1] ** 0.5
                b = torch.randn(shape[0], rank, generator=generator)
                tensors[f"{prefix}_B.weight"] = b / (10 * rank**0.5)
    save_file(tensors, out / "adapter_model.safetensors")
    config = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (out / "adapter_config.json").write_text(json.dumps(config))


def measure(batch: int, steps: Mapping[str, Decode], rounds: int) -> None:
    """One line for each kind of step; the first is what the others are compared with."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for step in steps.values():
        for _ in range(_WARM_UP_STEPS):
            step.take_s()
    for _ in range(rounds):
        for kind, step in steps.items():
            times[kind].append(step.take_s())
    first = statistics.median(times[next(iter(steps))])
    for kind, each in times.items():
        median = statistics.median(each)
        print(f"| {batch} | {kind} | {1000 * median:.2f} | {median / first:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{LLAMA_1B.num_layers} layers, hidden size {LLAMA_1B.hidden_size}, weights "
        f"{args.quantization}; adapters of rank {args.rank}; {args.threads} threads\n"
    )
    print("| sequences | their adapters | ms a step | times as long |\n|" + "---|" * 4)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        make(model, LLAMA_1B)
        dirs = {f"{number}": Path(scratch, f"a{number}") for number in range(args.adapters)}
        for number, out in dirs.items():
            make_adapter(out, ModelSpec.from_directory(model), args.rank, int(number))
        num_tokens = max(args.batch) * (_CONTEXT + 32)
        bare = LoneStage(model, num_tokens, args.quantization)
        stage = LoneStage(model, num_tokens, args.quantization, adapters=dirs)
        kinds = {"none": ("",), "one": (*dirs,)[:1], f"{len(dirs)} and none": (*dirs, "")}
        for batch in args.batch:
            contexts = [_CONTEXT] * batch
            steps = {"none are loaded": bare.decode(contexts)}
            for kind, chosen in kinds.items():
                if len(chosen) <= batch:
                    steps[kind] = stage.decode(contexts, adapters=chosen)
            measure(batch, steps, args.rounds)


if __name__ == "__main__":
    main()
