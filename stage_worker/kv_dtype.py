"""What `--kv-dtype` says: in which type keys and values are held, and what a token's take.

    auto        in the type that is computed with
    float32, bfloat16, float16
    int8        8 bits a number, and a float32 scale for each token and KV head, of keys and of
                values

Part of a pipeline's numerics. What a token's become depends on that token alone. Knows nothing of
tensors.
"""

from __future__ import annotations

from stagemesh.errors import ConfigError

AUTO = "auto"
INT8 = "int8"
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, INT8: 1}
SCALE_BYTES = 4
KV_DTYPES = (AUTO, *_ITEM_BYTES)


def resolve_kv_dtype(kv_dtype: str, dtype: str, device: str) -> str:
    """The type that pages on `device` are in where `dtype` is computed with.

    Raises ConfigError where they cannot be.
    """
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"--kv-dtype must be {', '.join(KV_DTYPES)}, not {kv_dtype!r}")
    resolved = dtype if kv_dtype == AUTO else kv_dtype
    if resolved != dtype and device != "cpu":
        raise ConfigError(
            f"--kv-dtype {kv_dtype} needs device cpu: on {device} attention reads pages in the "
            f"type that it computes in, {dtype}"
        )
    return resolved


def vector_bytes(kv_dtype: str, head_dim: int) -> int:
    """Of one head's keys, or values, of one token."""
    return _ITEM_BYTES[kv_dtype] * head_dim + (SCALE_BYTES if kv_dtype == INT8 else 0)
