"""What a decode step costs beside what it is for: its parts, and what choosing tokens takes.

First a step of a whole model as one stage, by batch: milliseconds, and the shares of linear layers,
attention, and of the rest, which is all overhead. Then milliseconds of choosing a step's tokens
from random logits, by rows, vocabulary and parameters. Medians; run it on an idle machine.

    python -m benchmarks.step_overhead --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.lone_stage import LLAMA_1B, Decode, LoneStage
from benchmarks.recovery.random_model import TOKENIZER, make
from benchmarks.step_parts import ATTENTION, LINEAR, PARTS, REST, timed_parts
from stage_worker.sampler import SampleRequest, sample
from stagemesh.sampling import SamplingSpec

# What a request may ask for; each row has a seed of its own.
CHOICES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k + top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "all penalties": {
        "temperature": 0.8,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
    },
}
_PROMPT, _OUTPUT = 200, 100  # tokens, for penalties


def part_shares(decode: Decode, num_steps: int) -> tuple[float, dict[str, float]]:
    """(median seconds of a step, shares of its parts)"""
    for _ in range(2):
        decode.take_s()
    median_s = statistics.median(decode.take_s() for _ in range(num_steps))
    with timed_parts() as clock:
        total_s = sum(decode.take_s() for _ in range(num_steps))
    seconds = {part: clock.seconds[part] for part in PARTS if part != REST}
    seconds[REST] = total_s - sum(seconds.values())
    return median_s, {part: value / total_s for part, value in seconds.items()}


def print_parts(args: argparse.Namespace, model_dir: Path, name: str, quantization: str) -> None:
    stage = LoneStage(model_dir, max(args.batches) * args.context, quantization)
    for batch in args.batches:
        median_s, shares = part_shares(stage.decode([args.context] * batch), args.steps)
        outside = sum(share for part, share in shares.items() if part not in (LINEAR, ATTENTION))
        cells = [name, quantization, str(batch), f"{median_s * 1e3:.2f}"]
        cells += [f"{100 * share:.1f}" for share in (*shares.values(), outside)]
        print("| " + " | ".join(cells) + " |", flush=True)


def sampling_ms(num_rows: int, vocab: int, parameters: dict[str, float], num_steps: int) -> float:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_rows, vocab, generator=generator)
    history = torch.randint(vocab, (num_rows, _PROMPT + _OUTPUT), generator=generator).tolist()
    requests = [
        SampleRequest(
            position=_PROMPT + _OUTPUT,
            spec=SamplingSpec(seed=row, **parameters),  # type: ignore[arg-type]
            prompt_token_ids=tuple(tokens[:_PROMPT]),
            output_token_ids=tokens[_PROMPT:],
        )
        for row, tokens in enumerate(history)
    ]
    times_s = []
    for _ in range(num_steps + 2):
        fresh = logits.clone()
        started_s = time.perf_counter()
        sample(fresh, requests)
        times_s.append(time.perf_counter() - started_s)
    return 1e3 * statistics.median(times_s[2:])


def print_sampling(rows: Sequence[int], vocab: int, num_steps: int) -> None:
    for name, parameters in CHOICES.items():
        times_ms = [sampling_ms(num, vocab, parameters, num_steps) for num in rows]
        cells = [str(vocab), name, *(f"{value:.2f}" for value in times_ms)]
        print("| " + " | ".join(cells) + " |", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint instead of the two models")
    parser.add_argument("--quantization", nargs="+", default=["none", "int8"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[32000, 128256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15)
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    print("| model | weights | batch | ms/step | " + " | ".join(f"{part} %" for part in PARTS)
          + " | outside % |")  # fmt: skip
    print("|" + "---|" * (len(PARTS) + 5))
    with tempfile.TemporaryDirectory() as scratch:
        models = {"given": args.model}
        if args.model is None:
            models = {"demo": TOKENIZER, "4 layers of 1.1B": Path(scratch, "model")}
            make(Path(scratch, "model"), LLAMA_1B)
        for name, model_dir in models.items():
            for quantization in args.quantization:
                print_parts(args, model_dir, name, quantization)
    print(
        "\n| vocabulary | tokens by | " + " | ".join(f"ms, {n} rows" for n in args.batches) + " |"
    )
    print("|" + "---|" * (len(args.batches) + 2))
    with torch.inference_mode():
        for vocab in args.vocabularies:
            print_sampling(args.batches, vocab, args.steps)


if __name__ == "__main__":
    main()
