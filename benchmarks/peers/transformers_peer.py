"""transformers: `generate` in eager torch, which most people begin with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.protocol import Engine, Options, Peer, Timing, main


class TransformersPeer(Peer):
    name = "transformers_peer"
    dtypes = ("float32", "bfloat16")

    def convert(self, options: Options) -> None:
        """It reads the checkpoint as it is."""

    def load(self, options: Options) -> Engine:
        return _Generate(options)

    def versions(self) -> Mapping[str, str]:
        import torch
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__}


class _Generate(Engine):
    def __init__(self, options: Options) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options.threads)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype)
        ).eval()
        # No end token: all of a batch goes on to the end.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        from transformers import LogitsProcessorList

        ids = self._torch.tensor(prompts)
        ends_s: list[float] = []
        start_s = time.perf_counter()

        def stamp(input_ids: Any, scores: Any) -> Any:
            ends_s.append(time.perf_counter() - start_s)
            return scores

        with self._torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                logits_processor=LogitsProcessorList([stamp]),
            )
        assert len(ends_s) == new_tokens, f"{len(ends_s)} steps, not {new_tokens}"
        return Timing.of_steps(len(prompts), ends_s)


if __name__ == "__main__":
    main(TransformersPeer())
