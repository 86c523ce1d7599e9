"""CTranslate2: a C++ engine of its own kernels, float32 or int8."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.protocol import Engine, Options, Peer, Timing, main


class CTranslate2Peer(Peer):
    name = "ctranslate2_peer"
    dtypes = ("float32", "int8")

    def convert(self, options: Options) -> None:
        from ctranslate2.converters import TransformersConverter

        converter = TransformersConverter(str(options.model), low_cpu_mem_usage=True)
        converter.convert(str(options.out), quantization=options.dtype, force=True)

    def load(self, options: Options) -> Engine:
        return _Generator(options)

    def versions(self) -> Mapping[str, str]:
        import ctranslate2

        return {"ctranslate2": ctranslate2.__version__}


class _Generator(Engine):
    def __init__(self, options: Options) -> None:
        import ctranslate2

        self._generator = ctranslate2.Generator(
            str(options.out),
            device="cpu",
            compute_type=options.dtype,
            inter_threads=1,
            intra_threads=options.threads,
        )
        # It takes tokens by their text.
        tokenizer = json.loads((options.model / "tokenizer.json").read_text(encoding="utf-8"))
        self._texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        ends_s = [0.0] * new_tokens
        start_s = time.perf_counter()

        def stamp(result: Any) -> bool:
            ends_s[result.step] = time.perf_counter() - start_s
            return False

        results = self._generator.generate_batch(
            [[self._texts[token_id] for token_id in prompt] for prompt in prompts],
            max_batch_size=0,
            min_length=new_tokens,
            max_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=stamp,
        )
        assert all(len(result.sequences_ids[0]) == new_tokens for result in results)
        assert all(ends_s), "a step without a time"
        return Timing.of_steps(len(prompts), ends_s)


if __name__ == "__main__":
    main(CTranslate2Peer())
