"""Every family through every combination of stages, ranks and replicas, in real processes.

    python tests/product/run.py                      # all of it: two hours
    python tests/product/run.py --plan               # the combinations that users plan with
    python tests/product/run.py --families llama,qwen3-moe --layouts PP2TP2,PP1TP4EP

A mesh is started by one command. Its greedy tokens are held against transformers', of one request
at a time and of 32 at once; then a process of it is killed while a stream runs, which must go on
with the same tokens; and when it has ended, no process may be left. Tokens may part from
transformers' only where its two likeliest are closer than MIN_MARGIN. Prints a line for each, and
exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import psutil  # noqa: E402
from support.checkpoints import (  # noqa: E402
    SIZES,
    TinyModel,
    add_tokenizer,
    prompts,
    reference_logprobs,
    tiny_model,
)
from support.mesh import Mesh, greedy_request, running_mesh  # noqa: E402
from support.waiting import wait_until  # noqa: E402

MIN_MARGIN = 1e-3
NUM_TOKENS = 16
LONG = 60  # tokens of the stream during which a process is killed
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": TinyModel("llama", "LlamaConfig", {"num_attention_heads": 8}),
    "mistral": TinyModel("mistral", "MistralConfig", {"sliding_window": 11}),
    "qwen2": TinyModel("qwen2", "Qwen2Config", {}),
    "qwen3": TinyModel("qwen3", "Qwen3Config", {"head_dim": 16}),
    "gemma2": TinyModel("gemma2", "Gemma2Config", {"head_dim": 16, "sliding_window": 11}),
    "gemma3": TinyModel("gemma3", "Gemma3TextConfig", {"head_dim": 16, "sliding_window": 11}),
    "phi3": TinyModel("phi3", "Phi3Config", {"pad_token_id": 0}),
    "granite": TinyModel("granite", "GraniteConfig", {"residual_multiplier": 0.5}),
    "smollm3": TinyModel("smollm3", "SmolLM3Config", {"pad_token_id": 0}),
    "olmo2": TinyModel("olmo2", "Olmo2Config", {"pad_token_id": 0}),
    "mixtral": TinyModel("mixtral", "MixtralConfig", {"num_local_experts": 4}),
    "qwen2-moe": TinyModel(
        "qwen2-moe", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 24}
    ),
    "qwen3-moe": TinyModel("qwen3-moe", "Qwen3MoeConfig", {**EXPERTS, "norm_topk_prob": True}),
    "gpt-oss": TinyModel(
        "gpt-oss",
        "GptOssConfig",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 11,
            "swiglu_limit": 0.7,
            "pad_token_id": 0,
        },
    ),
}
WITH_EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss")


@dataclass(frozen=True)
class Layout:
    """`ranks` of each stage; `spreads_experts`: whole experts on each rank."""

    ranks: tuple[int, ...]
    replicas: int = 1
    spreads_experts: bool = False

    def __str__(self) -> str:
        equal = len(set(self.ranks)) == 1
        ranks = str(self.ranks[0]) if equal else "-".join(map(str, self.ranks))
        replicas = f"DP{self.replicas}" if self.replicas > 1 else ""
        experts = "EP" if self.spreads_experts else ""
        return f"PP{len(self.ranks)}TP{ranks}{replicas}{experts}"

    @property
    def options(self) -> list[str]:
        options = ["--tensor-parallel", ",".join(map(str, self.ranks)), "--restart"]
        return [*options, "--expert-parallel"] if self.spreads_experts else options


def layout(text: str) -> Layout:
    """As `str` of a layout spells it: PP2TP2, PP3TP2-1-1, PP1TP2DP2, PP2TP2EP."""
    found = re.fullmatch(r"PP(\d+)TP([\d-]+)(?:DP(\d+))?(EP)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is no layout, such as PP2TP2 or PP2TP2-1DP2EP")
    ranks = tuple(map(int, found[2].split("-")))
    if len(ranks) == 1:
        ranks *= int(found[1])
    if len(ranks) != int(found[1]):
        raise argparse.ArgumentTypeError(f"{text}: {len(ranks)} numbers of ranks")
    return Layout(ranks, int(found[3] or 1), bool(found[4]))


# Shapes that users plan with, of a size that fits here.
PLAN = [
    *(("llama", layout(text)) for text in ("PP2TP2", "PP2TP2DP2", "PP1TP2DP2", "PP3TP2-1-1")),
    *(("qwen3-moe", layout(text)) for text in ("PP1TP4EP", "PP1TP2EP", "PP2TP2EP", "PP2TP2")),
]


def product(families: Sequence[str]) -> Iterator[tuple[str, Layout]]:
    uneven = [Layout((2, 1)), Layout((1, 4, 2)), Layout((2, 1, 1, 1))]
    even = [
        Layout((ranks,) * stages, replicas)
        for stages, ranks, replicas in itertools.product((1, 2, 3, 4), (1, 2, 4), (1, 2))
    ]
    for family in families:
        for each in [*even, *uneven]:
            yield family, each
            if family in WITH_EXPERTS and max(each.ranks) > 1:
                yield family, Layout(each.ranks, each.replicas, spreads_experts=True)


def check_tokens(reference: Any, prompt: list[int], tokens: list[int], num_tokens: int) -> None:
    """Each token is transformers' choice after the ones before it, or next to it."""
    assert len(tokens) == num_tokens, f"{len(tokens)} tokens of {num_tokens}"
    expected = reference_logprobs(reference, [*prompt, *tokens])[len(prompt) - 1 : -1]
    top = expected.topk(2, dim=-1)
    for i, (token, likeliest) in enumerate(zip(tokens, top.indices[:, 0].tolist(), strict=True)):
        margin = float(top.values[i, 0] - top.values[i, 1])
        assert token == likeliest or margin < MIN_MARGIN, f"token {i}, by a margin of {margin}"


