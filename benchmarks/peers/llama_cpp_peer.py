"""llama.cpp through llama-cpp-python: its own kernels and formats, asked by its C functions.

The high-level class of llama-cpp-python has no batches, so steps are made by hand, as llama.cpp's
own `batched-bench` makes them. Building it needs a C++ compiler and CMake.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.llama_cpp_rpc import RpcServers
from benchmarks.peers.protocol import Engine, Options, Peer, Timing, main

_FILE = "model.gguf"
_TYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_FILE_TYPES = {"float32": 0, "float16": 1, "q4_0": 2, "q8_0": 7}
_CONTEXT_STEP = 256
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


class LlamaCppPeer(Peer):
    name = "llama_cpp_peer"
    dtypes = tuple(_TYPES)
    is_divisible = True

    def convert(self, options: Options) -> None:
        options.out.mkdir(parents=True)
        _write_gguf(options)

    def load(self, options: Options) -> Engine:
        return _Contexts(options)

    def versions(self) -> Mapping[str, str]:
        import llama_cpp

        return {"llama-cpp-python": llama_cpp.__version__}


class _Contexts(Engine):
    """A context for each batch, made before its time is taken. Several stages are as many servers
    of its RPC backend, with the same number of layers each."""

    def __init__(self, options: Options) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        # It tells of every tensor otherwise. The callback must live as long as it may be called.
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        self._lib.llama_backend_init()
        self._threads = options.threads
        params = self._lib.llama_model_default_params()
        self._servers = RpcServers(options.stages if options.stages > 1 else 0, options.threads)
        self._servers.give_layers(params)
        self._model = self._lib.llama_model_load_from_file(
            str(options.out / _FILE).encode(), params
        )
        if not self._model:
            raise SystemExit(f"{options.out / _FILE} could not be loaded")
        self._vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]

    def close(self) -> None:
        self._servers.close()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        length = len(prompts[0])
        context = self._context(len(prompts), length + new_tokens)
        batch = self._lib.llama_batch_init(len(prompts) * length, 0, 1)
        try:
            return self._timed(context, batch, prompts, new_tokens)
        finally:
            self._lib.llama_batch_free(batch)
            self._lib.llama_free(context)

    def _timed(
        self, context: Any, batch: Any, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> Timing:
        length, ends_s = len(prompts[0]), []
        start_s = time.perf_counter()
        tokens = self._step(context, batch, prompts, 0)
        ends_s.append(time.perf_counter() - start_s)
        for n in range(new_tokens - 1):
            tokens = self._step(context, batch, [[token] for token in tokens], length + n)
            ends_s.append(time.perf_counter() - start_s)
        return Timing.of_steps(len(prompts), ends_s)

    def _context(self, batch: int, num_tokens: int) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_seq_max = batch
        params.n_ctx = batch * -(-num_tokens // _CONTEXT_STEP) * _CONTEXT_STEP
        params.n_batch = max(512, batch * num_tokens)
        params.n_threads = params.n_threads_batch = self._threads
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise SystemExit("no context could be made")
        return context

    def _step(
        self, context: Any, batch: Any, rows: Sequence[Sequence[int]], start: int
    ) -> list[int]:
        """One row of new tokens per sequence, from position `start` on; the likeliest next."""
        import numpy as np

        ends, index = [], 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                batch.token[index] = token
                batch.pos[index] = start + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = offset == len(row) - 1
                index += 1
            ends.append(index - 1)
        batch.n_tokens = index
        if self._lib.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        shape = (self._vocab_size,)
        rows_of = [self._lib.llama_get_logits_ith(context, end) for end in ends]
        return [int(np.ctypeslib.as_array(logits, shape).argmax()) for logits in rows_of]


def _write_gguf(options: Options) -> None:
    import gguf

    config = json.loads((options.model / "config.json").read_text())
    kind = getattr(gguf.GGMLQuantizationType, _TYPES[options.dtype])
    writer = gguf.GGUFWriter(options.out / _FILE, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(_FILE_TYPES[options.dtype])
    _add_tokenizer(writer, options.model, gguf)
    for name, weight in _weights(options.model):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            which = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            weight = _interleaved(weight, config[which])
        weight = weight.astype("float32")
        if weight.ndim == 1 or kind is gguf.GGMLQuantizationType.F32:
            writer.add_tensor(_renamed(name), weight)
        else:
            writer.add_tensor(_renamed(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Any, num_heads: int) -> Any:
    """Rotary pairs of a head side by side, instead of half a head apart."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _renamed(name: str) -> str:
    stem = name.removeprefix("model.").removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{_NAMES[stem]}.weight"
    _, number, rest = stem.split(".", 2)
    return f"blk.{number}.{_NAMES[rest]}.weight"


def _weights(model: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                yield name, tensors.get_tensor(name)


def _add_tokenizer(writer: Any, model: Path, gguf: Any) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    special = {added["id"] for added in tokenizer["added_tokens"]}
    texts = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    kinds = [
        gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL
        for number in range(len(texts))
    ]
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


if __name__ == "__main__":
    main(LlamaCppPeer())
