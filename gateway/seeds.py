"""Seeds: drawn where none is given, and one for each choice of a request.

Choice 0 uses the request's seed itself, so that asking for more choices does not change the first
and a request over HTTP gives what the same one over gRPC gives. Choice i > 0 uses the first 8 bytes
of BLAKE2b over (seed, i), both as 8 bytes little endian.
"""

from __future__ import annotations

import hashlib
import secrets

from stagemesh.sampling import MAX_SEED


def draw_seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice `choice`, counted from 0, of a request with `seed`; both in [0, 2**64)."""
    if choice == 0:
        return seed
    data = seed.to_bytes(8, "little") + choice.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