def check_generation(mesh: Mesh, reference: Any) -> None:
    texts = prompts(32, (5, 19, 40), SIZES["vocab_size"], 1)
    requests = [greedy_request(text, NUM_TOKENS, ignore_eos=True) for text in texts]
    alone = [mesh.generate(request) for request in requests[:3]]
    together = mesh.generate_all(requests)
    for text, output in zip([*texts[:3], *texts], [*alone, *together], strict=True):
        check_tokens(reference, text, output.token_ids, NUM_TOKENS)


def check_kill(mesh: Mesh, reference: Any) -> None:
    """Of a rank that is not the first, where there is one."""
    workers = sorted(mesh.status().workers, key=lambda worker: -worker.tensor_parallel)
    ranks = psutil.Process(workers[0].pid).children()
    victim = ranks[0].pid if ranks else workers[0].pid
    (prompt,) = prompts(1, (19,), SIZES["vocab_size"], 2)
    stream = mesh.start(greedy_request(prompt, LONG, ignore_eos=True))
    tokens: list[int] = []
    while len(tokens) < 8:
        tokens += next(stream).delta.token_ids
    os.kill(victim, signal.SIGKILL)
    for response in stream:
        tokens += response.delta.token_ids
    check_tokens(reference, prompt, tokens, LONG)
    wait_until(lambda: len(mesh.status().workers) == len(workers), 60.0, "the worker to be back")


def run(family: str, each: Layout, directory: Path, seed: int) -> None:
    """Raises what is wrong."""
    tiny = FAMILIES[family]
    model = TinyModel(tiny.name, tiny.config_class, tiny.config, seed)
    reference = tiny_model(model, directory)
    add_tokenizer(directory / model.name)
    options = ("--num-blocks", "256", *each.options)
    with running_mesh(
        directory / model.name, *options, stages=len(each.ranks), replicas=each.replicas
    ) as mesh:
        check_generation(mesh, reference)
        check_kill(mesh, reference)
        mesh.wait_idle()
        of_mesh = psutil.Process(mesh.process.pid).children(recursive=True)
    _, left = psutil.wait_procs(of_mesh, timeout=5)
    assert not left, f"processes are left: {left}"


def main() -> None:
    parser = argparse.ArgumentParser(description="token identity over combinations")
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(FAMILIES))
    parser.add_argument(
        "--layouts", type=lambda text: [layout(each) for each in text.split(",")], default=[]
    )
    parser.add_argument("--plan", action="store_true", help="the combinations users plan with")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    cases = list(itertools.product(arguments.families, arguments.layouts))
    if not cases:
        cases = PLAN if arguments.plan else list(product(arguments.families))
    num_failed = 0
    for (family, each), seed in itertools.product(cases, range(arguments.seeds)):
        started_s = time.monotonic()
        log = io.StringIO()
        with tempfile.TemporaryDirectory() as directory:
            try:
                with contextlib.redirect_stdout(log):
                    run(family, each, Path(directory), seed)
                told = "ok"
            except Exception as error:
                num_failed += 1
                print(log.getvalue())
                traceback.print_exc()
                told = f"FAILED: {error!r}"
        took_s = time.monotonic() - started_s
        print(f"{family:10} {each!s:14} seed {seed}  {took_s:5.1f} s  {told}", flush=True)
    print(f"{len(cases) * arguments.seeds} combinations, {num_failed} failures")
    sys.exit(1 if num_failed else 0)


if __name__ == "__main__":
    main()
