"""OpenVINO GenAI: its continuous batching pipeline, stepped by hand so that steps have times."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Engine, Options, Peer, Timing, main

_WEIGHT_FORMATS = {"float32": "fp32", "int8": "int8", "int4": "int4"}
# All prompts of a batch in one step.
_MAX_STEP_TOKENS = 4096
_CACHE_GIB = 1


class OpenVinoPeer(Peer):
    name = "openvino_peer"
    dtypes = tuple(_WEIGHT_FORMATS)

    def convert(self, options: Options) -> None:
        command = [
            *(str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"),
            *("--model", str(options.model), "--task", "text-generation-with-past"),
            *("--weight-format", _WEIGHT_FORMATS[options.dtype]),
        ]
        if options.dtype == "int4":
            command += ["--sym", "--group-size", "64", "--ratio", "1.0"]
        subprocess.run([*command, str(options.out)], check=True)

    def load(self, options: Options) -> Engine:
        return _Pipeline(options)

    def versions(self) -> Mapping[str, str]:
        import openvino
        import openvino_genai

        return {
            "openvino": openvino.__version__,
            "openvino-genai": openvino_genai.__version__,
        }


def pipeline_of(converted: Path, threads: int) -> Any:
    """A `ContinuousBatchingPipeline` that computes in float32, as ours does; no prefix cache."""
    import openvino_genai as genai

    limits = genai.SchedulerConfig()
    limits.max_num_batched_tokens = _MAX_STEP_TOKENS
    limits.max_num_seqs = 256
    limits.cache_size = _CACHE_GIB
    limits.enable_prefix_caching = False
    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
    }
    return genai.ContinuousBatchingPipeline(str(converted), limits, "CPU", properties)


class _Pipeline(Engine):
    def __init__(self, options: Options) -> None:
        self._pipeline = pipeline_of(options.out, options.threads)
        self._next_id = 0

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        config = genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        handles = []
        start_s = time.perf_counter()
        for prompt in prompts:
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(self._next_id, ids, config))
            self._next_id += 1
        ends_s = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            ends_s.append(time.perf_counter() - start_s)
        for handle in handles:
            (output,) = handle.read_all()
            assert len(output.generated_ids) == new_tokens, len(output.generated_ids)
        assert len(ends_s) == new_tokens, f"{len(ends_s)} steps, not {new_tokens}"
        return Timing.of_steps(len(prompts), ends_s)


if __name__ == "__main__":
    main(OpenVinoPeer())
