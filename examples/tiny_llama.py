"""A tiny Llama in plain torch, and the Hugging Face folder that it is written to.

Attribute names are those of the tensors in a Hugging Face checkpoint, and RoPE rotates halves as
there, so the folder loads anywhere. Training is none of this module's business.

Shapes: B windows in a batch, T tokens in a window, H query heads, K key/value heads, D head
dimension, C hidden size, F feed-forward size, V vocabulary.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
BOS_ID, EOS_ID = 0, 1
TEMPERATURE, TOP_P = 0.8, 0.95

# A story model continues text, it does not answer: what was said is rendered as paragraphs of one
# story. Instructions to an assistant ("system") would only be read as a strange first paragraph.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages | rejectattr('role', 'equalto', 'system') %}"
    "{{ message['content'] | trim }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. `num_heads` is a multiple of `num_kv_heads`."""

    vocab_size: int = 2048
    max_tokens: int = 512
    hidden_size: int = 256
    intermediate_size: int = 448
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


def rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin, [T, D], where dimension d is rotated with dimension d + D/2."""
    frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = torch.outer(torch.arange(shape.max_tokens), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [B, H, T, D] by the position of each token."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention in which H / K query heads share a key/value head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        query_size = shape.num_heads * shape.head_dim
        kv_size = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(-2))
        return out


class SwiGLU(nn.Module):
    """The feed-forward half of a layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        out: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer; dropout falls on what it adds to the residual stream."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = SwiGLU(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        out: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return out


class StoryModel(nn.Module):
    """A Llama decoder whose output layer is its embedding table."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.init_weights()
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self) -> None:
        """Small normal weights; smaller where a layer adds to the residual stream, 2 per layer."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                num_summed = 2 * self.shape.num_layers if adds else 1
                nn.init.normal_(weight, std=0.02 / math.sqrt(num_summed))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]."""
        num_tokens = ids.shape[1]
        x = self.dropout(self.embed_tokens(ids))
        for layer in self.layers:
            x = layer(x, self.cos[:num_tokens], self.sin[:num_tokens])
        return linear(self.norm(x), self.embed_tokens.weight)


# --- telling ------------------------------------------------------------------------------------


@torch.no_grad()
def tell(model: StoryModel, tokenizer: Tokenizer, prompt: str, greedy: bool) -> str:
    """Continues `prompt` up to the end token or the model's last position."""
    model.eval()
    ids: list[int] = tokenizer.encode(prompt).ids
    while len(ids) < model.shape.max_tokens:
        logits = model(torch.tensor([ids]))[0, -1]
        token = int(logits.argmax()) if greedy else draw(logits)
        if token == EOS_ID:
            break
        ids.append(token)
    text: str = tokenizer.decode(ids)
    return text


def draw(logits: Tensor) -> int:
    """Samples from logits [V]: temperature first, then the smallest set that holds TOP_P."""
    probs, order = (logits / TEMPERATURE).softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs > TOP_P] = 0.0
    return int(order[torch.multinomial(probs, 1)])


# --- the folder ---------------------------------------------------------------------------------


def model_config(shape: Shape) -> dict[str, object]:
    """What goes into config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_tokens,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "bfloat16",
    }


GENERATION_CONFIG = {
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "do_sample": True,
    "temperature": TEMPERATURE,
    "top_p": TOP_P,
}


def tokenizer_config(shape: Shape) -> dict[str, object]:
    """What goes into tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_tokens,
        "chat_template": CHAT_TEMPLATE,
    }


def save(out: Path, model: StoryModel, tokenizer: Tokenizer) -> None:
    """Writes everything but the card."""
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        "config.json": model_config(model.shape),
        "generation_config.json": GENERATION_CONFIG,
        "tokenizer_config.json": tokenizer_config(model.shape),
    }
    for name, content in parts.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json"))
    weights = {f"model.{name}": value.bfloat16() for name, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
